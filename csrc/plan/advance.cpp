// The next step of the same pages: new positions, the same items.
#include <algorithm>

#include "segments.h"

namespace paged_mlx {

namespace {

const PlanHeader& header_of(const int32_t* words) {
  return *reinterpret_cast<const PlanHeader*>(words);
}

int num_items(const PlanHeader& h) {
  return h.num_items[kVectorItem] + h.num_items[kTileItem] + h.num_items[kWideItem];
}

bool same_geometry(const PlanHeader& h, const PlanNotes& notes, const PlanInput& next) {
  return notes.context_lens.size() == size_t(next.batch) && h.page_starts == 0 && !next.ragged() &&
      h.num_q_heads == next.num_q_heads && h.num_kv_heads == next.num_kv_heads &&
      h.page_size == next.page_size && (h.causal != 0) == next.causal &&
      h.sliding_window == next.sliding_window;
}

// The sequence's tokens see the same entries of its table, in one tile.
bool same_entries(const PlanNotes& notes, const PlanInput& next, int s) {
  const int len = next.query_len(s);
  const int old_len =
      notes.cu_seqlens_q.empty() ? 1 : notes.cu_seqlens_q[s + 1] - notes.cu_seqlens_q[s];
  const int before = notes.context_lens[s], after = next.context_lens[s];
  if (len != old_len || (before == 0) != (after == 0)) {
    return false;
  }
  if (len == 0 || before == after) {
    return true;
  }
  auto first = [&](int context_len) {
    return entry_of(next, s, window_begin(next, context_len - len));
  };
  return len <= notes.item_tokens && first(before) == first(after) &&
      entry_of(next, s, before - 1) == entry_of(next, s, after - 1);
}

int sequence_of(const PlanInput& in, int token) {
  if (!in.cu_seqlens_q) {
    return token;
  }
  const int32_t* end = in.cu_seqlens_q + in.batch + 1;
  return int(std::upper_bound(in.cu_seqlens_q, end, token) - in.cu_seqlens_q) - 1;
}

// Every sequence of the item has the item's pages where the item reads them, and as many
// keys in them.
bool same_item_pages(const int32_t* words, const PlanItem& item, bool open, int entry,
                     const PlanInput& next) {
  const PlanHeader& h = header_of(words);
  const int first = open ? next.num_sealed_pages : 0; // id of page 0
  if (entry + item.page_count > next.max_pages) {
    return false;
  }
  const int32_t* const tokens = words + h.row_tokens + item.row_begin;
  const auto keys_end = [&](int s) {
    return std::min(entry_end(next, s, entry + item.page_count - 1), next.context_lens[s]);
  };
  for (int r = 0; r < item.row_count; r++) {
    const int s = sequence_of(next, tokens[r]);
    if (item.page_count > 0 && keys_end(s) != keys_end(sequence_of(next, tokens[0]))) {
      return false;
    }
    const int32_t* row = next.block_tables + int64_t(s) * next.max_pages + entry;
    const int32_t* const pages = words + h.pages + item.page_begin;
    if (!std::equal(pages, pages + item.page_count, row,
                    [first](int32_t page, int32_t id) { return page + first == id; })) {
      return false;
    }
  }
  return true;
}

void move_positions(int32_t* words, PlanHeader& h, const PlanInput& in) {
  h.max_row_end = 0;
  for (int s = 0; s < in.batch; s++) {
    const int len = in.query_len(s), context_len = in.context_lens[s];
    for (int t = 0; t < len; t++) {
      const int at = in.query_begin(s) + t, position = context_len - len + t;
      const int end = context_len == 0 ? 0 : in.causal ? position + 1 : context_len;
      words[h.positions + at] = position;
      words[h.row_ends + at] = end;
      h.max_row_end = std::max(h.max_row_end, end);
    }
  }
}

// Key ranges follow from the rows' limits and the pages the item already has.
void move_keys(int32_t* words, const PlanHeader& h, const PlanInput& in) {
  auto* item = reinterpret_cast<PlanItem*>(words + h.items);
  auto* const end = item + num_items(h);
  for (; item != end; item++) {
    int key_begin = INT32_MAX, key_end = 0;
    for (int r = 0; r < item->row_count; r++) {
      const int t = words[h.row_tokens + item->row_begin + r];
      key_begin = std::min(key_begin, window_begin(in, words[h.positions + t]));
      key_end = std::max(key_end, words[h.row_ends + t]);
    }
    if (item->page_count > 0) {
      const int pages_end = item->first_position + item->page_count * in.page_size;
      item->key_begin = std::max(key_begin, item->first_position);
      item->key_end = std::min(key_end, pages_end);
    }
  }
}

} // namespace

bool sees_whole_prompts(const PlanInput& input) {
  for (int b = 0; b < input.batch; b++) {
    const int len = input.query_len(b);
    const bool clipped = input.sliding_window > 0 && len > input.sliding_window;
    if (len > 0 && (len != input.context_lens[b] || clipped)) {
      return false;
    }
  }
  return input.causal;
}

bool can_advance(const int32_t* words, const PlanNotes& notes, const PlanInput& next) {
  const PlanHeader& h = header_of(words);
  if (!same_geometry(h, notes, next) || h.num_tokens != next.num_tokens()) {
    return false;
  }
  for (int s = 0; s < next.batch; s++) {
    if (!same_entries(notes, next, s)) {
      return false;
    }
  }
  const auto* items = reinterpret_cast<const PlanItem*>(words + h.items);
  for (int kind = 0, i = 0, end = 0; kind < kNumPlanKinds; kind++) {
    end += h.num_items[kind];
    for (; i < end; i++) {
      const bool open = i >= end - h.num_open_items[kind];
      if (!same_item_pages(words, items[i], open, notes.entry_begins[i], next)) {
        return false;
      }
    }
  }
  return true;
}

void advance_plan(int32_t* words, PlanNotes& notes, const PlanInput& next) {
  PlanHeader& h = *reinterpret_cast<PlanHeader*>(words);
  move_positions(words, h, next);
  move_keys(words, h, next);
  notes.context_lens.assign(next.context_lens, next.context_lens + next.batch);
  notes.fresh_prompt = notes.fresh_prompt && sees_whole_prompts(next);
}

} // namespace paged_mlx
