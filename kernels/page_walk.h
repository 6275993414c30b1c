// The pages of a work item: from a slot of the item to a row of the pool.
//
// Slots of an item are numbered through its pages: slot s lies in page
// s / page_size at offset s % page_size. Kernels go in steps of a fixed number
// of slots, a step beginning at a multiple of it. Where a step may not cross pages, a
// page has as many slots as fill its last step, and those behind its end are not live.
#ifndef PAGED_MLX_PAGE_WALK_H
#define PAGED_MLX_PAGE_WALK_H

#include "numbers.h"
#include "scores.h"

namespace paged_mlx {

constant bool kRagged [[function_constant(PAGED_MLX_CONSTANT_RAGGED)]];
constant int kPageSize [[function_constant(PAGED_MLX_CONSTANT_PAGE_SIZE)]];

// STEP: slots of a step that may not cross pages; 1: steps may.
template <int STEP>
struct PageWalk {
  const device int* pages;
  const device int* page_starts;
  const device int* page_lens;
  int page_count;
  int first_position;
  int key_begin, key_end;
  int kv_head, num_kv_heads;

  PageWalk(const device int* plan, const device PlanItem& item, constant AttendArguments& arguments,
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

  static int page_slots() {
    return (kPageSize + STEP - 1) / STEP * STEP;
  }

  // Of the index-th token of pages that are not ragged.
  static int slot_of(int index) {
    return STEP == 1 ? index : index + index / kPageSize * (page_slots() - kPageSize);
  }

  // The slots that hold the keys [low, high) of the item, as [x, y), from and to
  // multiples of `size`.
  int2 slots(int low, int high, int size) const {
    if (low >= high) {
      return int2(0);
    }
    const int2 all = kRagged
        ? int2(0, page_count * page_slots())
        : int2(slot_of(low - first_position), slot_of(high - first_position - 1) + 1);
    return int2(all.x / size, (all.y + size - 1) / size) * size;
  }

  // The slots [slot, slot + count) hold keys of [seen.x, seen.y) only, no mask hides
  // one of them, and RowWalk finds their rows.
  bool is_whole(int slot, int count, int2 seen) const {
    const int first = position(slot);
    return !kRagged && !kHasMask && kPageSize % 8 == 0 && slot % min(count, 32) == 0 &&
        (STEP == 1 || slot % page_slots() + count <= kPageSize) && first >= seen.x &&
        first + count <= seen.y;
  }

  // Keys outside [low, high) are not live from now on.
  void narrow(int low, int high) {
    key_begin = max(key_begin, low);
    key_end = min(key_end, high);
  }

  int page_of(int slot) const {
    return min(slot / page_slots(), page_count - 1);
  }

  bool is_live(int slot) const {
    if (kRagged) {
      const int page = page_of(slot), offset = slot - page * page_slots();
      const int position = page_starts[page] + offset;
      return offset < page_lens[page] && position >= key_begin && position < key_end;
    }
    const bool is_slot = STEP == 1 || slot % page_slots() < kPageSize;
    return is_slot && position(slot) >= key_begin && position(slot) < key_end;
  }

  int position(int slot) const {
    if (kRagged) {
      const int page = page_of(slot);
      return page_starts[page] + slot - page * page_slots();
    }
    return first_position + slot -
        (STEP == 1 ? 0 : slot / page_slots() * (page_slots() - kPageSize));
  }

  long row(int slot) const {
    const int page = page_of(slot);
    return page_row(pages[page], kv_head, slot - page * page_slots(), num_kv_heads, kPageSize);
  }

  // Row of a page, where each page and KV head has one.
  long page_head(int page) const {
    return long(pages[page]) * num_kv_heads + kv_head;
  }
};

// The rows of the pool behind the slots of a whole step, in order. Looks into the
// table as seldom as pages allow.
template <int STEP>
struct RowWalk {
  thread const PageWalk<STEP>& walk;
  int slot;   // of the step
  long first; // row of slot `slot` as if the page of the last look went on

  RowWalk(thread const PageWalk<STEP>& walk_, int slot_) : walk(walk_), slot(slot_), first(0) {}

  // Of slot `slot` + i; those of a call come in order, without gaps of more than eight.
  long row(int i) {
    const int run = kPageSize % 32 == 0 ? 32 : kPageSize % 16 == 0 ? 16 : 8;
    if (i % run == 0) {
      first = walk.row(slot + i) - i;
    }
    return first + i;
  }
};

} // namespace paged_mlx

#endif
