// Rows x pages: every query token against every key it may see, exactly once.
//
// A sequence's tokens are cut into tiles of at most rows.wide rows. Sequences
// of one tile (decode, short verify) may share what their tables begin with:
// a run of equal page ids is read once for all of them when that costs less.
// Runs nest: a group that shares a run is split by the next page, and so on.
#include <algorithm>

#include "segments.h"

namespace paged_mlx {

namespace {

constexpr double kWorthwhile = 0.9; // shared must cost less than this part of alone

class Sharing {
 public:
  Sharing(const PlanInput& input, const PlanTarget& target, std::vector<SharingDecision>& decisions)
      : in_(input), target_(target), decisions_(decisions) {}

  int item_tokens() const {
    return paged_mlx::item_tokens(in_, target_);
  }

  // The tiles of one sequence, each against the keys its tokens may see.
  void add_tiles(int b) {
    const int begin = in_.query_begin(b), len = in_.query_len(b);
    for (int t = 0; t < len; t += item_tokens()) {
      add_own(b, begin + t, begin + std::min(len, t + item_tokens()), 0);
    }
  }

  void add_own(int b, int token_begin, int token_end, int entry_begin) {
    Segment segment;
    segment.tokens = TokenSet(token_begin, token_end - token_begin);
    segment.range = visible(b, token_begin, token_end, entry_begin);
    if (segment.range.num_keys() > 0 || in_.context_lens[b] == 0) {
      segments_.push_back(std::move(segment));
    }
  }

  // `sequences`, one tile each, agree on entries [first, compared) and read
  // them from `first` on; split them by the page at `compared`.
  void share(std::vector<int> sequences, int first, int compared) {
    std::vector<int> alone;
    std::vector<std::pair<int32_t, int>> by_page;
    alone.reserve(sequences.size());
    by_page.reserve(sequences.size());
    for (int b : sequences) {
      if (compared < end_entry(b)) {
        by_page.emplace_back(page(b, compared), b);
      } else {
        alone.push_back(b);
      }
    }
    std::sort(by_page.begin(), by_page.end());
    for (size_t i = 0; i < by_page.size();) {
      size_t end = i + 1;
      while (end < by_page.size() && by_page[end].first == by_page[i].first) {
        end++;
      }
      if (end == i + 1) {
        alone.push_back(by_page[i++].second);
        continue;
      }
      std::vector<int> group;
      for (; i < end; i++) {
        group.push_back(by_page[i].second);
      }
      const int run_end = common_end(group, compared);
      if (run_end == compared) { // equal ids, part-filled or of different raggedness
        alone.insert(alone.end(), group.begin(), group.end());
      } else if (decide(group, first, run_end)) {
        add_shared(group, first, run_end);
        share(group, run_end, run_end);
      } else {
        share(group, first, run_end);
      }
    }
    for (int b : alone) {
      add_own(b, in_.query_begin(b), in_.query_begin(b) + in_.query_len(b), first);
    }
  }

  int first_entry(int b) const {
    return entry_of(in_, b, window_begin(in_, in_.context_lens[b] - in_.query_len(b)));
  }

  int end_entry(int b) const {
    return entry_of(in_, b, in_.context_lens[b] - 1) + 1;
  }

  std::vector<Segment> take() {
    return std::move(segments_);
  }

 private:
  int32_t page(int b, int entry) const {
    return in_.block_tables[int64_t(b) * in_.max_pages + entry];
  }

  bool same_entry(int a, int b, int entry) const {
    const int64_t i = int64_t(a) * in_.max_pages + entry, j = int64_t(b) * in_.max_pages + entry;
    if (in_.block_tables[i] != in_.block_tables[j] || in_.block_tables[i] < 0) {
      return false;
    }
    return !in_.ragged() ||
        (in_.page_starts[i] == in_.page_starts[j] && in_.page_lens[i] == in_.page_lens[j]);
  }

  // One past the last entry that the sequence holds whole.
  int whole_end(int b) const {
    const int end = end_entry(b);
    return entry_end(in_, b, end - 1) > in_.context_lens[b] ? end - 1 : end;
  }

  // One past the last entry that all of `group` have in common from `entry` on. Contexts that
  // end in it must end alike: what another holds behind is outside this one's context.
  int common_end(const std::vector<int>& group, int entry) const {
    int end = end_entry(group[0]);
    for (size_t i = 1; i < group.size(); i++) {
      const bool alike = in_.context_lens[group[i]] == in_.context_lens[group[0]];
      const int limit = alike ? std::min(end, end_entry(group[i]))
                              : std::min({end, whole_end(group[0]), whole_end(group[i])});
      int e = entry;
      while (e < limit && same_entry(group[0], group[i], e)) {
        e++;
      }
      end = e;
    }
    return end;
  }

