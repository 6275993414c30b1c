#include "ops/write_attend.h"

#include "mlx/allocator.h"
#include "mlx/ops.h"

#include "metal/launch.h"
#include "ops/attention_checks.h"
#include "ops/dtypes.h"
#include "ops/page_arrays.h"
#include "ops/page_rows.h"
#include "ops/parts.h"
#include "ops/primitive.h"
#include "shape_check.h"

namespace paged_mlx {

namespace {

constexpr const char* kOp = "write_attend";

enum Input { kQ, kKPages, kVPages, kPlan, kK, kV, kSlots };
enum Output { kOut, kKNext, kVNext, kNumOutputs, kPartialOut = kNumOutputs, kPartialState };
constexpr PagesAt kPages{kKNext, 2};

int num_tokens(const mx::array& q) {
  return q.shape(0) * q.shape(2);
}

PlanGeometry geometry_of(const mx::array& q, const mx::array& k_pages) {
  return {num_tokens(q),   q.shape(1), k_pages.shape(1), k_pages.shape(2), k_pages.shape(0),
          /*mask_keys=*/-1};
}

// One node; attention whose work is long is a chain of them, and the first one writes.
class WriteAttend : public PagesPrimitive {
 public:
  WriteAttend(mx::Stream stream, AttentionOptions options, bool has_tokens, Part part)
      : PagesPrimitive(stream), options_(options), has_tokens_(has_tokens), part_(part) {}

  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override {
    const auto &q = inputs[kQ], &v_pages = inputs[kVPages];
    std::vector<mx::Shape> shapes = {{q.shape(0), q.shape(1), q.shape(2), v_pages.shape(3)},
                                     inputs[kKPages].shape(),
                                     v_pages.shape()};
    for (auto& partial : partial_shapes(part_, q.shape(1), v_pages.shape(3))) {
      shapes.push_back(std::move(partial));
    }
    return shapes;
  }
  bool is_equivalent(const mx::Primitive& other) const override {
    const auto& o = static_cast<const WriteAttend&>(other);
    return options_ == o.options_ && has_tokens_ == o.has_tokens_ && part_ == o.part_;
  }
  bool is_row_contiguous(int output) const override {
    return output != kOut;
  }
  const char* name() const override {
    return "WriteAttend";
  }

 protected:
  void eval(const Arrays& inputs, Arrays& outputs) override;

 private:
  bool writes() const {
    return has_tokens_ && part_.is_first();
  }
  // Where the sinks stand among the inputs; -1: there are none.
  int sinks_at() const {
    return !options_.sinks ? -1 : has_tokens_ ? kSlots + 1 : kK;
  }
  auto launch(const Arrays& inputs);

