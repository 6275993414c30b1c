// The slot of a position, by the block table of its sequence.
#ifndef PAGED_MLX_SLOT_LOOKUP_H
#define PAGED_MLX_SLOT_LOOKUP_H

#include <metal_stdlib>

#include "arguments.h"

namespace paged_mlx {

using namespace metal;

constant bool kRagged [[function_constant(PAGED_MLX_CONSTANT_RAGGED)]];

struct Slot {
  int page; // NO_PAGE: nothing is there
  int offset;
};

inline Slot find_slot(int position, int context_len, const device int* table,
                      const device int* starts, const device int* lens,
                      constant GatherPagesArguments& arguments) {
  Slot slot = {PAGED_MLX_NO_PAGE, 0};
  if (position >= context_len) {
    return slot;
  }
  if (!kRagged) {
    const int entry = position / arguments.page_size;
    if (entry < arguments.max_pages) {
      slot.page = table[entry];
      slot.offset = position % arguments.page_size;
    }
    return slot;
  }
  // No entry holds more than a page: those before this one end before the position.
  const int first = max(0, (position - starts[0]) / arguments.page_size);
  for (int e = first; e < arguments.max_pages && starts[e] <= position; e++) {
    if (position < starts[e] + lens[e] && table[e] >= 0) {
      slot.page = table[e];
      slot.offset = position - starts[e];
    }
  }
  return slot;
}

} // namespace paged_mlx

#endif
