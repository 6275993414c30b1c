#include "ops/pages.h"

#include <algorithm>
#include <cstring>

#include "mlx/backend/cpu/encoder.h"
#include "mlx/ops.h"

#include "metal/launch.h"
#include "ops/launch.h"
#include "shape_check.h"

namespace paged_mlx {

namespace {

// One token's K or V goes to its slot, head by head.
struct TokenWriter {
  const char* tokens;
  char* pages;
  int64_t num_kv_heads, page_size, row_bytes;

  void operator()(int64_t token, int64_t slot) const {
    const int64_t page = slot / page_size, offset = slot % page_size;
    for (int64_t h = 0; h < num_kv_heads; h++) {
      std::memcpy(
          pages + ((page * num_kv_heads + h) * page_size + offset) * row_bytes,
          tokens + (token * num_kv_heads + h) * row_bytes,
          row_bytes);
    }
  }
};

TokenWriter token_writer(const mx::array& tokens, mx::array& pages) {
  return {
      tokens.data<char>(),
      pages.data<char>(),
      pages.shape(1),
      pages.shape(2),
      int64_t(pages.shape(3)) * int64_t(pages.itemsize())};
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
std::vector<bool> reuse(
    const std::vector<mx::array>& inputs,
    size_t first,
    std::vector<mx::array>& outputs,
    WriteMode mode) {
  std::vector<bool> copies;
  for (size_t i = 0; i < outputs.size(); i++) {
    copies.push_back(needs_copy(inputs[first + i], outputs[i], mode));
  }
  return copies;
}

// Buffer copies as a launch does them, before it writes.
template <typename In, typename Out>
void copy_buffers(
    metal::Encoder& encoder,
    const std::vector<bool>& copies,
    const std::vector<int64_t>& bytes,
    In in,
    Out out) {
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

int row_bytes(const mx::array& pages) {
  return pages.shape(3) * int(pages.itemsize());
}

auto write_launch(
    const std::vector<mx::array>& inputs,
    const std::vector<mx::array>& outputs,
    std::vector<bool> copies) {
  const int n = int(outputs.size());
  const auto& pages = inputs[n];
  metal::WritePagesCall call{};
  call.tokens = inputs.back().shape(0);
  call.num_kv_heads = pages.shape(1);
  call.page_size = pages.shape(2);
  call.row = {row_bytes(pages), n > 1 ? row_bytes(inputs[n + 1]) : 0};
  return [call, n, copies, bytes = sizes_of(outputs)](
             metal::Encoder& encoder, auto in, auto out) mutable {
    copy_buffers(encoder, copies, bytes, [&](int i) { return in(n + i); }, out);
    call.k = in(0);
    call.k_pages = out(0);
    call.v = n > 1 ? in(1) : nullptr;
    call.v_pages = n > 1 ? out(1) : nullptr;
    call.slots = in(2 * n);
    metal::write_pages(encoder, call);
  };
}

auto copy_launch(
    const std::vector<mx::array>& inputs,
    const std::vector<mx::array>& outputs,
    std::vector<bool> copies) {
  metal::CopyPagesCall call{};
  for (const auto& pool : outputs) {
    call.page_bytes.push_back(pool.nbytes() / std::max(1, pool.shape(0)));
  }
  call.num_pairs = inputs.back().shape(0);
  return [call, copies, bytes = sizes_of(outputs)](
             metal::Encoder& encoder, auto in, auto out) mutable {
    copy_buffers(encoder, copies, bytes, in, out);
    for (size_t i = 0; i < bytes.size(); i++) {
      call.pools.push_back(out(int(i)));
    }
    call.pairs = in(int(bytes.size()));
    metal::copy_pages(encoder, call);
  };
}

auto gather_launch(const std::vector<mx::array>& inputs, int length) {
  metal::GatherPagesCall call{};
  call.batch = inputs[2].shape(0);
  call.max_pages = inputs[2].shape(1);
  call.length = length;
  call.num_kv_heads = inputs[0].shape(1);
  call.page_size = inputs[0].shape(2);
  call.row = {row_bytes(inputs[0]), row_bytes(inputs[1])};
  return [call, ragged = inputs.size() > 4](metal::Encoder& encoder, auto in, auto out) mutable {
    call.k_pages = in(0);
    call.v_pages = in(1);
    call.tables = in(2);
    call.context_lens = in(3);
    call.page_starts = ragged ? in(4) : nullptr;
    call.page_lens = ragged ? in(5) : nullptr;
    call.k_out = out(0);
    call.v_out = out(1);
    metal::gather_pages(encoder, call);
  };
}

// Copies the runs of one sequence that lie in pages, and zeroes the rest.
struct GatherRow {
  const int32_t *table, *starts, *lens; // starts and lens may be null
  int max_pages, context_len, length;
  int64_t num_kv_heads, page_size;

  void operator()(const char* pages, char* out, int64_t row_bytes) const {
    std::memset(out, 0, num_kv_heads * length * row_bytes);
    const int end = std::min(context_len, length);
    int start = 0;
    for (int e = 0; e < max_pages && start < end; e++) {
      start = starts ? starts[e] : int(e * page_size);
      const int count = std::min(lens ? lens[e] : int(page_size), end - start);
      if (count > 0 && table[e] >= 0) {
        copy_run(pages + table[e] * num_kv_heads * page_size * row_bytes, out, start, count, row_bytes);
      }
      start += std::max(0, count);
    }
  }

  void copy_run(const char* page, char* out, int64_t start, int64_t count, int64_t row_bytes) const {
    for (int64_t h = 0; h < num_kv_heads; h++) {
      std::memcpy(
          out + (h * length + start) * row_bytes, page + h * page_size * row_bytes, count * row_bytes);
    }
  }
};

} // namespace

std::vector<mx::array> write_pages(
    const mx::array& k,
    const mx::array& v,
    const mx::array& k_pages,
    const mx::array& v_pages,
    const mx::array& slots,
    WriteMode mode,
    mx::StreamOrDevice s_) {
  const auto s = mx::to_stream(s_);
  ShapeCheck shape("write_pages");
  shape("k_pages", k_pages, {"num_pages", "num_kv_heads", "page_size", "head_dim"});
  shape("v_pages", v_pages, {"num_pages", "num_kv_heads", "page_size", "v_head_dim"});
  shape("k", k, {"tokens", "num_kv_heads", "head_dim"});
  shape("v", v, {"tokens", "num_kv_heads", "v_head_dim"});
  shape("slot_mapping", slots, {"tokens"});
  check_float("write_pages", "k_pages", k_pages);
  check_dtype("write_pages", "v_pages", v_pages, k_pages.dtype(), "the dtype of k_pages");
  check_dtype("write_pages", "k", k, k_pages.dtype(), "the dtype of k_pages");
  check_dtype("write_pages", "v", v, k_pages.dtype(), "the dtype of k_pages");
  check_dtype("write_pages", "slot_mapping", slots, mx::int32, "slot numbers");
  const auto write = std::make_shared<WritePages>(s, mode);
  const auto k_rows = mx::contiguous(k, false, s), v_rows = mx::contiguous(v, false, s);
  const auto k_old = row_contiguous(k_pages, s), v_old = row_contiguous(v_pages, s);
  if (mode == WriteMode::donate) { // outputs of one node hold its inputs: nothing could be donated
    return {
        mx::array(k_pages.shape(), k_pages.dtype(), write, {k_rows, k_old, slots}),
        mx::array(v_pages.shape(), v_pages.dtype(), write, {v_rows, v_old, slots})};
  }
  return mx::array::make_arrays(
      {k_pages.shape(), v_pages.shape()},
      {k_pages.dtype(), v_pages.dtype()},
      write,
      {k_rows, v_rows, k_old, v_old, slots});
}

std::vector<mx::Shape> WritePages::output_shapes(const std::vector<mx::array>& inputs) {
  std::vector<mx::Shape> shapes;
  for (size_t i = inputs.size() / 2; i + 1 < inputs.size(); i++) {
    shapes.push_back(inputs[i].shape());
  }
  return shapes;
}

// Inputs: the tokens of each output, the pages of each output, the slots.
void WritePages::eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  struct Target {
    BufferCopy old;
    TokenWriter write;
  };
  const auto copies = reuse(inputs, outputs.size(), outputs, mode_);
  if (host_launch(stream())) {
    return dispatch_on_host(stream(), inputs, outputs, write_launch(inputs, outputs, copies));
  }
  const auto& slots = inputs.back();
  auto& encoder = mx::cpu::get_command_encoder(stream());
  std::vector<Target> targets;
  for (size_t i = 0; i < outputs.size(); i++) {
    const auto old = copy_of(inputs[outputs.size() + i], outputs[i], copies[i]);
    targets.push_back({old, token_writer(inputs[i], outputs[i])});
    encoder.set_output_array(outputs[i]);
  }
  for (const auto& input : inputs) {
    encoder.set_input_array(input);
  }
  encoder.dispatch([targets,
                    slots = slots.data<int32_t>(),
                    tokens = int64_t(slots.size()),
                    num_slots = int64_t(outputs[0].shape(0)) * outputs[0].shape(2)]() {
    for (const Target& target : targets) {
      target.old.run();
    }
    for (int64_t t = 0; t < tokens; t++) {
      if (slots[t] >= num_slots) {
        fail(
            "write_pages",
            "slot_mapping must be less than num_pages * page_size = " + std::to_string(num_slots),
            std::to_string(slots[t]));
      }
      if (slots[t] < 0) {
        continue;
      }
      for (const Target& target : targets) {
        target.write(t, slots[t]);
      }
    }
  });
}

std::vector<mx::array> copy_pages(
    const std::vector<mx::array>& pools,
    const mx::array& pairs,
    WriteMode mode,
    mx::StreamOrDevice s_) {
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
    if (pool.ndim() != 4 || pool.shape(0) != pools[0].shape(0)) {
      fail(
          "copy_pages",
          "every array of pools must have shape [num_pages, num_kv_heads, page_size, head_dim], "
          "num_pages alike",
          shape_string(pool));
    }
    shapes.push_back(pool.shape());
    dtypes.push_back(pool.dtype());
  }
  const auto copy = std::make_shared<CopyPages>(s, mode);
  if (mode == WriteMode::donate) { // as in write_pages
    std::vector<mx::array> copied;
    for (const auto& pool : pools) {
      copied.emplace_back(
          pool.shape(), pool.dtype(), copy, std::vector<mx::array>{row_contiguous(pool, s), pairs});
    }
    return copied;
  }
  std::vector<mx::array> inputs;
  for (const auto& pool : pools) {
    inputs.push_back(row_contiguous(pool, s));
  }
  inputs.push_back(pairs);
  return mx::array::make_arrays(std::move(shapes), dtypes, copy, std::move(inputs));
}

std::vector<mx::Shape> CopyPages::output_shapes(const std::vector<mx::array>& inputs) {
  std::vector<mx::Shape> shapes;
  for (size_t i = 0; i + 1 < inputs.size(); i++) {
    shapes.push_back(inputs[i].shape());
  }
  return shapes;
}

void CopyPages::eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  struct Pool {
    BufferCopy old;
    char* pages;
    int64_t page_bytes;
  };
  const auto copies = reuse(inputs, 0, outputs, mode_);
  if (host_launch(stream())) {
    return dispatch_on_host(stream(), inputs, outputs, copy_launch(inputs, outputs, copies));
  }
  auto& encoder = mx::cpu::get_command_encoder(stream());
  std::vector<Pool> pools;
  for (size_t i = 0; i < outputs.size(); i++) {
    const auto old = copy_of(inputs[i], outputs[i], copies[i]);
    encoder.set_input_array(inputs[i]);
    encoder.set_output_array(outputs[i]);
    const int64_t page_bytes = outputs[i].nbytes() / std::max(1, outputs[i].shape(0));
    pools.push_back({old, outputs[i].data<char>(), page_bytes});
  }
  const auto& pairs = inputs.back();
  encoder.set_input_array(pairs);
  encoder.dispatch([pools,
                    pairs = pairs.data<int32_t>(),
                    count = pairs.shape(0),
                    num_pages = outputs[0].shape(0)]() {
    for (const Pool& pool : pools) {
      pool.old.run();
      for (int i = 0; i < count; i++) {
        const int64_t from = pairs[2 * i], to = pairs[2 * i + 1];
        if (from < 0 || to < 0 || from >= num_pages || to >= num_pages) {
          fail(
              "copy_pages",
              "pairs must hold page ids in [0, " + std::to_string(num_pages) + ")",
              std::to_string(from) + " -> " + std::to_string(to));
        }
        if (from != to) {
          std::memcpy(
              pool.pages + to * pool.page_bytes,
              pool.pages + from * pool.page_bytes,
              pool.page_bytes);
        }
      }
    }
  });
}

