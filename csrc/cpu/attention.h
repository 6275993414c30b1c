// Paged attention on the CPU: runs the items and merges of a plan.
//
// No MLX in here: raw pointers in, raw pointers out. The caller has validated
// every shape and every page id; these functions only compute.
#pragma once

#include <cstdint>

#include "attention_options.h"
#include "cpu/page_side.h"

namespace paged_mlx::cpu {

// A mask over (query head, query token, key position), of the kind that the options name.
// A stride of 0 broadcasts.
struct Mask {
  const void* data = nullptr;
  int64_t head_stride = 0;  // elements
  int64_t token_stride = 0; // elements; the key position has stride 1
};

struct AttentionArgs {
  DType dtype;     // of q, of dense pages and of out
  const void* q;   // [tokens, num_q_heads, head_dim]
  PageSide k, v;   // [num_pages, num_kv_heads, page_size, head_dim or v_head_dim]
  PageSide open_k; // the same of open pages, if the formats have them: dense
  PageSide open_v;
  const int32_t* plan; // kernels/plan_format.h; holds heads, page size, window
  void* out;           // [tokens, num_q_heads, v_head_dim]
  float* lse;          // [tokens, num_q_heads], natural log, or null

  AttentionOptions options;
  const float* alibi_slopes; // [num_q_heads], if the options have them
  const float* sinks;        // [num_q_heads], if the options have them
  Mask mask;
};

// Attend every row of the plan. A row that sees no key gets out 0, lse -inf,
// sinks or not. Otherwise lse is the log of the softmax denominator, the sink
// included.
void attend(const AttentionArgs& args);

// Threads that attend() may use, the caller included. At least 1.
void set_num_threads(int n);
int num_threads();

} // namespace paged_mlx::cpu
