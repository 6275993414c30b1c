// Tokens as models hand them over: [batch, heads, tokens, dim], any strides.
#pragma once

#include <cstdint>

#include "mlx/array.h"
#include "mlx/utils.h"

#include "shape_check.h"

namespace paged_mlx {

// Checks the K and V of batch * tokens new tokens against pages that `shape` knows.
void check_tokens(const char* op, ShapeCheck& shape, const mx::array& k, const mx::array& v,
                  int batch, int tokens);

// Refuses an array of a function that mx.compile traces, for pages that the
// trace does not know of: what it captures stays in them.
void check_not_traced(const char* op, const char* name, const mx::array& x, const mx::array& pages);

// The rows of such an array, or of [tokens, heads, dim]: one token of one head is
// `row_bytes` bytes.
class TokenRows {
 public:
  explicit TokenRows(const mx::array& x);

  // Where token `index` of batch * tokens begins.
  const char* token(int64_t index) const {
    return data_ + index / tokens_ * batch_stride_ + index % tokens_ * token_stride_;
  }

  // The row of a head of such a token.
  void copy(const char* token, int64_t head, char* to) const;

  // All rows, each token's heads one after the other: [batch * tokens, heads, dim].
  void copy_all(char* to) const;

  int64_t num_tokens() const {
    return batch_ * tokens_;
  }
  int64_t num_heads() const {
    return heads_;
  }
  int64_t row_bytes() const {
    return dim_ * itemsize_;
  }

 private:
  const char* data_;
  int64_t batch_, heads_, tokens_, dim_, itemsize_;
  int64_t batch_stride_, head_stride_, token_stride_, dim_stride_; // bytes
};

// Whether x [batch, heads, tokens, dim] lies in memory as [batch * tokens, heads,
// dim] does. x must be evaluated.
bool is_token_major(const mx::array& x);

// x [batch, heads, tokens, dim] with the strides of token-major memory, for out.
mx::Strides token_major_strides(const mx::Shape& shape);

// x as the operation's node takes it: token-major where Metal kernels will read
// it, as it is where the CPU code will, which reads any strides.
mx::array for_kernels(const mx::array& x, mx::Stream s);

// x, or its memory in token-major order, [batch, tokens, heads, dim], that a task
// on the stream fills. For eval_cpu.
mx::array token_major(const mx::array& x, mx::Stream s);

} // namespace paged_mlx
