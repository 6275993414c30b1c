#include "ops/pages.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "mlx/allocator.h"
#include "mlx/ops.h"

#include "arguments.h"
#include "cpu/dispatch.h"
#include "metal/launch.h"
#include "ops/dtypes.h"
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

// K or V as a node writes it; where its arrays are follows from the sides before it.
struct WrittenSide {
  PageFormat format;
  bool rotated;

  bool operator==(const WrittenSide&) const = default;
};

// Inputs: the tokens of each side, the arrays of each side, the slots.
class WritePages : public PagesPrimitive {
 public:
  WritePages(mx::Stream stream, WriteMode mode, std::vector<WrittenSide> sides, PageFormats formats)
      : PagesPrimitive(stream), mode_(mode), sides_(std::move(sides)), formats_(formats) {}

  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override {
    std::vector<mx::Shape> shapes;
    for (size_t i = sides_.size(); i + 1 < inputs.size(); i++) {
      shapes.push_back(inputs[i].shape());
    }
    return shapes;
  }
  bool is_equivalent(const mx::Primitive& other) const override {
    const auto& node = static_cast<const WritePages&>(other);
    return mode_ == node.mode_ && sides_ == node.sides_ && formats_ == node.formats_;
  }
  const char* name() const override {
    return "WritePages";
  }

 private:
  auto launch(const Arrays& inputs, const Arrays& outputs, std::vector<bool> copies) const {
    const int n = int(sides_.size());
    const auto& pages = inputs[n];
    metal::WritePagesCall call{};
    call.tokens = inputs.back().shape(0);
    call.num_kv_heads = pages.shape(1);
    call.page_size = pages.shape(2);
    call.row = {row_bytes(pages), n > 1 ? row_bytes(inputs[n + 1]) : 0};
    call.dtype = cpu_dtype(inputs[0].dtype());
    call.head_dim = inputs[0].shape(2);
    call.v_head_dim = n > 1 ? inputs[1].shape(2) : 0;
    const PageFormats written{sides_[0].format, n > 1 ? sides_[1].format : PageFormat::dense};
    return [call, n, layer = LayerArrays{written, 0, 0}, formats = formats_, copies,
            bytes = sizes_of(outputs)](metal::Encoder& encoder, auto in, auto out) mutable {
      copy_buffers(encoder, copies, bytes, [&](int i) { return in(n + i); }, out);
      call.k = in(0);
      call.v = n > 1 ? in(1) : nullptr;
      layer.bind(call, [&](int i) { return i < int(bytes.size()) ? out(i) : nullptr; });
      call.formats = formats;
      call.slots = in(n + int(bytes.size()));
      metal::write_pages(encoder, call);
    };
  }

