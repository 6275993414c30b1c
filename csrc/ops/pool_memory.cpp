#include "ops/pool_memory.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <new>

#include "mlx/allocator.h"
#include "mlx/device.h"
#include "mlx/ops.h"

#include "cpu/machine.h"
#include "cpu/reserved_memory.h"
#include "ops/page_rows.h"
#include "ops/primitive.h"
#include "shape_check.h"

namespace paged_mlx {

namespace {

constexpr size_t kMemoryPage = 4096;

using MlxBuffer = mx::allocator::Buffer;

mx::allocator::Allocator& mlx_memory() {
  return mx::allocator::allocator();
}

// A buffer of MLX's that nobody touches: so MLX counts what it has not given as in use.
class Counted {
 public:
  ~Counted() {
    resize(0);
  }

  bool resize(size_t bytes) {
    if (buffer_.ptr()) {
      mlx_memory().free(buffer_);
    }
    buffer_ = bytes ? mlx_memory().malloc(bytes) : MlxBuffer{nullptr};
    if (buffer_.ptr()) {
      cpu::give_back(buffer_.raw_ptr(), bytes); // what MLX had in it before
    }
    return buffer_.ptr() || !bytes;
  }

 private:
  MlxBuffer buffer_{nullptr};
};

// Gives an array memory of MLX's and what frees it, as each release of MLX takes them.
template <typename Array>
void set_data(Array& out, MlxBuffer buffer, const std::function<void(MlxBuffer)>& free) {
  if constexpr (requires { out.set_data(buffer, free); }) {
    out.set_data(buffer, free);
  } else {
    out.set_data(typename Array::Data(buffer, free));
  }
}

// Whether MLX may bind an array for a GPU, by the array's own buffer.
bool is_bound_by_buffer() {
#ifdef _METAL_
  return true;
#else
  return mx::is_available(mx::Device::gpu);
#endif
}

// Memory of one array of a pool, shared by all its versions, at addresses where it can become
// longer. It lies outside the array's buffer, so there is none beside a GPU.
class PoolArray {
 public:
  // Null where there are no addresses for so many bytes.
  static std::shared_ptr<PoolArray> make(size_t capacity, size_t bytes) {
    if (is_bound_by_buffer()) {
      return nullptr;
    }
    auto made = std::shared_ptr<PoolArray>(new PoolArray(capacity));
    if (!made->memory_.begin() || !made->resize(bytes)) {
      return nullptr;
    }
    std::lock_guard guard(lock());
    all()[made->memory_.begin()] = made;
    return made;
  }

  // The memory that an array which has been computed lies in; null if it is another kind.
  static std::shared_ptr<PoolArray> of(const mx::array& a) {
    std::lock_guard guard(lock());
    const auto found = all().find(a.data<char>());
    return found == all().end() ? nullptr : found->second.lock();
  }

  ~PoolArray() {
    std::lock_guard guard(lock());
    all().erase(memory_.begin());
  }

  bool resize(size_t bytes) {
    const size_t before = memory_.size();
    if (!memory_.resize(bytes)) {
      return false;
    }
    if (!counted_.resize(bytes)) {
      memory_.resize(before);
      counted_.resize(before);
      return false;
    }
    return true;
  }

  // Has `out` lie here, and hold the memory.
  static void place(const std::shared_ptr<PoolArray>& memory, mx::array& out) {
    mx::array near(out.shape(), out.dtype(), nullptr, {});
    set_data(near, mlx_memory().malloc(out.itemsize()),
             [memory](MlxBuffer buffer) { mlx_memory().free(buffer); });
    const int64_t bytes = memory->memory_.begin() - near.data<char>();
    out.copy_shared_buffer(near, near.strides(), near.flags(), near.data_size(),
                           bytes / int64_t(out.itemsize()));
  }

 private:
  explicit PoolArray(size_t capacity) : memory_(capacity) {}

  static std::mutex& lock() {
    static auto& mutex = *new std::mutex;
    return mutex;
  }

