#include "plan/targets.h"

namespace paged_mlx {

PlanTarget cpu_target(int threads, int itemsize) {
  PlanTarget target;
  target.workers = threads;
  target.heads_in_parallel = false;
  target.vector_rows = 2;
  target.tile_rows = 32;
  target.wide_rows = 384;
  target.min_partition = 128;
  target.min_item_cost = itemsize == 4 ? 2048 : 4096;
  target.items_per_worker = 4;
  for (double& cost : target.row_cost) {
    cost = itemsize == 4 ? 0.11 : 0.2;
  }
  target.partial_cost = 4;
  target.item_cost = 32;
  return target;
}

} // namespace paged_mlx
