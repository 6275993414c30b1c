// New tokens' K and V go to their slots, both in one dispatch.
//
//   slots            [tokens]                                     int32, -1 skips
//   k_tokens         [tokens, num_kv_heads, D]
//   v_tokens         [tokens, num_kv_heads, DV]
//   k_pages, v_pages [num_pages, num_kv_heads, page_size, D or DV]
//
// Grid: x over the units of a token's K and V, in threads; y over tokens.

#include "page_moves.h"

using namespace paged_mlx;

[[kernel]] void write_pages(constant WritePagesArguments& arguments
                            [[buffer(PAGED_MLX_BUFFER_ARGUMENTS)]],
                            const device int* slots [[buffer(PAGED_MLX_BUFFER_SLOTS)]],
                            const device Unit* k_tokens [[buffer(PAGED_MLX_BUFFER_K_TOKENS)]],
                            device Unit* k_pages [[buffer(PAGED_MLX_BUFFER_K_PAGES)]],
                            device Unit* v_pages [[buffer(PAGED_MLX_BUFFER_V_PAGES)]],
                            const device Unit* v_tokens [[buffer(PAGED_MLX_BUFFER_V_TOKENS)]],
                            uint3 group [[threadgroup_position_in_grid]],
                            uint3 size [[threads_per_threadgroup]],
                            uint thread_index [[thread_index_in_threadgroup]]) {
  const int k_units = arguments.num_kv_heads * arguments.k_row;
  const int v_units = arguments.num_kv_heads * arguments.v_row;
  const int token = group.y, slot = slots[token];
  const int at = group.x * size.x + thread_index;
  if (slot < 0 || at >= k_units + v_units) {
    return;
  }
  const bool is_key = at < k_units;
  const int unit = is_key ? at : at - k_units;
  const int row_units = is_key ? arguments.k_row : arguments.v_row;
  const long row =
      page_row(slot / arguments.page_size, unit / row_units, slot % arguments.page_size,
               arguments.num_kv_heads, arguments.page_size);
  const long to = row * row_units + unit % row_units;
  if (is_key) {
    k_pages[to] = k_tokens[long(token) * k_units + unit];
  } else {
    v_pages[to] = v_tokens[long(token) * v_units + unit];
  }
}
