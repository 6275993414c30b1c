// Long ranges are cut so that every worker has something to do.
#include <algorithm>

#include "segments.h"

namespace paged_mlx {

namespace {

// Cost of what one worker does at a time: a whole item, or one KV head of it.
double unit_cost(const PlanInput& input, const Segment& segment, const PlanTarget& target) {
  const int rows = segment.tokens.size() * input.gqa_factor();
  const double cost = attend_cost(rows, segment.range.num_keys(), target);
  return target.heads_in_parallel ? cost : cost * input.num_kv_heads;
}

PageRange piece(const PlanInput& input, const PageRange& whole, int entry_begin, int entry_end_) {
  PageRange range = whole;
  range.entry_begin = entry_begin;
  range.entry_end = entry_end_;
  range.key_begin = std::max(whole.key_begin, entry_start(input, whole.sequence, entry_begin));
  range.key_end = std::min(whole.key_end, entry_end(input, whole.sequence, entry_end_ - 1));
  range.open =
      input.is_open(input.block_tables[int64_t(range.sequence) * input.max_pages + entry_begin]);
  return range;
}

// Adds [entry_begin, entry_end), cut where sealed and open pages meet.
void add_pieces(const PlanInput& input, const PageRange& whole, int entry_begin, int entry_end,
                std::vector<PageRange>& pieces) {
  const int32_t* const pages = input.block_tables + int64_t(whole.sequence) * input.max_pages;
  int begin = entry_begin;
  for (int e = entry_begin + 1; e <= entry_end; e++) {
    if (e == entry_end || input.is_open(pages[e]) != input.is_open(pages[begin])) {
      pieces.push_back(piece(input, whole, begin, e));
      begin = e;
    }
  }
}

// Pieces whose first keys are multiples of `partition`: the same for a range
// whatever else the step holds.
std::vector<PageRange> cut_fixed(const PlanInput& input, const PageRange& range, int partition) {
  std::vector<PageRange> pieces;
  int begin = range.entry_begin;
  for (int e = range.entry_begin + 1; e <= range.entry_end; e++) {
    const bool boundary = e == range.entry_end ||
        entry_start(input, range.sequence, e) / partition !=
            entry_start(input, range.sequence, begin) / partition;
    if (boundary) {
      add_pieces(input, range, begin, e, pieces);
      begin = e;
    }
  }
  return pieces;
}

} // namespace

double total_cost(const PlanInput& input, const std::vector<Segment>& segments,
                  const PlanTarget& target) {
  double total = 0;
  for (const Segment& segment : segments) {
    total += unit_cost(input, segment, target);
  }
  return total;
}

std::vector<PageRange> cut(const PlanInput& input, const Segment& segment, double budget,
                           const PlanTarget& target, const PlanOptions& options) {
  const PageRange& range = segment.range;
  if (range.num_keys() == 0) {
    return {range};
  }
  if (options.fixed_partition > 0) {
    return cut_fixed(input, range, options.fixed_partition);
  }
  const int entries = range.entry_end - range.entry_begin;
  const int count =
      piece_count(unit_cost(input, segment, target), budget, range.num_keys(), entries, target);
  std::vector<PageRange> pieces;
  for (int i = 0; i < count; i++) {
    const int begin = range.entry_begin + int(int64_t(entries) * i / count);
    const int end = range.entry_begin + int(int64_t(entries) * (i + 1) / count);
    add_pieces(input, range, begin, end, pieces);
  }
  return pieces;
}

} // namespace paged_mlx
