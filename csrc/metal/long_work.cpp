#include "metal/long_work.h"

#include <algorithm>
#include <atomic>
#include <numeric>

#include "plan_format.h"

namespace paged_mlx::metal {

namespace {

// A fraction of a second on the slowest GPU that runs MLX.
constexpr double kNodeWork = 2e11;

std::atomic<double> g_node_work{kNodeWork};

const PlanHeader& header(const int32_t* plan) {
  return *reinterpret_cast<const PlanHeader*>(plan);
}

// No plan holds more multiply-adds; known without looking at its items.
double most_work(const int32_t* plan, int dims) {
  const PlanHeader& h = header(plan);
  return double(h.num_row_tokens) * h.max_row_end * h.num_q_heads * dims;
}

double work_of(const int32_t* plan, int item, int dims) {
  const auto& at = reinterpret_cast<const PlanItem*>(plan + header(plan).items)[item];
  return double(std::max(0, at.key_end - at.key_begin)) * at.row_count * header(plan).num_q_heads *
      dims;
}

int num_items(const int32_t* plan) {
  const auto& counts = header(plan).num_items;
  return std::accumulate(std::begin(counts), std::end(counts), 0);
}

} // namespace

double node_work() {
  return g_node_work;
}

void set_node_work(double multiply_adds) {
  g_node_work = multiply_adds > 0 ? multiply_adds : kNodeWork;
}

double share_of_node(const int32_t* plan, const ItemRange& range, int dims) {
  constexpr double kSmall = 0.01;
  const double at_most = most_work(plan, dims) / node_work();
  if (at_most < kSmall) {
    return at_most;
  }
  double work = 0;
  for (int i = range.begin; i < std::min(range.end, num_items(plan)); i++) {
    work += work_of(plan, i, dims);
  }
  return work / node_work();
}

std::vector<ItemRange> cut_items(const int32_t* plan, int dims) {
  if (most_work(plan, dims) <= node_work()) {
    return {{}};
  }
  std::vector<ItemRange> ranges = {{}};
  const int count = num_items(plan);
  double work = 0;
  for (int i = 0; i < count; i++) {
    if (work >= node_work()) {
      ranges.back().end = i;
      ranges.push_back({i});
      work = 0;
    }
    work += work_of(plan, i, dims);
  }
  return ranges;
}

} // namespace paged_mlx::metal
