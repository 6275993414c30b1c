#include "plan/targets.h"

namespace paged_mlx {

namespace {

// Of benchmarks/results/cost_model_<isa>.json; of the two types of 16 bits the dearer.
struct BodyCosts {
  double key, row, item, partial;
};
struct CpuCosts {
  int tile_rows; // more are cheaper as wide items
  BodyCosts tile, wide;
};
// v4_bf16; items and partials of the wide body are those of an earlier fit of v3.
constexpr CpuCosts kAvx512Float32 = {24, {0.69, 0.086, 1.5, 1.3}, {1.5, 0.068, 9.5, 2.1}};
constexpr CpuCosts kAvx512Halves = {24, {0.36, 0.23, 1.5, 2.2}, {2.8, 0.17, 1.5, 4.2}};
// v3
constexpr CpuCosts kNarrowFloat32 = {12, {0.54, 0.114, 0, 1.2}, {0.60, 0.059, 12.0, 2.6}};
constexpr CpuCosts kNarrowHalves = {12, {0.50, 0.198, 8.2, 1.6}, {0.88, 0.129, 21.0, 4.7}};

void set_costs(PlanTarget& target, PlanKind kind, const BodyCosts& costs) {
  target.key_cost[kind] = costs.key;
  target.row_cost[kind] = costs.row;
  target.item_cost[kind] = costs.item;
  target.partial_cost[kind] = costs.partial;
}

} // namespace

PlanTarget cpu_target(int threads, int itemsize, int lanes) {
  const bool float32 = itemsize == 4;
  const CpuCosts& costs = lanes == 16 ? (float32 ? kAvx512Float32 : kAvx512Halves)
                                      : (float32 ? kNarrowFloat32 : kNarrowHalves);
  PlanTarget target;
  target.workers = threads;
  target.heads_in_parallel = false;
  target.vector_rows = 2;
  target.tile_rows = costs.tile_rows;
  target.wide_rows = 384;
  target.min_partition = 128;
  target.min_item_cost = float32 ? 2048 : 4096;
  target.items_per_worker = 4;
  set_costs(target, kVectorItem, {1, 0, costs.tile.item, costs.tile.partial});
  set_costs(target, kTileItem, costs.tile);
  set_costs(target, kWideItem, costs.wide);
  return target;
}

// Four threadgroups of four simdgroups keep a core busy while others wait for
// memory. The costs weigh a core's arithmetic against its share of the memory's
// bandwidth; they are not fitted to measurements.
PlanTarget metal_target(int cores, int itemsize, int wide_rows) {
  constexpr int kThreadgroupsPerCore = 4;
  PlanTarget target;
  target.workers = cores * kThreadgroupsPerCore;
  target.heads_in_parallel = true;
  target.vector_rows = 2;
  target.tile_rows = 16;
  target.wide_rows = wide_rows;
  target.min_partition = 256;
  target.min_item_cost = 512;
  target.items_per_worker = 1;
  const double product = itemsize == 4 ? 0.5 : 1; // beside the bytes of a key
  set_costs(target, kVectorItem, {0, 0.12 * product, 64, 4});
  set_costs(target, kTileItem, {0, 0.06 * product, 64, 4});
  set_costs(target, kWideItem, {0, 0.06 * product, 64, 4});
  return target;
}

} // namespace paged_mlx
