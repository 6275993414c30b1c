#include "plan/targets.h"

namespace paged_mlx {

// The costs are those of benchmarks/results/cost_model_v4_bf16.json, of the dearer
// of the two types of 16 bits.
PlanTarget cpu_target(int threads, int itemsize) {
  PlanTarget target;
  target.workers = threads;
  target.heads_in_parallel = false;
  target.vector_rows = 2;
  target.tile_rows = 24;
  target.wide_rows = 384;
  target.min_partition = 128;
  target.min_item_cost = itemsize == 4 ? 2048 : 4096;
  target.items_per_worker = 4;
  const bool float32 = itemsize == 4;
  target.key_cost[kVectorItem] = 1;
  target.row_cost[kVectorItem] = 0;
  target.key_cost[kTileItem] = float32 ? 0.69 : 0.36;
  target.row_cost[kTileItem] = float32 ? 0.086 : 0.23;
  target.key_cost[kWideItem] = float32 ? 1.5 : 2.8;
  target.row_cost[kWideItem] = float32 ? 0.068 : 0.17;
  target.partial_cost = float32 ? 1.3 : 2.2;
  target.item_cost = 1.5;
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
  target.row_cost[kVectorItem] = 0.12 * product;
  target.row_cost[kTileItem] = 0.06 * product;
  target.row_cost[kWideItem] = 0.06 * product;
  target.partial_cost = 4;
  target.item_cost = 64;
  return target;
}

} // namespace paged_mlx