 protected:
  void eval(const Arrays& inputs, Arrays& outputs) override {
    const size_t n = sides_.size();
    const auto copies = reuse(inputs, n, outputs, mode_);
    if (runs_kernels(stream())) {
      return run_kernels(inputs, outputs, launch(inputs, outputs, copies));
    }
    std::vector<BufferCopy> olds;
    for (size_t i = 0; i < outputs.size(); i++) {
      olds.push_back(copy_of(inputs[n + i], outputs[i], copies[i]));
    }
    std::vector<SlotWriter> writers;
    const mx::array* arrays = outputs.data();
    for (size_t i = 0; i < n; i++) {
      const WrittenSide& side = sides_[i];
      writers.emplace_back(inputs[i],
                           page_side(arrays, side.format, inputs[i].shape(2), side.rotated));
      arrays += num_arrays(side.format);
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
  std::vector<WrittenSide> sides_;
  PageFormats formats_; // of the layer
};

// Pages to quantise as a whole, and where they go.
struct Sealing {
  const char *k, *v; // [num_sources, num_kv_heads, page_size, D]
  cpu::PageSide k_side, v_side;
  const int32_t* pairs;
  int num_pairs, num_sources, num_kv_heads;

  void run() const {
    for (int i = 0; i < num_pairs; i++) {
      const int source = pairs[3 * i], target = pairs[3 * i + 1], tokens = pairs[3 * i + 2];
      if (source < 0 || source >= num_sources || target < 0 || target >= k_side.num_pages ||
          tokens < 0 || tokens > k_side.page_size) {
        fail(
            "seal_pages",
            "pairs must name a page of the sources, one of the pages, and at most page_size "
            "tokens",
            std::to_string(source) + ", " + std::to_string(target) + ", " + std::to_string(tokens));
      }
      for (int head = 0; head < num_kv_heads; head++) {
        seal(page_row(source, head, 0, num_kv_heads, k_side.page_size),
             page_row(target, head, 0, num_kv_heads, k_side.page_size), tokens);
      }
    }
  }

 private:
  void seal(int64_t from, int64_t to, int tokens) const {
    const int64_t itemsize = k_side.dtype == cpu::DType::float32 ? 4 : 2;
    cpu::kernels().seal_channels(k_side, to, k + from * k_side.dim * itemsize, tokens);
    for (int t = 0; t < tokens; t++) {
      cpu::kernels().write_row(v_side, to + t, v + (from + t) * v_side.dim * itemsize);
    }
  }
};

// Inputs: K's and V's pages to seal, the layer's arrays, the pairs.
class SealPages : public PagesPrimitive {
 public:
  SealPages(mx::Stream stream, LayerArrays layer, bool rotated)
      : PagesPrimitive(stream), layer_(layer), rotated_(rotated) {}

  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override {
    std::vector<mx::Shape> shapes;
    for (int i = 0; i < layer_.count(); i++) {
      shapes.push_back(inputs[layer_.first + i].shape());
    }
    return shapes;
  }
  bool is_equivalent(const mx::Primitive& other) const override {
    const auto& node = static_cast<const SealPages&>(other);
    return layer_ == node.layer_ && rotated_ == node.rotated_;
  }
  const char* name() const override {
    return "SealPages";
  }

 private:
  auto launch(const Arrays& inputs) const {
    metal::SealPagesCall call{};
    call.rotated = rotated_;
    call.num_pairs = inputs.back().shape(0);
    call.num_kv_heads = inputs[0].shape(1);
    call.page_size = inputs[0].shape(2);
    call.dtype = cpu_dtype(inputs[0].dtype());
    call.head_dim = layer_.head_dim;
    call.v_head_dim = layer_.v_head_dim;
    const LayerArrays of_outputs{layer_.formats, layer_.head_dim, layer_.v_head_dim};
    return [call, of_outputs, pairs = int(inputs.size()) - 1](metal::Encoder& encoder, auto in,
                                                              auto out) mutable {
      call.k = in(0);
      call.v = in(1);
      call.pairs = in(pairs);
      of_outputs.bind(call, out);
      metal::seal_pages(encoder, call);
    };
  }

 protected:
  void eval(const Arrays& inputs, Arrays& outputs) override {
    for (size_t i = 0; i < outputs.size(); i++) {
      outputs[i].copy_shared_buffer(inputs[layer_.first + i]);
    }
    if (runs_kernels(stream())) {
      return run_kernels(inputs, outputs, launch(inputs));
    }
    Sealing sealing{};
    sealing.k = inputs[0].data<char>();
    sealing.v = inputs[1].data<char>();
    sealing.k_side = layer_.k_side(inputs);
    sealing.v_side = layer_.v_side(inputs);
    sealing.v_side.rotated &= !rotated_;
    sealing.pairs = inputs.back().data<int32_t>();
    sealing.num_pairs = inputs.back().shape(0);
    sealing.num_sources = inputs[0].shape(0);
    sealing.num_kv_heads = inputs[0].shape(1);
    run_on_cpu(inputs, outputs, [sealing]() { sealing.run(); });
  }

 private:
  LayerArrays layer_; // of the inputs
  bool rotated_;
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
  const auto &k = tokens[0], &v = tokens[1];
  shape("k", k, {"tokens", "num_kv_heads", "head_dim"});
  shape("v", v, {"tokens", "num_kv_heads", "v_head_dim"});
  shape("slot_mapping", slots, {"tokens"});
  const mx::Dtype dtype = check_page_dtypes("write_pages", pages, formats);
  check_dtype("write_pages", "k", k, dtype, "the dtype of k_pages");
  check_dtype("write_pages", "v", v, dtype, "the dtype of k_pages");
  check_dtype("write_pages", "slot_mapping", slots, mx::int32, "slot numbers");
  const bool opens = formats.has_open_pages();
  const std::vector<WrittenSide> sides = {
      {opens ? PageFormat::dense : formats.k, false},
      {opens ? PageFormat::dense : formats.v, formats.rotates()}};
  const LayerArrays layer{formats, 0, 0};
  size_t first = opens ? layer.open_k() : 0; // of the arrays that are written
  std::vector<mx::array> next = pages;
  auto write = [&](std::vector<WrittenSide> written, std::vector<mx::array> inputs) {
    std::vector<mx::Shape> shapes;
    std::vector<mx::Dtype> dtypes;
    size_t count = 0;
    for (const WrittenSide& side : written) {
      count += num_arrays(side.format);
    }
    for (size_t i = first; i < first + count; i++) {
      inputs.push_back(row_contiguous(pages[i], s));
      shapes.push_back(pages[i].shape());
      dtypes.push_back(pages[i].dtype());
    }
    inputs.push_back(row_contiguous(slots, s));
    const auto node = std::make_shared<WritePages>(s, mode, std::move(written), formats);
    const auto made = mx::array::make_arrays(std::move(shapes), dtypes, node, std::move(inputs));
    std::copy(made.begin(), made.end(), next.begin() + first);
    first += count;
  };
  const auto k_rows = mx::contiguous(k, false, s), v_rows = mx::contiguous(v, false, s);
  if (mode == WriteMode::donate &&
      formats.dense()) { // outputs of one node hold its inputs: nothing could be donated
    write({sides[0]}, {k_rows});
    write({sides[1]}, {v_rows});
  } else {
    write(sides, {k_rows, v_rows});
  }
  return next;
}

std::vector<std::vector<mx::array>> seal_pages(const std::vector<mx::array>& sources,
                                               const std::vector<std::vector<mx::array>>& pages,
                                               const mx::array& pairs, PageFormats formats,
                                               bool rotated, mx::StreamOrDevice s_) {
  constexpr const char* kOp = "seal_pages";
  const auto s = mx::to_stream(s_);
  if (!formats.has_open_pages()) {
    fail(kOp, "formats must have q4 for K, whose pages are sealed", "others");
  }
  if (sources.size() != 2 * pages.size()) {
    fail(kOp, "sources must hold K and V of each layer of pages",
         std::to_string(sources.size()) + " arrays of " + std::to_string(pages.size()) + " layers");
  }
  if (pairs.ndim() != 2 || pairs.shape(1) != 3) {
    fail(kOp, "pairs must have shape [n, 3]", shape_string(pairs));
  }
  check_dtype(kOp, "pairs", pairs, mx::int32, "page ids");
  std::vector<std::vector<mx::array>> next;
  for (size_t i = 0; i < pages.size(); i++) {
    ShapeCheck shape(kOp);
    check_page_shapes(kOp, shape, pages[i], formats);
    const mx::Dtype dtype = check_page_dtypes(kOp, pages[i], formats);
    std::vector<mx::array> inputs = {row_contiguous(sources[2 * i], s),
                                     row_contiguous(sources[2 * i + 1], s)};
    shape("sources' k", inputs[0], {"num_sources", "num_kv_heads", "page_size", "head_dim"});
    shape("sources' v", inputs[1], {"num_sources", "num_kv_heads", "page_size", "v_head_dim"});
    check_dtype(kOp, "sources' k", inputs[0], dtype, "the dtype of the pages");
    check_dtype(kOp, "sources' v", inputs[1], dtype, "the dtype of the pages");
    std::vector<mx::Dtype> dtypes;
    for (const mx::array& array : pages[i]) {
      inputs.push_back(row_contiguous(array, s));
      dtypes.push_back(array.dtype());
    }
    inputs.push_back(row_contiguous(pairs, s));
    const LayerArrays layer{formats, shape.at("head_dim"), shape.at("v_head_dim"), 2};
    const auto node = std::make_shared<SealPages>(s, layer, rotated);
    auto shapes = node->output_shapes(inputs);
    next.push_back(mx::array::make_arrays(std::move(shapes), dtypes, node, std::move(inputs)));
  }
  return next;
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
  const mx::array rows = row_contiguous(pairs, s);
  if (mode == WriteMode::donate) { // as in write_pages
    std::vector<mx::array> copied;
    for (const auto& pool : pools) {
      copied.emplace_back(pool.shape(), pool.dtype(), copy,
                          std::vector<mx::array>{row_contiguous(pool, s), rows});
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
    inputs.push_back(rows);
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
