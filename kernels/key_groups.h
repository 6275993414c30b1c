// Groups of eight keys of an item as a simdgroup reads and scores them.
#ifndef PAGED_MLX_KEY_GROUPS_H
#define PAGED_MLX_KEY_GROUPS_H

#include "matrices.h"
#include "page_walk.h"
#include "scores.h"

namespace paged_mlx {

template <typename T, int D, bool EDGE>
inline KeyPair<T> key_pair(
    thread const GroupWalk& slots,
    const device T* k_pages,
    LanePlace at) {
  KeyPair<T> pair;
  pair.first = k_pages + slots.row(at.column) * D;
  pair.second = k_pages + slots.row(at.column + 1) * D;
  pair.first_live = !EDGE || slots.is_live(at.column);
  pair.second_live = !EDGE || slots.is_live(at.column + 1);
  return pair;
}

// From dot products to scores in base-2 units, for the rows at scores[m, g].
template <bool EDGE, int ROW_TILES, int GROUPS>
inline void score_groups(
    thread const PageWalk& walk,
    thread const Scoring& scoring,
    thread const QueryRow (&rows)[ROW_TILES],
    int slot,
    LanePlace at,
    thread Matrix<float>* scores) {
#pragma clang loop unroll(full)
  for (int g = 0; g < GROUPS; g++) {
    const int first_slot = slot + 8 * g + at.column;
    const int first = walk.position(first_slot);
    const int second = kRagged ? walk.position(first_slot + 1) : first + 1;
    const bool first_live = !EDGE || walk.is_live(first_slot);
    const bool second_live = !EDGE || walk.is_live(first_slot + 1);
#pragma clang loop unroll(full)
    for (int m = 0; m < ROW_TILES; m++) {
      thread float2& two = elements(scores[m * GROUPS + g]);
      two.x = first_live ? scoring.of<EDGE>(two.x, rows[m], first) : kHidden;
      two.y = second_live ? scoring.of<EDGE>(two.y, rows[m], second) : kHidden;
    }
  }
}

} // namespace paged_mlx

#endif
