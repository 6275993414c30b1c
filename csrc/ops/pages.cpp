#include "ops/pages.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "mlx/allocator.h"
#include "mlx/ops.h"

#include "metal/launch.h"
#include "ops/page_arrays.h"
#include "ops/page_rows.h"
#include "ops/primitive.h"
#include "shape_check.h"

namespace paged_mlx {

namespace {

// Arrays of a pool that one node copies pages in. Outputs of a node know each other, so
// one node for all layers would cost the square of their number.
constexpr size_t kArraysPerNode = 8;

std::atomic<int64_t> g_buffer_copies{0};

// Points `out` at the buffer of `in`, or at fresh memory. True when the caller
// must copy the old contents first.
bool needs_copy(const mx::array& in, mx::array& out, WriteMode mode) {
  if (mode == WriteMode::alias || in.is_donatable()) {
    out.copy_shared_buffer(in);
    return false;
  }
  g_buffer_copies++;
  out.set_data(mx::allocator::malloc(out.nbytes()));
  return true;
}

// The old contents of a buffer that could not be reused.
struct BufferCopy {
  const char* from = nullptr;
  char* to = nullptr;
  size_t bytes = 0;

  void run() const {
    if (bytes) {
      std::memcpy(to, from, bytes);
    }
  }
};

BufferCopy copy_of(const mx::array& in, mx::array& out, bool needed) {
  return needed ? BufferCopy{in.data<char>(), out.data<char>(), out.nbytes()} : BufferCopy{};
}

// For each output, whether the input that is its old version must be copied.
std::vector<bool> reuse(const Arrays& inputs, size_t first, Arrays& outputs, WriteMode mode) {
  std::vector<bool> copies;
  for (size_t i = 0; i < outputs.size(); i++) {
    copies.push_back(needs_copy(inputs[first + i], outputs[i], mode));
  }
  return copies;
}

// Buffer copies as a launch does them, before it writes.
template <typename In, typename Out>
void copy_buffers(metal::Encoder& encoder, const std::vector<bool>& copies,
                  const std::vector<int64_t>& bytes, In in, Out out) {
  for (size_t i = 0; i < copies.size(); i++) {
    if (copies[i]) {
      metal::copy_buffer(encoder, in(int(i)), out(int(i)), bytes[i]);
    }
  }
}

std::vector<int64_t> sizes_of(const std::vector<mx::array>& arrays) {
  std::vector<int64_t> bytes;
  for (const auto& a : arrays) {
    bytes.push_back(a.nbytes());
  }
  return bytes;
}

auto write_launch(const Arrays& inputs, const Arrays& outputs, std::vector<bool> copies) {
  const int n = int(outputs.size());
  const auto& pages = inputs[n];
  metal::WritePagesCall call{};
  call.tokens = inputs.back().shape(0);
  call.num_kv_heads = pages.shape(1);
  call.page_size = pages.shape(2);
  call.row = {row_bytes(pages), n > 1 ? row_bytes(inputs[n + 1]) : 0};
  return [call, n, copies, bytes = sizes_of(outputs)](metal::Encoder& encoder, auto in,
                                                      auto out) mutable {
    copy_buffers(encoder, copies, bytes, [&](int i) { return in(n + i); }, out);
    call.k = in(0);
    call.k_pages = out(0);
    call.v = n > 1 ? in(1) : nullptr;
    call.v_pages = n > 1 ? out(1) : nullptr;
    call.slots = in(2 * n);
    metal::write_pages(encoder, call);
  };
}

// Inputs: the tokens of each output, the pages of each output, the slots.
class WritePages : public PagesPrimitive {
 public:
  WritePages(mx::Stream stream, WriteMode mode) : PagesPrimitive(stream), mode_(mode) {}

  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override {
    std::vector<mx::Shape> shapes;
    for (size_t i = inputs.size() / 2; i + 1 < inputs.size(); i++) {
      shapes.push_back(inputs[i].shape());
    }
    return shapes;
  }
  bool is_equivalent(const mx::Primitive& other) const override {
    return mode_ == static_cast<const WritePages&>(other).mode_;
  }
  const char* name() const override {
    return "WritePages";
  }

