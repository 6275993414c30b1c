// Host time of the launch code of one layer: a write and an attend, into an encoder that finds
// the pipelines of variants as the one for MLX does, and else does nothing. For bench_launch.py.
#include <vector>

#include "metal/launch.h"
#include "plan_format.h"

using namespace paged_mlx;
using namespace paged_mlx::metal;

namespace {

class EmptyEncoder : public Encoder {
 public:
  int max_threads(const Variant& variant) override {
    return threads_.at(variant, [] { return 1024; });
  }
  void set_variant(const Variant& variant) override {
    max_threads(variant);
  }
  void set_input(int, Buffer) override {}
  void set_output(int, Buffer) override {}
  void set_pages(int, Buffer) override {}
  void set_written_pages(int, Buffer) override {}
  void set_bytes(int, const void*, size_t) override {}
  Buffer temporary(size_t) override {
    return this;
  }
  void dispatch(Size, Size) override {}
  void begin_concurrent() override {}
  void end_concurrent() override {}
  void add_work(double) override {}

 private:
  VariantMap<int> threads_;
};

} // namespace

// Launches so many layers of one sequence's decode step, 32 query and 8 KV heads of 128;
// `merges`: its context is attended in parts.
extern "C" void launch_layers(int layers, bool merges) {
  static EmptyEncoder encoder;
  std::vector<int32_t> words(4096);
  auto& plan = *reinterpret_cast<PlanHeader*>(words.data());
  plan.num_items[kTileItem] = 1;
  plan.num_tokens = plan.num_row_tokens = 1;
  plan.items = 64;
  plan.num_q_heads = 32;
  plan.num_kv_heads = 8;
  plan.page_size = 16;
  plan.max_row_end = 1000;
  plan.num_merges = merges;
  plan.num_partials = merges ? 20 : 0;
  *reinterpret_cast<PlanItem*>(words.data() + plan.items) = {0, 1, 0, 64, 0, 0, 1000, -1};
  const int memory = 0;
  AttendCall attention{};
  attention.dtype = DType::bfloat16;
  attention.words = words.data();
  attention.head_dim = attention.v_head_dim = 128;
  attention.q = attention.k_pages = attention.v_pages = attention.plan = &memory;
  attention.out = attention.lse = &memory;
  WritePagesCall write{};
  write.k = write.v = write.k_pages = write.v_pages = write.slots = &memory;
  write.tokens = 1;
  write.num_kv_heads = 8;
  write.page_size = 16;
  write.row = {256, 256};
  for (int i = 0; i < layers; i++) {
    write_pages(encoder, write);
    attend(encoder, attention);
  }
}
