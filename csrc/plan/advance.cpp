// The next step of the same pages: new positions, the same items.
#include <algorithm>
#include <cstring>

#include "segments.h"

namespace paged_mlx {

namespace {

bool same_shape(const PlanInput& a, const PlanInput& b) {
  return a.batch == b.batch && !a.ragged() && !b.ragged() && a.num_q_heads == b.num_q_heads &&
      a.num_kv_heads == b.num_kv_heads && a.page_size == b.page_size && a.causal == b.causal &&
      a.sliding_window == b.sliding_window && a.num_tokens() == b.num_tokens();
}

// The sequence sees the same entries of the same pages, in one tile.
bool same_pages(const PlanInput& a, const PlanInput& b, int s, int tile_tokens) {
  const int len = a.query_len(s);
  if (len != b.query_len(s)) {
    return false;
  }
  if (len == 0) {
    return true;
  }
  if ((a.context_lens[s] == 0) != (b.context_lens[s] == 0)) {
    return false;
  }
  if (a.context_lens[s] == 0) {
    return true;
  }
  if (a.context_lens[s] != b.context_lens[s] && len > tile_tokens) {
    return false;
  }
  const int first = entry_of(a, s, window_begin(a, a.context_lens[s] - len));
  const int last = entry_of(a, s, a.context_lens[s] - 1);
  return first == entry_of(b, s, window_begin(b, b.context_lens[s] - len)) &&
      last == entry_of(b, s, b.context_lens[s] - 1) &&
      std::memcmp(
          a.block_tables + int64_t(s) * a.max_pages + first,
          b.block_tables + int64_t(s) * b.max_pages + first,
          size_t(last - first + 1) * sizeof(int32_t)) == 0;
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
  auto* end = item + h.num_items[0] + h.num_items[1] + h.num_items[2];
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

bool advance_plan(
    Plan& plan,
    const PlanInput& before,
    const PlanInput& after,
    const PlanTarget& target) {
  if (!same_shape(before, after)) {
    return false;
  }
  const int tile_tokens = std::max(1, target.wide_rows / after.gqa_factor());
  for (int s = 0; s < after.batch; s++) {
    if (!same_pages(before, after, s, tile_tokens)) {
      return false;
    }
  }
  PlanHeader& h = *reinterpret_cast<PlanHeader*>(plan.words.data());
  move_positions(plan.words.data(), h, after);
  move_keys(plan.words.data(), h, after);
  return true;
}

} // namespace paged_mlx