 protected:
  void eval(const Arrays& inputs, Arrays& outputs) override {
    const size_t n = outputs.size();
    const auto copies = reuse(inputs, n, outputs, mode_);
    if (runs_kernels(stream())) {
      return run_kernels(inputs, outputs, write_launch(inputs, outputs, copies));
    }
    std::vector<BufferCopy> olds;
    std::vector<SlotWriter> writers;
    for (size_t i = 0; i < n; i++) {
      olds.push_back(copy_of(inputs[n + i], outputs[i], copies[i]));
      writers.emplace_back(inputs[i], outputs[i]);
    }
    run_on_cpu(inputs, outputs, [olds, writers, slots = inputs.back().data<int32_t>()]() {
      for (const BufferCopy& old : olds) {
        old.run();
      }
      write_slots("write_pages", "slot_mapping", writers, slots);
    });
  }

 private:
  WriteMode mode_;
};

int64_t page_bytes(const mx::array& pages) {
  return pages.nbytes() / std::max(1, pages.shape(0));
}

auto copy_launch(const Arrays& inputs, const Arrays& outputs, std::vector<bool> copies) {
  metal::CopyPagesCall call{};
  for (const auto& pool : outputs) {
    call.page_bytes.push_back(page_bytes(pool));
  }
  call.num_pairs = inputs.back().shape(0);
  return [call, copies, bytes = sizes_of(outputs)](metal::Encoder& encoder, auto in,
                                                   auto out) mutable {
    copy_buffers(encoder, copies, bytes, in, out);
    for (size_t i = 0; i < bytes.size(); i++) {
      call.pools.push_back(out(int(i)));
    }
    call.pairs = in(int(bytes.size()));
    metal::copy_pages(encoder, call);
  };
}

// Inputs: the old version of each output, the pairs.
class CopyPages : public PagesPrimitive {
 public:
  CopyPages(mx::Stream stream, WriteMode mode) : PagesPrimitive(stream), mode_(mode) {}

  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override {
    std::vector<mx::Shape> shapes;
    for (size_t i = 0; i + 1 < inputs.size(); i++) {
      shapes.push_back(inputs[i].shape());
    }
    return shapes;
  }
  bool is_equivalent(const mx::Primitive& other) const override {
    return mode_ == static_cast<const CopyPages&>(other).mode_;
  }
  const char* name() const override {
    return "CopyPages";
  }

 protected:
  void eval(const Arrays& inputs, Arrays& outputs) override {
    const auto copies = reuse(inputs, 0, outputs, mode_);
    if (runs_kernels(stream())) {
      return run_kernels(inputs, outputs, copy_launch(inputs, outputs, copies));
    }
    std::vector<Pool> pools;
    for (size_t i = 0; i < outputs.size(); i++) {
      const auto old = copy_of(inputs[i], outputs[i], copies[i]);
      pools.push_back({old, outputs[i].data<char>(), page_bytes(outputs[i])});
    }
    const auto& pairs = inputs.back();
    run_on_cpu(inputs, outputs,
               [pools, pairs = pairs.data<int32_t>(), count = pairs.shape(0),
                num_pages = outputs[0].shape(0)]() {
                 for (const Pool& pool : pools) {
                   pool.copy(pairs, count, num_pages);
                 }
               });
  }

 private:
  struct Pool {
    BufferCopy old;
    char* pages;
    int64_t page_bytes;

    void copy(const int32_t* pairs, int count, int num_pages) const {
      old.run();
      for (int i = 0; i < count; i++) {
        const int64_t from = pairs[2 * i], to = pairs[2 * i + 1];
        if (from < 0 || to < 0 || from >= num_pages || to >= num_pages) {
          fail("copy_pages", "pairs must hold page ids in [0, " + std::to_string(num_pages) + ")",
               std::to_string(from) + " -> " + std::to_string(to));
        }
        if (from != to) {
          std::memcpy(pages + to * page_bytes, pages + from * page_bytes, page_bytes);
        }
      }
    }
  };

