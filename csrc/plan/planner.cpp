// Strings the moves together and writes the words of plan_format.h.
#include "planner.h"

#include <algorithm>
#include <numeric>
#include <tuple>

#include "segments.h"

namespace paged_mlx {

namespace {

constexpr int kHeaderWords = sizeof(PlanHeader) / sizeof(int32_t);
constexpr int kItemWords = sizeof(PlanItem) / sizeof(int32_t);
constexpr int kMergeWords = sizeof(PlanMerge) / sizeof(int32_t);

// A piece of a segment, on its way to become an item.
struct Draft {
  int segment;
  PageRange range;
  PlanKind kind;
  double cost;
  int partial = -1;
};

class Writer {
 public:
  Writer(const PlanInput& input, const std::vector<Segment>& segments, std::vector<Draft>& drafts,
         bool merges_all, const TakeWords& take)
      : in_(input), segments_(segments), drafts_(drafts), merges_all_(merges_all), take_(take) {}

  void write() {
    number_partials();
    collect_row_tokens();
    lay_out();
    write_positions();
    write_items();
    write_merges();
  }

 private:
  const TokenSet& tokens(const Draft& draft) const {
    return segments_[draft.segment].tokens;
  }

  // An item is final when it is the only one of each of its tokens.
  bool is_final(const Draft& draft) const {
    const TokenSet& all = tokens(draft);
    for (int i = 0; i < all.size(); i++) {
      if (merges_all_) {
        return false;
      }
      if (part_counts_[all[i]] != 1) {
        return false;
      }
    }
    return true;
  }

  template <typename Visit>
  void for_each_token(const Draft& draft, Visit visit) const {
    const TokenSet& all = tokens(draft);
    for (int i = 0; i < all.size(); i++) {
      visit(all[i]);
    }
  }

  void number_partials() {
    const int n = in_.num_tokens();
    part_counts_.assign(n, 0);
    for (const Draft& draft : drafts_) {
      for_each_token(draft, [&](int t) { part_counts_[t]++; });
    }
    part_begins_.assign(n + 1, 0);
    for (Draft& draft : drafts_) {
      if (!is_final(draft)) {
        draft.partial = num_parts_;
        num_parts_ += tokens(draft).size();
        for_each_token(draft, [&](int t) { part_begins_[t + 1]++; });
      }
    }
    for (int t = 0; t < n; t++) {
      num_merges_ += part_begins_[t + 1] > 0;
      part_begins_[t + 1] += part_begins_[t];
    }
    list_parts();
  }

  // The partials of each token, in the order of the keys: that of the items depends on
  // costs, which move with the contexts, and a sum's bits on its order.
  void list_parts() {
    parts_.resize(num_parts_);
    std::vector<const Draft*> by_keys;
    for (const Draft& draft : drafts_) {
      if (draft.partial >= 0) {
        by_keys.push_back(&draft);
      }
    }
    std::sort(by_keys.begin(), by_keys.end(), [](const Draft* a, const Draft* b) {
      return a->range.entry_begin < b->range.entry_begin;
    });
    std::vector<int> next(part_begins_.begin(), part_begins_.end() - 1);
    for (const Draft* draft : by_keys) {
      int partial = draft->partial;
      for_each_token(*draft, [&](int t) { parts_[next[t]++] = partial++; });
    }
  }

  // Row tokens 0..num_tokens-1 are the tokens themselves; a set of tokens that
  // is not a run of them is listed behind.
  void collect_row_tokens() {
    row_tokens_.resize(in_.num_tokens());
    std::iota(row_tokens_.begin(), row_tokens_.end(), 0);
    row_begins_.resize(segments_.size());
    for (size_t i = 0; i < segments_.size(); i++) {
      const TokenSet& tokens = segments_[i].tokens;
      if (tokens.is_run()) {
        row_begins_[i] = tokens[0];
        continue;
      }
      row_begins_[i] = int(row_tokens_.size());
      for (int t = 0; t < tokens.size(); t++) {
        row_tokens_.push_back(tokens[t]);
      }
    }
  }

  int reserve(int words) {
    const int at = next_;
    next_ += words;
    return at;
  }

  void lay_out() {
    PlanHeader h{};
    h.magic = PAGED_MLX_PLAN_MAGIC;
    h.num_tokens = in_.num_tokens();
    h.num_row_tokens = int(row_tokens_.size());
    h.num_partials = num_parts_;
    h.num_merges = num_merges_;
    h.num_parts = num_parts_;
    for (const Draft& draft : drafts_) {
      h.num_items[draft.kind]++;
      h.num_open_items[draft.kind] += draft.range.open;
      h.num_pages += draft.range.entry_end - draft.range.entry_begin;
    }
    next_ = kHeaderWords;
    h.items = reserve(int(drafts_.size()) * kItemWords);
    h.row_tokens = reserve(h.num_row_tokens);
    h.positions = reserve(h.num_tokens);
    h.row_ends = reserve(h.num_tokens);
    h.pages = reserve(h.num_pages);
    h.page_starts = in_.ragged() ? reserve(h.num_pages) : 0;
    h.page_lens = in_.ragged() ? reserve(h.num_pages) : 0;
    h.merges = reserve(h.num_merges * kMergeWords);
    h.parts = reserve(h.num_parts);
    h.num_words = next_;
    h.num_q_heads = in_.num_q_heads;
    h.num_kv_heads = in_.num_kv_heads;
    h.page_size = in_.page_size;
    h.causal = in_.causal;
    h.sliding_window = in_.sliding_window;
    h.max_page_id = h.max_open_page = -1;
    words_ = take_(next_);
    header() = h;
    std::copy(row_tokens_.begin(), row_tokens_.end(), words_ + h.row_tokens);
  }

