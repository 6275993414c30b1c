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

// Arrays of a pool that one node copies pages in. Outputs of a node know each other, so
// one node for all layers would cost the square of their number.
constexpr size_t kArraysPerNode = 8;

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

void WritePages::eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  const auto copies = reuse(inputs, outputs.size(), outputs, mode_);
  dispatch_on_gpu("write_pages", stream(), inputs, outputs, write_launch(inputs, outputs, copies));
}

void CopyPages::eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  const auto copies = reuse(inputs, 0, outputs, mode_);
  dispatch_on_gpu("copy_pages", stream(), inputs, outputs, copy_launch(inputs, outputs, copies));
}

} // namespace paged_mlx
