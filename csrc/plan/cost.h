// The cost model of attention: kinds of items, costs, thresholds. The planner weighs
// with nothing else.
#pragma once

#include <cstdint>

#include "plan_format.h"

namespace paged_mlx {

// Most rows per KV head of an item of each kind. Prompts are cut into items of `wide` rows.
struct KindRows {
  int vector = 2;
  int tile = 16;
  int wide = 384;
};

// The kind of an item of `rows` rows per KV head.
inline PlanKind kind_of(int rows, const KindRows& most) {
  return rows <= most.vector ? kVectorItem : rows <= most.tile ? kTileItem : kWideItem;
}

// Thresholds of a device. Defaults are in targets.cpp; `python -m paged_mlx tune` measures them.
struct Thresholds {
  int workers_per_core;       // items that one core, or one CPU thread, runs at the same time
  int least_workers_per_core; // a step is cut into so many items however short; 0: into none
  int items_per_worker;       // more than one, so that uneven items balance
  int min_partition;          // tokens; a shorter range is not cut
  int min_item_cost;          // a step that costs less than two of these is not cut
  int sdpa_prompt; // a fresh prompt of so many tokens goes to MLX's attention; 0: none does
};

#define PAGED_MLX_THRESHOLDS(FIELD) \
  FIELD(workers_per_core)           \
  FIELD(least_workers_per_core)     \
  FIELD(items_per_worker)           \
  FIELD(min_partition)              \
  FIELD(min_item_cost)              \
  FIELD(sdpa_prompt)

// What one backend can do at once and what things cost it. The unit of cost is
// one key of one KV head read from memory. A key costs an item of R rows
// max(1, key_cost + R * row_cost) of its body; benchmarks/fit_cost_model.py fits
// these costs for the CPU.
struct PlanTarget {
  KindRows rows;
  int workers = 1;                // items that run at the same time
  int least_workers = 0;          // so many get an item, however short
  bool heads_in_parallel = false; // KV heads of one item run on workers of their own
  Thresholds thresholds{1, 0, 4, 256, 4096, 0};
  bool measured = false;                      // the thresholds were measured on this machine
  double key_cost[kNumPlanKinds] = {0, 0, 0}; // one key, whatever the rows, by body
  double row_cost[kNumPlanKinds] = {0.05, 0.05, 0.05}; // one key for one row, by body
  double item_cost[kNumPlanKinds] = {64, 64, 64};      // start an item, by body
  double partial_cost[kNumPlanKinds] = {8, 8, 8}; // one row's partial result, by body: made, merged
};

// Cost of `rows` rows per KV head against `keys` keys.
double attend_cost(int rows, int64_t keys, const PlanTarget& target);

// Cost that one item may have so that every worker is busy, of a step whose work in units that
// run one at a time costs `total`. Infinite: the step is not cut.
double item_budget(double total, int num_kv_heads, const PlanTarget& target);

// Pieces of a range of `keys` keys in `entries` pages that costs `cost`.
int piece_count(double cost, double budget, int keys, int entries, const PlanTarget& target);

} // namespace paged_mlx
