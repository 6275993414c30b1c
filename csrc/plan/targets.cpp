#include "plan/targets.h"

#include <algorithm>
#include <mutex>

namespace paged_mlx {

namespace {

// By device, for elements of 2 bytes and of 4. Those of the GPU follow from arithmetic about the
// hardware: four threadgroups of four simdgroups keep a core busy while others wait for memory,
// and a threadgroup reads 32 keys a simdgroup in one step.
constexpr Thresholds kThresholds[2][2] = {
    {{1, 0, 4, 128, 4096, 0}, {1, 0, 4, 128, 2048, 0}},
    {{4, 2, 1, 16, 128, 64}, {4, 2, 1, 16, 128, 64}},
};

struct Measured {
  std::mutex mutex;
  std::optional<Thresholds> of[2][2];
};

Measured& measured() {
  static Measured all;
  return all;
}

int column(int itemsize) {
  return itemsize == 4;
}

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

PlanTarget target_on(PlanDevice device, int cores, int itemsize) {
  PlanTarget target;
  target.thresholds = thresholds(device, itemsize);
  target.measured = thresholds_are_measured(device, itemsize);
  target.workers = cores * target.thresholds.workers_per_core;
  target.least_workers = cores * target.thresholds.least_workers_per_core;
  return target;
}

} // namespace

bool has_fused_sdpa(int head_dim, int v_head_dim) {
  return head_dim == v_head_dim && (head_dim == 64 || head_dim == 80 || head_dim == 128);
}

Thresholds thresholds(PlanDevice device, int itemsize) {
  Measured& all = measured();
  const std::lock_guard lock(all.mutex);
  return all.of[int(device)][column(itemsize)].value_or(kThresholds[int(device)][column(itemsize)]);
}

bool thresholds_are_measured(PlanDevice device, int itemsize) {
  Measured& all = measured();
  const std::lock_guard lock(all.mutex);
  return all.of[int(device)][column(itemsize)].has_value();
}

void set_thresholds(PlanDevice device, int itemsize, const std::optional<Thresholds>& measured_) {
  Measured& all = measured();
  const std::lock_guard lock(all.mutex);
  all.of[int(device)][column(itemsize)] = measured_;
}

PlanTarget cpu_target(int threads, int itemsize, int lanes) {
  const bool float32 = itemsize == 4;
  const CpuCosts& costs = lanes == 16 ? (float32 ? kAvx512Float32 : kAvx512Halves)
                                      : (float32 ? kNarrowFloat32 : kNarrowHalves);
  PlanTarget target = target_on(PlanDevice::cpu, threads, itemsize);
  target.rows = {2, costs.tile_rows, 384};
  target.heads_in_parallel = false;
  set_costs(target, kVectorItem, {1, 0, costs.tile.item, costs.tile.partial});
  set_costs(target, kTileItem, costs.tile);
  set_costs(target, kWideItem, costs.wide);
  return target;
}

// The costs weigh a core's arithmetic against its share of the memory's bandwidth; they are
// not fitted to measurements.
PlanTarget gpu_target(int cores, int itemsize, const KindRows& rows, int resident) {
  PlanTarget target = target_on(PlanDevice::gpu, cores, itemsize);
  if (resident > 0 && !target.measured) {
    target.workers = std::min(target.workers, cores * resident);
    target.least_workers = std::min(target.least_workers, target.workers);
  }
  target.rows = rows;
  target.heads_in_parallel = true;
  const double product = itemsize == 4 ? 0.5 : 1; // beside the bytes of a key
  set_costs(target, kVectorItem, {0, 0.12 * product, 64, 4});
  set_costs(target, kTileItem, {0, 0.06 * product, 64, 4});
  set_costs(target, kWideItem, {0, 0.06 * product, 64, 4});
  return target;
}

} // namespace paged_mlx
