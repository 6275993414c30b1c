#include "ops/pool_memory.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "mlx/allocator.h"
#include "mlx/ops.h"

#include "cpu/machine.h"
#include "ops/page_rows.h"
#include "ops/primitive.h"
#include "shape_check.h"

namespace paged_mlx {

namespace {

constexpr size_t kMemoryPage = 4096;

// Memory that begins at a page. Nothing has touched it yet, so that its first touch
// takes huge pages.
void allocate(mx::array& out) {
  mx::array whole(out.shape(), out.dtype(), nullptr, {});
  whole.set_data(mx::allocator::malloc(out.nbytes() + kMemoryPage));
  const auto at = reinterpret_cast<uintptr_t>(whole.data<char>());
  const int64_t bytes = (kMemoryPage - at % kMemoryPage) % kMemoryPage;
  out.copy_shared_buffer(whole, whole.strides(), whole.flags(), whole.data_size(),
                         bytes / out.itemsize());
  cpu::use_huge_pages(out.data<char>(), out.nbytes());
}

template <typename Word>
void fill_with(char* to, size_t bytes, const char* element) {
  Word word;
  std::memcpy(&word, element, sizeof(word));
  std::fill_n(reinterpret_cast<Word*>(to), bytes / sizeof(Word), word);
}

// Inputs: the fill, one element; then the pages that are kept, if there are any.
class PoolMemory : public PagesPrimitive {
 public:
  using PagesPrimitive::PagesPrimitive;

  const char* name() const override {
    return "PoolMemory";
  }

 protected:
  // Never on a GPU, where pool_memory is made of MLX's own operations.
  void eval(const Arrays& inputs, Arrays& outputs) override {
    auto& out = outputs[0];
    allocate(out);
    const char* const kept = inputs.size() > 1 ? inputs[1].data<char>() : nullptr;
    const size_t copied = kept ? std::min(inputs[1].nbytes(), out.nbytes()) : 0;
    run_on_cpu(inputs, outputs,
               [element = inputs[0].data<char>(), kept, copied, to = out.data<char>(),
                rest = out.nbytes() - copied, wide = out.itemsize() == 4]() {
                 if (copied) {
                   std::memcpy(to, kept, copied);
                 }
                 wide ? fill_with<uint32_t>(to + copied, rest, element)
                      : fill_with<uint16_t>(to + copied, rest, element);
               });
  }
};

} // namespace

mx::array pool_memory(const std::optional<mx::array>& kept, const mx::Shape& shape, float fill,
                      mx::Dtype dtype, mx::StreamOrDevice s_) {
  const auto s = mx::to_stream(s_);
  const auto element = mx::array(fill, dtype);
  if (s.device == mx::Device::gpu) { // unified memory is Metal's own affair
    if (!kept) {
      return mx::full(shape, element, dtype, s);
    }
    const int more = shape[0] - kept->shape(0);
    if (more <= 0) {
      return mx::take(*kept, mx::arange(shape[0], s), 0, s); // a slice would keep all of kept
    }
    auto rest = shape;
    rest[0] = more;
    return mx::concatenate({*kept, mx::full(rest, element, dtype, s)}, 0, s);
  }
  std::vector<mx::array> inputs = {element};
  if (kept) {
    check_dtype("pool_memory", "kept", *kept, dtype, "the dtype of the new pages");
    inputs.push_back(row_contiguous(*kept, s));
  }
  return mx::array(shape, dtype, std::make_shared<PoolMemory>(s), std::move(inputs));
}

} // namespace paged_mlx
