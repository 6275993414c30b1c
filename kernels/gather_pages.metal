// K and V of each sequence, contiguous, both in one dispatch.
//
//   tables             [batch, max_pages]                            int32
//   context_lens       [batch]                                       int32
//   k_pages, v_pages   [num_pages, num_kv_heads, page_size, D or DV]
//   k_out, v_out       [batch, num_kv_heads, length, D or DV]
//   page_starts, page_lens [batch, max_pages], ragged tables only    int32
//
// Row j of a sequence is position j. Rows past its context, rows that no page
// holds and rows of NO_PAGE are 0.
//
// Grid, in threads: x over the units of a row of K and of V; y over positions; z over
// (sequence, KV head).

#include "page_moves.h"
#include "slot_lookup.h"

using namespace paged_mlx;

[[kernel]] void gather_pages(constant GatherPagesArguments& arguments
                             [[buffer(PAGED_MLX_BUFFER_ARGUMENTS)]],
                             const device int* tables [[buffer(PAGED_MLX_BUFFER_TABLES)]],
                             const device int* context_lens
                             [[buffer(PAGED_MLX_BUFFER_CONTEXT_LENS)]],
                             const device Unit* k_pages [[buffer(PAGED_MLX_BUFFER_K_PAGES)]],
                             const device Unit* v_pages [[buffer(PAGED_MLX_BUFFER_V_PAGES)]],
                             device Unit* k_out [[buffer(PAGED_MLX_BUFFER_K_OUT)]],
                             device Unit* v_out [[buffer(PAGED_MLX_BUFFER_V_OUT)]],
                             const device int* page_starts
                             [[buffer(PAGED_MLX_BUFFER_PAGE_STARTS), function_constant(kRagged)]],
                             const device int* page_lens
                             [[buffer(PAGED_MLX_BUFFER_PAGE_LENS), function_constant(kRagged)]],
                             uint3 at [[thread_position_in_grid]]) {
  const int position = at.y, num_kv_heads = arguments.num_kv_heads;
  const bool is_key = int(at.x) < arguments.k_row;
  const int row_units = is_key ? arguments.k_row : arguments.v_row;
  const int unit = is_key ? at.x : at.x - arguments.k_row;
  if (unit >= row_units || position >= arguments.length) {
    return;
  }
  const int sequence = at.z / num_kv_heads, kv_head = at.z % num_kv_heads;
  const long table = long(sequence) * arguments.max_pages;
  const Slot slot = find_slot(position, context_lens[sequence], tables + table,
                              kRagged ? page_starts + table : tables,
                              kRagged ? page_lens + table : tables, arguments);
  const long row = page_row(slot.page, kv_head, slot.offset, num_kv_heads, arguments.page_size);
  const long from = row * row_units + unit;
  const long to = (long(at.z) * arguments.length + position) * row_units + unit;
  if (is_key) {
    k_out[to] = slot.page >= 0 ? k_pages[from] : Unit(0);
  } else {
    v_out[to] = slot.page >= 0 ? v_pages[from] : Unit(0);
  }
}