std::vector<mx::array> gather_pages(
    const mx::array& k_pages,
    const mx::array& v_pages,
    const mx::array& block_tables,
    const mx::array& context_lens,
    int length,
    const std::optional<mx::array>& page_starts,
    const std::optional<mx::array>& page_lens,
    mx::StreamOrDevice s_) {
  const auto s = mx::to_stream(s_);
  ShapeCheck shape("gather_pages");
  shape("k_pages", k_pages, {"num_pages", "num_kv_heads", "page_size", "head_dim"});
  shape("v_pages", v_pages, {"num_pages", "num_kv_heads", "page_size", "v_head_dim"});
  shape("block_tables", block_tables, {"batch", "max_pages"});
  shape("context_lens", context_lens, {"batch"});
  check_float("gather_pages", "k_pages", k_pages);
  check_dtype("gather_pages", "v_pages", v_pages, k_pages.dtype(), "the dtype of k_pages");
  check_dtype("gather_pages", "block_tables", block_tables, mx::int32, "page ids");
  check_dtype("gather_pages", "context_lens", context_lens, mx::int32, "lengths");
  std::vector<mx::array> inputs = {
      row_contiguous(k_pages, s), row_contiguous(v_pages, s), block_tables, context_lens};
  if (page_starts && page_lens) {
    shape("page_starts", *page_starts, {"batch", "max_pages"});
    shape("page_lens", *page_lens, {"batch", "max_pages"});
    inputs.push_back(*page_starts);
    inputs.push_back(*page_lens);
  }
  auto primitive = std::make_shared<GatherPages>(s, length);
  auto shapes = primitive->output_shapes(inputs);
  return mx::array::make_arrays(
      std::move(shapes),
      std::vector<mx::Dtype>(4, k_pages.dtype()),
      primitive,
      std::move(inputs));
}