  PageRange visible(int b, int token_begin, int token_end, int entry_begin) const {
    const int context_len = in_.context_lens[b];
    if (context_len == 0) {
      return {b, 0, 0, 0, 0};
    }
    const int offset = context_len - in_.query_len(b) - in_.query_begin(b);
    PageRange range{b, 0, 0, window_begin(in_, token_begin + offset), context_len};
    if (in_.causal) {
      range.key_end = token_end + offset;
    }
    range.entry_begin = std::max(entry_begin, entry_of(in_, b, range.key_begin));
    range.entry_end = entry_of(in_, b, range.key_end - 1) + 1;
    if (range.entry_begin >= range.entry_end) {
      return {b, entry_begin, entry_begin, 0, 0};
    }
    range.key_begin = std::max(range.key_begin, entry_start(in_, b, range.entry_begin));
    return range;
  }

  PageRange common_range(const std::vector<int>& group, int first, int end) const {
    PageRange range{group[0], first, end, INT32_MAX, 0};
    for (int b : group) {
      const int position = in_.context_lens[b] - in_.query_len(b);
      range.key_begin = std::min(range.key_begin, window_begin(in_, position));
      range.key_end = std::max(range.key_end, in_.context_lens[b]);
    }
    range.key_begin = std::max(range.key_begin, entry_start(in_, group[0], first));
    range.key_end = std::min(range.key_end, entry_end(in_, group[0], end - 1));
    return range;
  }

  bool decide(const std::vector<int>& group, int first, int end) {
    const int keys = common_range(group, first, end).num_keys();
    SharingDecision decision{int(group.size()), first, end - first, 0, 0, false};
    int rows = 0;
    for (int b : group) {
      const int own = in_.query_len(b) * in_.gqa_factor();
      rows += own;
      decision.cost_alone += attend_cost(own, keys, target_);
      // A row leaves one partial of what is shared and one of what follows.
      decision.cost_shared += own * target_.partial_cost[kind_of(own, target_.rows)];
    }
    const int most = item_tokens() * in_.gqa_factor();
    for (int left = rows; left > 0; left -= most) {
      const int together = std::min(left, most);
      const PlanKind kind = kind_of(together, target_.rows);
      decision.cost_shared += attend_cost(together, keys, target_) + target_.item_cost[kind] +
          together * target_.partial_cost[kind];
    }
    decision.shared = decision.cost_shared < kWorthwhile * decision.cost_alone;
    decisions_.push_back(decision);
    return decision.shared;
  }

  void add_shared(const std::vector<int>& group, int first, int end) {
    Segment segment;
    segment.range = common_range(group, first, end);
    segment.shared = true;
    for (int b : group) {
      for (int t = 0; t < in_.query_len(b); t++) {
        segment.tokens.add(in_.query_begin(b) + t);
        if (segment.tokens.size() == item_tokens()) {
          segments_.push_back(segment);
          segment.tokens.clear();
        }
      }
    }
    if (segment.tokens.size() > 0) {
      segments_.push_back(std::move(segment));
    }
  }

  const PlanInput& in_;
  const PlanTarget& target_;
  std::vector<SharingDecision>& decisions_;
  std::vector<Segment> segments_;
};

} // namespace

int entry_start(const PlanInput& input, int sequence, int entry) {
  return input.ragged() ? input.page_starts[int64_t(sequence) * input.max_pages + entry]
                        : entry * input.page_size;
}

int entry_end(const PlanInput& input, int sequence, int entry) {
  return input.ragged() ? entry_start(input, sequence, entry) +
          input.page_lens[int64_t(sequence) * input.max_pages + entry]
                        : (entry + 1) * input.page_size;
}

int entry_of(const PlanInput& input, int sequence, int position) {
  if (!input.ragged()) {
    return position / input.page_size;
  }
  int entry = 0;
  while (entry_end(input, sequence, entry) <= position) {
    entry++;
  }
  return entry;
}

std::vector<Segment> make_segments(const PlanInput& input, const PlanTarget& target,
                                   const PlanOptions& options,
                                   std::vector<SharingDecision>& decisions) {
  Sharing sharing(input, target, decisions);
  const bool may_share = options.share_prefixes && options.fixed_partition == 0;
  std::vector<int> candidates;
  int first = 0; // the first entry that every candidate sees
  for (int b = 0; b < input.batch; b++) {
    const int len = input.query_len(b);
    if (len == 0) {
      continue;
    }
    if (may_share && len <= sharing.item_tokens() && input.context_lens[b] > 0) {
      candidates.push_back(b);
      first = std::max(first, sharing.first_entry(b));
    } else {
      sharing.add_tiles(b);
    }
  }
  if (first > 0) { // windows: what lies before `first`, or ends before it, is read alone
    std::vector<int> rest;
    for (int b : candidates) {
      if (sharing.first_entry(b) == first && sharing.end_entry(b) > first) {
        rest.push_back(b);
      } else {
        sharing.add_tiles(b);
      }
    }
    candidates = std::move(rest);
  }
  if (!candidates.empty()) {
    sharing.share(std::move(candidates), first, first);
  }
  return sharing.take();
}

} // namespace paged_mlx
