// The pages of a work item: from a slot of the item to a row of the pool.
//
// Slots of an item are numbered through its pages: slot s lies in page
// s / page_size at offset s % page_size. Kernels go in steps of a fixed number
// of slots, a step beginning at a multiple of it.
#ifndef PAGED_MLX_PAGE_WALK_H
#define PAGED_MLX_PAGE_WALK_H

#include "arguments.h"
#include "numbers.h"

namespace paged_mlx {

constant bool kRagged [[function_constant(PAGED_MLX_CONSTANT_RAGGED)]];
constant int kPageSize [[function_constant(PAGED_MLX_CONSTANT_PAGE_SIZE)]];

struct PageWalk {
  const device int* pages;
  const device int* page_starts;
  const device int* page_lens;
  int page_count;
  int first_position;
  int key_begin, key_end;
  int kv_head, num_kv_heads;

  PageWalk(
      const device int* plan,
      const device PlanItem& item,
      constant AttendArguments& arguments,
      int kv_head_)
      : pages(plan + arguments.pages + item.page_begin),
        page_starts(plan + arguments.page_starts + item.page_begin),
        page_lens(plan + arguments.page_lens + item.page_begin),
        page_count(item.page_count),
        first_position(item.first_position),
        key_begin(item.key_begin),
        key_end(item.key_end),
        kv_head(kv_head_),
        num_kv_heads(arguments.num_kv_heads) {}

  // The steps of `size` slots that hold the keys [low, high) of the item: [x, y).
  int2 steps(int low, int high, int size) const {
    if (low >= high) {
      return int2(0);
    }
    const int2 slots =
        kRagged ? int2(0, page_count * kPageSize) : int2(low, high) - first_position;
    return int2(slots.x / size, (slots.y + size - 1) / size);
  }

  // Every key of [slot, slot + count) is one that the item holds.
  bool all_live(int slot, int count) const {
    return !kRagged && first_position + slot >= key_begin && first_position + slot + count <= key_end;
  }

  int page_of(int slot) const {
    return min(slot / kPageSize, page_count - 1);
  }

  bool is_live(int slot) const {
    if (kRagged) {
      const int page = page_of(slot), offset = slot - page * kPageSize;
      const int position = page_starts[page] + offset;
      return offset < page_lens[page] && position >= key_begin && position < key_end;
    }
    const int position = first_position + slot;
    return position >= key_begin && position < key_end;
  }

  int position(int slot) const {
    if (kRagged) {
      const int page = page_of(slot);
      return page_starts[page] + slot - page * kPageSize;
    }
    return first_position + slot;
  }

  long row(int slot) const {
    const int page = page_of(slot);
    return page_row(pages[page], kv_head, slot - page * kPageSize, num_kv_heads, kPageSize);
  }
};

// The rows of the pool behind RUN slots that begin at a multiple of RUN: one
// look into the table where a page holds them all.
template <int RUN>
struct SlotRun {
  thread const PageWalk& walk;
  int slot;
  long first;

  SlotRun(thread const PageWalk& walk_, int slot_) : walk(walk_), slot(slot_), first(0) {
    if (kPageSize % RUN == 0) {
      first = walk.row(slot);
    }
  }

  long row(int i) const {
    return kPageSize % RUN == 0 ? first + i : walk.row(slot + i);
  }
};

} // namespace paged_mlx

#endif
