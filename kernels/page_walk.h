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
    const int first = first_position + slot;
    return !kRagged && first >= key_begin && first + count <= key_end;
  }

  // Keys outside [low, high) are not live from now on.
  void narrow(int low, int high) {
    key_begin = max(key_begin, low);
    key_end = min(key_end, high);
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

// The rows of the pool behind the slots of a step, eight after eight: enter(0),
// enter(1), ... in order. Looks into the table as seldom as pages allow.
struct GroupWalk {
  thread const PageWalk& walk;
  int slot;   // of the step
  int group;  // of eight slots
  long first; // row of slot `slot` as if its page went on; see row()

  GroupWalk(thread const PageWalk& walk_, int slot_)
      : walk(walk_), slot(slot_), group(0), first(0) {}

  void enter(int g) {
    const int groups_of_a_page = kPageSize % 64 == 0 ? 8
        : kPageSize % 32 == 0                        ? 4
        : kPageSize % 16 == 0                        ? 2
                                                     : 1;
    group = g;
    if (kPageSize % 8 == 0 && g % groups_of_a_page == 0) {
      first = walk.row(slot + 8 * g) - 8 * g;
    }
  }

  int slot_of(int i) const {
    return slot + 8 * group + i;
  }

  // Of slot i of the group.
  long row(int i) const {
    return kPageSize % 8 == 0 ? first + 8 * group + i : walk.row(slot_of(i));
  }

  bool is_live(int i) const {
    return walk.is_live(slot_of(i));
  }
};

} // namespace paged_mlx

#endif