std::vector<mx::Shape> GatherPages::output_shapes(const std::vector<mx::array>& inputs) {
  const auto &k = inputs[0], &v = inputs[1];
  const int batch = inputs[2].shape(0);
  return {
      {batch, k.shape(1), length_, k.shape(3)},
      {batch, v.shape(1), length_, v.shape(3)},
      k.shape(),
      v.shape()};
}

void GatherPages::allocate(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) const {
  outputs[0].set_data(mx::allocator::malloc(outputs[0].nbytes()));
  outputs[1].set_data(mx::allocator::malloc(outputs[1].nbytes()));
  outputs[2].copy_shared_buffer(inputs[0]);
  outputs[3].copy_shared_buffer(inputs[1]);
}

void GatherPages::eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  allocate(inputs, outputs);
  if (host_launch(stream())) {
    return dispatch_on_host(stream(), inputs, outputs, gather_launch(inputs, length_));
  }
  auto& encoder = mx::cpu::get_command_encoder(stream());
  for (const auto& input : inputs) {
    encoder.set_input_array(input);
  }
  encoder.set_output_array(outputs[0]);
  encoder.set_output_array(outputs[1]);
  const bool ragged = inputs.size() > 4;
  encoder.dispatch([k = inputs[0].data<char>(),
                    v = inputs[1].data<char>(),
                    tables = inputs[2].data<int32_t>(),
                    lens = inputs[3].data<int32_t>(),
                    page_starts = ragged ? inputs[4].data<int32_t>() : nullptr,
                    page_lens = ragged ? inputs[5].data<int32_t>() : nullptr,
                    k_out = outputs[0].data<char>(),
                    v_out = outputs[1].data<char>(),
                    batch = inputs[2].shape(0),
                    max_pages = inputs[2].shape(1),
                    length = length_,
                    heads = int64_t(inputs[0].shape(1)),
                    page_size = int64_t(inputs[0].shape(2)),
                    k_row = int64_t(row_bytes(inputs[0])),
                    v_row = int64_t(row_bytes(inputs[1]))]() {
    for (int64_t b = 0; b < batch; b++) {
      const int64_t at = b * max_pages;
      const GatherRow row{
          tables + at,
          page_starts ? page_starts + at : nullptr,
          page_lens ? page_lens + at : nullptr,
          max_pages,
          lens[b],
          length,
          heads,
          page_size};
      row(k, k_out + b * heads * length * k_row, k_row);
      row(v, v_out + b * heads * length * v_row, v_row);
    }
  });
}

void WritePages::eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  const auto copies = reuse(inputs, outputs.size(), outputs, mode_);
  dispatch_on_gpu("write_pages", stream(), inputs, outputs, write_launch(inputs, outputs, copies));
}

void CopyPages::eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  const auto copies = reuse(inputs, 0, outputs, mode_);
  dispatch_on_gpu("copy_pages", stream(), inputs, outputs, copy_launch(inputs, outputs, copies));
}

void GatherPages::eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  allocate(inputs, outputs);
  dispatch_on_gpu("gather_pages", stream(), inputs, outputs, gather_launch(inputs, length_));
}

} // namespace paged_mlx
