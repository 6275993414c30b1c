// What host and kernels agree on besides the plan: where an element of a page
// lies, the argument structs, the buffer indices and the function constants.
//
// Included by host C++ and by the Metal sources: ASCII, no std.
#ifndef PAGED_MLX_ARGUMENTS_H
#define PAGED_MLX_ARGUMENTS_H

#include "plan_format.h"

// Function constants of the attention kernels. Macros, since they stand in
// attributes.
#define PAGED_MLX_CONSTANT_WINDOW 0    // bool: rows have a first visible key
#define PAGED_MLX_CONSTANT_SOFTCAP 1   // bool
#define PAGED_MLX_CONSTANT_ALIBI 2     // bool
#define PAGED_MLX_CONSTANT_SINKS 3     // bool
#define PAGED_MLX_CONSTANT_MASK 4      // bool
#define PAGED_MLX_CONSTANT_RAGGED 5    // bool: pages carry their own start and length
#define PAGED_MLX_CONSTANT_PAGE_SIZE 6 // int
#define PAGED_MLX_CONSTANT_MASK_ADDS 7 // bool: the mask is additive, not boolean

// Formats of pages, numbered as PageFormat. Macros, since they decide about parameters.
#define PAGED_MLX_DENSE 0
#define PAGED_MLX_TOKEN8 1
#define PAGED_MLX_TOKEN4 2
#define PAGED_MLX_CHANNEL4 3

// Buffers of the attention kernels.
#define PAGED_MLX_BUFFER_ARGUMENTS 0
#define PAGED_MLX_BUFFER_PLAN 1
#define PAGED_MLX_BUFFER_Q 2
#define PAGED_MLX_BUFFER_K_PAGES 3
#define PAGED_MLX_BUFFER_V_PAGES 4
#define PAGED_MLX_BUFFER_OUT 5
#define PAGED_MLX_BUFFER_LSE 6
#define PAGED_MLX_BUFFER_PARTIAL_OUT 7
#define PAGED_MLX_BUFFER_PARTIAL_STATE 8
#define PAGED_MLX_BUFFER_ALIBI 9
#define PAGED_MLX_BUFFER_SINKS 10
#define PAGED_MLX_BUFFER_MASK 11
#define PAGED_MLX_BUFFER_K_SCALES 12
#define PAGED_MLX_BUFFER_K_BIASES 13
#define PAGED_MLX_BUFFER_V_SCALES 14
#define PAGED_MLX_BUFFER_V_BIASES 15

// Buffers of the kernels that move pages. copy_pages binds up to
// PAGED_MLX_COPY_POOLS pools from PAGED_MLX_BUFFER_POOLS on.
#define PAGED_MLX_BUFFER_SLOTS 1
#define PAGED_MLX_BUFFER_K_TOKENS 2
#define PAGED_MLX_BUFFER_V_TOKENS 5
#define PAGED_MLX_BUFFER_TABLES 1
#define PAGED_MLX_BUFFER_CONTEXT_LENS 2
#define PAGED_MLX_BUFFER_K_OUT 5
#define PAGED_MLX_BUFFER_V_OUT 6
#define PAGED_MLX_BUFFER_PAGE_STARTS 7
#define PAGED_MLX_BUFFER_PAGE_LENS 8
#define PAGED_MLX_BUFFER_OPEN_K 9
#define PAGED_MLX_BUFFER_OPEN_V 10
#define PAGED_MLX_BUFFER_PAIRS 1
#define PAGED_MLX_BUFFER_POOLS 2
#define PAGED_MLX_COPY_POOLS 28

// Buffers of merge_states; up to PAGED_MLX_MERGE_PARTS parts a dispatch.
#define PAGED_MLX_BUFFER_MERGED_OUT 1
#define PAGED_MLX_BUFFER_MERGED_LSE 2
#define PAGED_MLX_BUFFER_PART_OUTS 3
#define PAGED_MLX_BUFFER_PART_LSES 16
#define PAGED_MLX_BUFFER_CARRIED 29
#define PAGED_MLX_MERGE_PARTS 13
#define PAGED_MLX_CONSTANT_HAS_CARRIED 0
#define PAGED_MLX_CONSTANT_IS_LAST 1

namespace paged_mlx {

// Row of a page's slot in a pool [num_pages, num_kv_heads, page_size, D]; the
// slot's elements are [row * D, row * D + D).
static inline long page_row(int page_id, int kv_head, int offset, int num_kv_heads, int page_size) {
  return (long(page_id) * num_kv_heads + kv_head) * page_size + offset;
}

// Channels that share a token's scale; 0: no format of tokens takes this head_dim.
constexpr int group_size(int head_dim) {
  return head_dim % 64 == 0 ? 64 : head_dim % 32 == 0 ? 32 : 0;
}

// Channels that are rotated together; 0: this head_dim cannot be.
constexpr int rotation_size(int head_dim) {
  return (head_dim & (head_dim - 1)) == 0 ? head_dim : head_dim % 64 == 0 ? 64 : 0;
}

// Lanes of the vector body that share the row of a key: so many that a lane's part of
// Q and of the result, over all rows, is 16 elements each where the dims allow.
constexpr int lanes_of_key(int rows, int head_dim, int v_head_dim) {
  const int most = rows * (head_dim > v_head_dim ? head_dim : v_head_dim);
  int lanes = 8;
  while (16 * lanes < most && lanes < 32 && head_dim % (2 * lanes) == 0 &&
         v_head_dim % (2 * lanes) == 0) {
    lanes *= 2;
  }
  return lanes;
}

// Offsets are in words from the start of the plan, those of plan_format.h.
struct AttendArguments {
  long mask_head_stride;  // elements; 0 broadcasts
  long mask_token_stride; // elements; the key position has stride 1
  int items;              // the first item of this dispatch
  int row_tokens, positions, row_ends;
  int pages, page_starts, page_lens;
  int merges, parts;
  int num_merges;
  int num_q_heads, num_kv_heads, gqa_factor;
  int sliding_window;
  float scale;   // of q.k: into base-2 units, or with a softcap into its units
  float softcap; // the cap in base-2 units
};

// Units: what the kernels that move pages move at a time, see page_moves.h.
struct WritePagesArguments {
  int num_kv_heads, page_size;
  int k_row, v_row; // units of one row
};

struct CopyPagesArguments {
  long page_units[PAGED_MLX_COPY_POOLS];
};

struct GatherPagesArguments {
  int max_pages, length, num_kv_heads, page_size;
  int k_row, v_row; // units of one row
};

struct QuantisePagesArguments {
  int num_kv_heads, page_size;
};

struct DequantisePagesArguments {
  GatherPagesArguments gather; // without its rows
  int num_sealed;              // page ids from here on are open pages
};

struct MergeStatesArguments {
  long rows;
  int dim;
  int parts; // of this dispatch
};

} // namespace paged_mlx

#endif