  PlanHeader& header() {
    return *reinterpret_cast<PlanHeader*>(words_);
  }

  void write_positions() {
    PlanHeader& h = header();
    for (int b = 0; b < in_.batch; b++) {
      const int begin = in_.query_begin(b), len = in_.query_len(b);
      const int context_len = in_.context_lens[b];
      for (int t = 0; t < len; t++) {
        const int position = context_len - len + t;
        const int end = context_len == 0 ? 0 : in_.causal ? position + 1 : context_len;
        words_[h.positions + begin + t] = position;
        words_[h.row_ends + begin + t] = end;
        h.max_row_end = std::max(h.max_row_end, end);
      }
    }
  }

  void write_items() {
    PlanHeader& h = header();
    auto* item = reinterpret_cast<PlanItem*>(words_ + h.items);
    int page_at = 0;
    for (const Draft& draft : drafts_) {
      const PageRange& range = draft.range;
      const int count = range.entry_end - range.entry_begin;
      item->row_begin = row_begins_[draft.segment];
      item->row_count = tokens(draft).size();
      item->page_begin = page_at;
      item->page_count = count;
      item->first_position = count ? entry_start(in_, range.sequence, range.entry_begin) : 0;
      item->key_begin = range.key_begin;
      item->key_end = range.key_end;
      item->partial = draft.partial;
      item++;
      copy_pages(range, page_at);
      page_at += count;
    }
  }

  void copy_pages(const PageRange& range, int page_at) {
    PlanHeader& h = header();
    const int64_t from = int64_t(range.sequence) * in_.max_pages + range.entry_begin;
    const int count = range.entry_end - range.entry_begin;
    const int32_t* pages = in_.block_tables + from;
    int32_t* const to = words_ + h.pages + page_at;
    int& header_most = range.open ? h.max_open_page : h.max_page_id;
    const int first = range.open ? in_.num_sealed_pages : 0;
    int most = header_most;
    for (int i = 0; i < count; i++) {
      to[i] = pages[i] - first;
      most = std::max(most, to[i]);
    }
    header_most = most;
    if (in_.ragged()) {
      std::copy_n(in_.page_starts + from, count, words_ + h.page_starts + page_at);
      std::copy_n(in_.page_lens + from, count, words_ + h.page_lens + page_at);
    }
  }

  void write_merges() {
    const PlanHeader& h = header();
    auto* merge = reinterpret_cast<PlanMerge*>(words_ + h.merges);
    for (int t = 0; t < in_.num_tokens(); t++) {
      const int begin = part_begins_[t], count = part_begins_[t + 1] - begin;
      if (count > 0) {
        *merge++ = {t, begin, count};
      }
    }
    std::copy(parts_.begin(), parts_.end(), words_ + h.parts);
  }

  const PlanInput& in_;
  const std::vector<Segment>& segments_;
  std::vector<Draft>& drafts_;
  const bool merges_all_;
  const TakeWords& take_;
  int32_t* words_ = nullptr;
  std::vector<int> part_counts_, part_begins_, parts_, row_tokens_, row_begins_;
  int num_merges_ = 0, num_parts_ = 0, next_ = 0;
};

// Inside a kind, longest first: the last item to start is a short one. Open pages last.
void sort_drafts(std::vector<Draft>& drafts) {
  std::stable_sort(drafts.begin(), drafts.end(), [](const Draft& a, const Draft& b) {
    return std::tuple(a.kind, a.range.open, -a.cost) < std::tuple(b.kind, b.range.open, -b.cost);
  });
}

// Whether every prompt of the step has so many tokens that MLX's attention is the faster route.
bool is_fresh_prompt(const PlanInput& input, int least_tokens) {
  if (least_tokens == 0 || input.num_tokens() == 0 || !sees_whole_prompts(input)) {
    return false;
  }
  for (int b = 0; b < input.batch; b++) {
    if (input.query_len(b) > 0 && input.query_len(b) < least_tokens) {
      return false;
    }
  }
  return true;
}

} // namespace

PlanNotes make_plan(const PlanInput& input, const PlanTarget& target, const PlanOptions& options,
                    const TakeWords& take) {
  PlanNotes notes;
  const std::vector<Segment> segments = make_segments(input, target, options, notes.decisions);
  const double budget =
      item_budget(total_cost(input, segments, target), input.num_kv_heads, target);
  std::vector<Draft> drafts;
  drafts.reserve(segments.size());
  for (size_t i = 0; i < segments.size(); i++) {
    const int rows = segments[i].tokens.size() * input.gqa_factor();
    for (const PageRange& range : cut(input, segments[i], budget, target, options)) {
      const double cost = attend_cost(rows, range.num_keys(), target);
      drafts.push_back({int(i), range, kind_of(rows, target.rows), cost});
    }
  }
  sort_drafts(drafts);
  Writer(input, segments, drafts, options.merges_all, take).write();
  notes.entry_begins.reserve(drafts.size());
  for (const Draft& draft : drafts) {
    notes.entry_begins.push_back(draft.range.entry_begin);
  }
  notes.context_lens.assign(input.context_lens, input.context_lens + input.batch);
  if (input.cu_seqlens_q) {
    notes.cu_seqlens_q.assign(input.cu_seqlens_q, input.cu_seqlens_q + input.batch + 1);
  }
  notes.item_tokens = item_tokens(input, target);
  notes.fresh_prompt = is_fresh_prompt(input, target.thresholds.sdpa_prompt);
  notes.measured = target.measured;
  return notes;
}

} // namespace paged_mlx
