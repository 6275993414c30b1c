#include "ops/token_rows.h"

#include <cstring>

#include "mlx/allocator.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/ops.h"

#include "ops/dispatch.h"

namespace paged_mlx {

void check_tokens(const char* op, ShapeCheck& shape, const mx::array& k, const mx::array& v,
                  int batch, int tokens) {
  shape("k", k, {"batch", "num_kv_heads", "tokens", "head_dim"});
  shape("v", v, {"batch", "num_kv_heads", "tokens", "v_head_dim"});
  check_float(op, "k", k);
  check_float(op, "v", v);
  if (k.shape(0) != batch || k.shape(2) != tokens) {
    fail(op,
         "k must have " + std::to_string(tokens) + " tokens of " + std::to_string(batch) +
             " sequences",
         shape_string(k));
  }
}

void check_not_traced(const char* op, const char* name, const mx::array& x,
                      const mx::array& pages) {
  if (x.is_tracer() && !pages.is_tracer()) {
    fail(op,
         std::string(name) + " must not be traced by mx.compile, which does not know of the pages",
         "a traced array");
  }
}

TokenRows::TokenRows(const mx::array& x) : data_(x.data<char>()), itemsize_(x.itemsize()) {
  const bool packed = x.ndim() == 3;
  const int token = packed ? 0 : 2, dim = int(x.ndim()) - 1;
  batch_ = packed ? 1 : x.shape(0);
  heads_ = x.shape(1);
  tokens_ = x.shape(token);
  dim_ = x.shape(dim);
  batch_stride_ = packed ? 0 : x.strides(0) * itemsize_;
  head_stride_ = x.strides(1) * itemsize_;
  token_stride_ = x.strides(token) * itemsize_;
  dim_stride_ = x.strides(dim) * itemsize_;
}

void TokenRows::copy(const char* token, int64_t head, char* to) const {
  const char* const row = token + head * head_stride_;
  if (dim_stride_ == itemsize_ || dim_ == 1) {
    std::memcpy(to, row, row_bytes());
    return;
  }
  for (int64_t d = 0; d < dim_; d++) {
    std::memcpy(to + d * itemsize_, row + d * dim_stride_, itemsize_);
  }
}

void TokenRows::copy_all(char* to) const {
  for (int64_t index = 0; index < num_tokens(); index++) {
    for (int64_t head = 0; head < heads_; head++, to += row_bytes()) {
      copy(token(index), head, to);
    }
  }
}

bool is_token_major(const mx::array& x) {
  const auto expected = token_major_strides(x.shape());
  for (int axis = 0; axis < 4; axis++) {
    if (x.shape(axis) > 1 && x.strides(axis) != expected[axis]) {
      return false;
    }
  }
  return true;
}

mx::Strides token_major_strides(const mx::Shape& shape) {
  const int64_t heads = shape[1], tokens = shape[2], dim = shape[3];
  return {tokens * heads * dim, dim, heads * dim, 1};
}

mx::array for_kernels(const mx::array& x, mx::Stream s) {
  if (!runs_kernels(s)) {
    return x;
  }
  if (x.shape(1) == 1 || x.shape(2) == 1) {
    return mx::contiguous(x, false, s);
  }
  return mx::swapaxes(mx::contiguous(mx::swapaxes(x, 1, 2, s), false, s), 1, 2, s);
}

mx::array token_major(const mx::array& x, mx::Stream s) {
  if (is_token_major(x)) {
    return x;
  }
  const mx::Shape shape = {x.shape(0), x.shape(2), x.shape(1), x.shape(3)};
  mx::array copy(mx::allocator::malloc(x.nbytes()), shape, x.dtype());
  auto& encoder = mx::cpu::get_command_encoder(s);
  encoder.dispatch([rows = TokenRows(x), to = copy.data<char>()]() { rows.copy_all(to); });
  encoder.add_temporary(copy);
  return copy;
}

} // namespace paged_mlx
