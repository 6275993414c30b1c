#include "plan/cost.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace paged_mlx {

namespace {

constexpr double kRounding = 1e-6; // of a division

} // namespace

double attend_cost(int rows, int64_t keys, const PlanTarget& target) {
  const PlanKind kind = kind_of(rows, target.rows);
  return double(keys) * std::max(1.0, target.key_cost[kind] + rows * target.row_cost[kind]);
}

double item_budget(double total, int num_kv_heads, const PlanTarget& target) {
  const Thresholds& t = target.thresholds;
  const double heads = target.heads_in_parallel ? num_kv_heads : 1;
  const double workers = std::max(1.0, target.workers / heads);
  if (workers <= 1 || total < 2.0 * t.min_item_cost) {
    return std::numeric_limits<double>::infinity();
  }
  // Use a multiple of the worker count: with three items on two workers, one idles.
  const double per_worker = total / (workers * t.min_item_cost);
  if (per_worker < 1) {
    const double least = target.least_workers / heads;
    return least > 1 ? std::min(double(t.min_item_cost), total / least) : t.min_item_cost;
  }
  return total / (workers * std::min(std::round(per_worker), double(t.items_per_worker)));
}

int piece_count(double cost, double budget, int keys, int entries, const PlanTarget& target) {
  if (cost <= 1.5 * budget) {
    return 1;
  }
  const int count = int(std::min(std::ceil(cost / budget - kRounding), 1e6));
  return std::max(1, std::min({count, keys / target.thresholds.min_partition, entries}));
}

} // namespace paged_mlx