  static std::map<const char*, std::weak_ptr<PoolArray>>& all() {
    static auto& arrays = *new std::map<const char*, std::weak_ptr<PoolArray>>;
    return arrays;
  }

  cpu::ReservedMemory memory_;
  Counted counted_;
};

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
void fill_words(char* to, size_t bytes, const char* element) {
  Word word;
  std::memcpy(&word, element, sizeof(word));
  std::fill_n(reinterpret_cast<Word*>(to), bytes / sizeof(Word), word);
}

void fill_with(char* to, size_t bytes, const mx::array& element) {
  const char* const at = element.data<char>();
  element.itemsize() == 4 ? fill_words<uint32_t>(to, bytes, at)
                          : fill_words<uint16_t>(to, bytes, at);
}

// Inputs: the fill, one element; then the pages that are kept, if there are any.
class PoolMemory : public PagesPrimitive {
 public:
  // `capacity`: bytes that there are to be addresses for; 0: it never becomes longer.
  PoolMemory(mx::Stream stream, size_t capacity, bool is_zero)
      : PagesPrimitive(stream), capacity_(capacity), is_zero_(is_zero) {}

  const char* name() const override {
    return "PoolMemory";
  }

 protected:
  // Never on a GPU, where pool_memory is made of MLX's own operations.
  void eval(const Arrays& inputs, Arrays& outputs) override {
    auto& out = outputs[0];
    const auto memory = capacity_ ? PoolArray::make(capacity_, out.nbytes()) : nullptr;
    memory ? PoolArray::place(memory, out) : allocate(out);
    const char* const kept = inputs.size() > 1 ? inputs[1].data<char>() : nullptr;
    const size_t copied = kept ? std::min(inputs[1].nbytes(), out.nbytes()) : 0;
    const size_t filled = memory && is_zero_ ? 0 : out.nbytes() - copied;
    run_on_cpu(inputs, outputs,
               [element = inputs[0], kept, copied, to = out.data<char>(), filled]() {
                 if (copied) {
                   std::memcpy(to, kept, copied);
                 }
                 fill_with(to + copied, filled, element);
               });
  }

 private:
  size_t capacity_;
  bool is_zero_;
};

mx::Shape with_pages(mx::Shape shape, int num_pages) {
  shape[0] = num_pages;
  return shape;
}

} // namespace

mx::array pool_memory(const std::optional<mx::array>& kept, const mx::Shape& shape, float fill,
                      mx::Dtype dtype, int most_pages, mx::StreamOrDevice s_) {
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
    const auto rest = with_pages(shape, more);
    return mx::concatenate({*kept, mx::full(rest, element, dtype, s)}, 0, s);
  }
  std::vector<mx::array> inputs = {element};
  if (kept) {
    check_dtype("pool_memory", "kept", *kept, dtype, "the dtype of the new pages");
    inputs.push_back(row_contiguous(*kept, s));
  }
  size_t capacity = size_t(most_pages) * dtype.size();
  for (size_t i = 1; i < shape.size(); i++) {
    capacity *= shape[i];
  }
  return mx::array(shape, dtype, std::make_shared<PoolMemory>(s, capacity, fill == 0),
                   std::move(inputs));
}

std::optional<mx::array> resized_in_place(const mx::array& pages, int num_pages, float fill) {
  const auto memory = PoolArray::of(pages);
  mx::array out(with_pages(pages.shape(), num_pages), pages.dtype(), nullptr, {});
  if (!memory || !memory->resize(out.nbytes())) {
    return std::nullopt;
  }
  PoolArray::place(memory, out);
  out.set_status(mx::array::Status::available);
  if (fill != 0 && out.nbytes() > pages.nbytes()) {
    fill_with(out.data<char>() + pages.nbytes(), out.nbytes() - pages.nbytes(),
              mx::array(fill, pages.dtype()));
  }
  return out;
}

} // namespace paged_mlx