  WriteMode mode_;
};

} // namespace

int64_t buffer_copies() {
  return g_buffer_copies;
}

std::vector<mx::array> write_pages(const std::vector<mx::array>& tokens,
                                   const std::vector<mx::array>& pages, const mx::array& slots,
                                   WriteMode mode, PageFormats formats, mx::StreamOrDevice s_) {
  const auto s = mx::to_stream(s_);
  ShapeCheck shape("write_pages");
  check_page_shapes("write_pages", shape, pages, formats);
  if (tokens.size() != 2) {
    fail("write_pages", "tokens must hold k and v", std::to_string(tokens.size()) + " arrays");
  }
  const auto &k = tokens[0], &v = tokens[1], &k_pages = pages[0], &v_pages = pages[1];
  shape("k", k, {"tokens", "num_kv_heads", "head_dim"});
  shape("v", v, {"tokens", "num_kv_heads", "v_head_dim"});
  shape("slot_mapping", slots, {"tokens"});
  check_page_dtypes("write_pages", pages, formats);
  check_dtype("write_pages", "k", k, k_pages.dtype(), "the dtype of k_pages");
  check_dtype("write_pages", "v", v, k_pages.dtype(), "the dtype of k_pages");
  check_dtype("write_pages", "slot_mapping", slots, mx::int32, "slot numbers");
  const auto write = std::make_shared<WritePages>(s, mode);
  const auto k_rows = mx::contiguous(k, false, s), v_rows = mx::contiguous(v, false, s);
  const auto k_old = row_contiguous(k_pages, s), v_old = row_contiguous(v_pages, s);
  if (mode == WriteMode::donate) { // outputs of one node hold its inputs: nothing could be donated
    return {mx::array(k_pages.shape(), k_pages.dtype(), write, {k_rows, k_old, slots}),
            mx::array(v_pages.shape(), v_pages.dtype(), write, {v_rows, v_old, slots})};
  }
  return mx::array::make_arrays({k_pages.shape(), v_pages.shape()},
                                {k_pages.dtype(), v_pages.dtype()}, write,
                                {k_rows, v_rows, k_old, v_old, slots});
}

std::vector<mx::array> copy_pages(const std::vector<mx::array>& pools, const mx::array& pairs,
                                  WriteMode mode, mx::StreamOrDevice s_) {
  const auto s = mx::to_stream(s_);
  if (pools.empty()) {
    fail("copy_pages", "pools must hold at least one array", "none");
  }
  if (pairs.ndim() != 2 || pairs.shape(1) != 2) {
    fail("copy_pages", "pairs must have shape [n, 2]", shape_string(pairs));
  }
  check_dtype("copy_pages", "pairs", pairs, mx::int32, "page ids");
  std::vector<mx::Shape> shapes;
  std::vector<mx::Dtype> dtypes;
  for (const auto& pool : pools) {
    if (pool.ndim() < 3 || pool.shape(0) != pools[0].shape(0)) {
      fail("copy_pages",
           "every array of pools must have shape [num_pages, num_kv_heads, ...], num_pages alike",
           shape_string(pool));
    }
    shapes.push_back(pool.shape());
    dtypes.push_back(pool.dtype());
  }
  const auto copy = std::make_shared<CopyPages>(s, mode);
  if (mode == WriteMode::donate) { // as in write_pages
    std::vector<mx::array> copied;
    for (const auto& pool : pools) {
      copied.emplace_back(pool.shape(), pool.dtype(), copy,
                          std::vector<mx::array>{row_contiguous(pool, s), pairs});
    }
    return copied;
  }
  std::vector<mx::array> copied;
  for (size_t first = 0; first < pools.size(); first += kArraysPerNode) {
    const size_t end = std::min(first + kArraysPerNode, pools.size());
    std::vector<mx::array> inputs;
    for (size_t i = first; i < end; i++) {
      inputs.push_back(row_contiguous(pools[i], s));
    }
    inputs.push_back(pairs);
    const auto of_node = [&](const auto& all) {
      return std::vector(all.begin() + first, all.begin() + end);
    };
    const auto outputs =
        mx::array::make_arrays(of_node(shapes), of_node(dtypes), copy, std::move(inputs));
    copied.insert(copied.end(), outputs.begin(), outputs.end());
  }
  return copied;
}

} // namespace paged_mlx
