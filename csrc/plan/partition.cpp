// Long ranges are cut so that every worker has something to do.
#include <algorithm>
#include <cmath>
#include <limits>

#include "segments.h"

namespace paged_mlx {

namespace {

constexpr double kRounding = 1e-6; // of a division

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
  return range;
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
      pieces.push_back(piece(input, range, begin, e));
      begin = e;
    }
  }
  return pieces;
}

} // namespace

double item_budget(
    const PlanInput& input,
    const std::vector<Segment>& segments,
    const PlanTarget& target) {
  double total = 0;
  for (const Segment& segment : segments) {
    total += unit_cost(input, segment, target);
  }
  const double workers = target.heads_in_parallel
      ? std::max(1.0, double(target.workers) / input.num_kv_heads)
      : target.workers;
  if (workers <= 1 || total < 2 * target.min_item_cost) {
    return std::numeric_limits<double>::infinity();
  }
  // As many items for every worker: the third of three items for two would be waited for.
  const double per_worker = total / (workers * target.min_item_cost);
  if (per_worker < 1) {
    return target.min_item_cost;
  }
  const double count = std::min(std::round(per_worker), double(target.items_per_worker));
  return total / (workers * count);
}

std::vector<PageRange> cut(
    const PlanInput& input,
    const Segment& segment,
    double item_budget,
    const PlanTarget& target,
    const PlanOptions& options) {
  const PageRange& range = segment.range;
  if (range.num_keys() == 0) {
    return {range};
  }
  if (options.fixed_partition > 0) {
    return cut_fixed(input, range, options.fixed_partition);
  }
  const double cost = unit_cost(input, segment, target);
  const int entries = range.entry_end - range.entry_begin;
  int count = 1;
  if (cost > 1.5 * item_budget) {
    count = int(std::min(std::ceil(cost / item_budget - kRounding), 1e6));
    count = std::min({count, range.num_keys() / target.min_partition, entries});
  }
  std::vector<PageRange> pieces;
  for (int i = 0; i < std::max(1, count); i++) {
    const int begin = range.entry_begin + int(int64_t(entries) * i / std::max(1, count));
    const int end = range.entry_begin + int(int64_t(entries) * (i + 1) / std::max(1, count));
    pieces.push_back(piece(input, range, begin, end));
  }
  return pieces;
}

} // namespace paged_mlx