  AttentionOptions options_;
  bool has_tokens_;
  Part part_;
};

// Tokens lie as the next projection reads them, one after another.
void allocate_output(mx::array& out) {
  auto memory = mx::allocator::malloc(out.nbytes());
  if (out.ndim() != 4 || out.shape(1) == 1 || out.shape(2) == 1) {
    out.set_data(std::move(memory));
  } else {
    const mx::array::Flags gapless{/*contiguous=*/true, /*row_contiguous=*/false,
                                   /*col_contiguous=*/false};
    out.set_data(std::move(memory), out.size(), token_major_strides(out.shape()), gapless);
  }
}

auto WriteAttend::launch(const Arrays& inputs) {
  const auto &q = inputs[kQ], &k_pages = inputs[kKPages], &v_pages = inputs[kVPages];
  metal::WritePagesCall write{};
  write.tokens = writes() ? inputs[kSlots].shape(0) : 0;
  write.num_kv_heads = k_pages.shape(1);
  write.page_size = k_pages.shape(2);
  write.row = {row_bytes(k_pages), row_bytes(v_pages)};
  metal::AttendCall attend{};
  attend.dtype = cpu_dtype(q.dtype());
  attend.words = inputs[kPlan].data<int32_t>();
  attend.head_dim = q.shape(3);
  attend.v_head_dim = v_pages.shape(3);
  attend.options = options_;
  attend.items = part_.items;
  const size_t lse_bytes = size_t(num_tokens(q)) * q.shape(1) * sizeof(float);
  return [write, attend, lse_bytes, part = part_, place = place_of_kernels(device()),
          sinks = sinks_at(), geometry = geometry_of(q, k_pages),
          words = inputs[kPlan].size()](metal::Encoder& encoder, auto in, auto out) mutable {
    check_plan(kOp, attend.words, words, geometry);
    if (part.is_last()) {
      count_items(attend.words, place);
    }
    attend.k_pages = write.k_pages = out(kKNext);
    attend.v_pages = write.v_pages = out(kVNext);
    if (write.tokens > 0) {
      write.k = in(kK);
      write.v = in(kV);
      write.slots = in(kSlots);
      metal::write_pages(encoder, write);
    }
    attend.q = in(kQ);
    attend.plan = in(kPlan);
    attend.out = out(kOut);
    attend.lse = encoder.temporary(lse_bytes);
    attend.sinks = sinks < 0 ? nullptr : in(sinks);
    attend.partial_out = part.num_partials ? out(kPartialOut) : nullptr;
    attend.partial_state = part.num_partials ? out(kPartialState) : nullptr;
    metal::attend(encoder, attend);
  };
}

void WriteAttend::eval(const Arrays& inputs, Arrays& outputs) {
  take_memory(part_, inputs, outputs, kPages, allocate_output);
  if (device() == mx::Device::gpu) {
    return run_kernels(inputs, outputs, launch(inputs));
  }
  auto bound = inputs;
  bound[kQ] = token_major(inputs[kQ], stream());
  if (runs_kernels(stream())) {
    for (int i = kK; i <= kV && writes(); i++) {
      bound[i] = token_major(inputs[i], stream());
    }
    return run_kernels(bound, outputs, launch(inputs));
  }
  if (!part_.is_last()) { // made for kernels, but none run: the last node does everything
    return;
  }
  cpu::AttentionArgs args{};
  args.dtype = cpu_dtype(inputs[kQ].dtype());
  args.q = bound[kQ].data<char>();
  const LayerArrays layer{{}, inputs[kQ].shape(3), inputs[kVPages].shape(3), kKPages};
  args.k = layer.k_side(inputs);
  args.v = layer.v_side(inputs);
  args.plan = inputs[kPlan].data<int32_t>();
  args.out = outputs[kOut].data<char>();
  args.options = options_;
  args.sinks = sinks_at() < 0 ? nullptr : inputs[sinks_at()].data<float>();
  const int32_t* slots = nullptr;
  std::vector<SlotWriter> writers;
  if (has_tokens_) {
    writers = {{inputs[kK], args.k}, {inputs[kV], args.v}};
    slots = inputs[kSlots].data<int32_t>();
  }
  run_on_cpu(inputs, outputs,
             [args, writers, slots, geometry = geometry_of(inputs[kQ], inputs[kKPages]),
              words = inputs[kPlan].size()]() {
               check_plan(kOp, args.plan, words, geometry);
               count_items(args.plan, Place::cpu);
               write_slots(kOp, "slots", writers, slots);
               cpu::attend(args);
             });
}

} // namespace

std::vector<mx::array> write_attend(const mx::array& q, const mx::array& k_pages,
                                    const mx::array& v_pages, const mx::array& plan,
                                    const std::optional<mx::array>& k,
                                    const std::optional<mx::array>& v,
                                    const std::optional<mx::array>& slots, float scale,
                                    const std::optional<mx::array>& sinks, mx::StreamOrDevice s_) {
  const auto s = mx::to_stream(s_);
  ShapeCheck shape(kOp);
  shape("q", q, {"q_batch", "num_q_heads", "q_tokens", "head_dim"});
  check_pages(kOp, shape, q, {k_pages, v_pages}, {});
  check_not_traced(kOp, "q", q, k_pages);
  check_number(kOp, "scale", scale, false);
  check_plan(kOp, plan, geometry_of(q, k_pages));
  const bool writes = k && v && slots;
  if (!writes && (k || v || slots)) {
    fail(kOp, "k, v and slots must be given together", "some of them");
  }
  AttentionOptions options;
  options.scale = scale;
  options.sinks = sinks.has_value();
  Arrays inputs = {for_kernels(q, s), row_contiguous(k_pages, s), row_contiguous(v_pages, s), plan};
  inputs.reserve(8);
  if (writes) {
    check_tokens(kOp, shape, *k, *v, k->shape(0), k->shape(2));
    check_not_traced(kOp, "k", *k, k_pages);
    check_dtype(kOp, "slots", *slots, mx::int32, "slot numbers");
    if (slots->ndim() != 1 || slots->shape(0) != k->shape(0) * k->shape(2)) {
      fail(kOp, "slots must have one number for each token of k, " + shape_string(*k),
           shape_string(*slots));
    }
    inputs.push_back(for_kernels(mx::astype(*k, k_pages.dtype(), s), s));
    inputs.push_back(for_kernels(mx::astype(*v, k_pages.dtype(), s), s));
    inputs.push_back(row_contiguous(*slots, s));
  }
  if (sinks) {
    inputs.push_back(per_head(kOp, "sinks", *sinks, shape, s));
  }
  const auto parts = parts_of(plan, q.shape(3) + v_pages.shape(3), s);
  auto outputs = chain(parts, inputs, kPages, [&](const Part& part, auto part_inputs) {
    const auto node = std::make_shared<WriteAttend>(s, options, writes, part);
    std::vector<mx::Dtype> dtypes(kNumOutputs, q.dtype());
    auto shapes = node->output_shapes(part_inputs);
    dtypes.resize(shapes.size(), mx::float32);
    return mx::array::make_arrays(std::move(shapes), dtypes, node, std::move(part_inputs));
  });
  outputs.erase(outputs.begin() + kNumOutputs, outputs.end());
  return outputs;
}

} // namespace paged_mlx
