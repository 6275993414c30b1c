#include "ops/plan_target.h"

#include <limits>

#include "cpu/dispatch.h"
#include "metal/gpu_cores.h"

namespace paged_mlx {

namespace {

// What kernels on the host stand in for: the smallest GPU of a Mac.
constexpr int kHostCores = 8;

PlanTarget kernels_target(const TargetOptions& options, int itemsize) {
  const metal::Body widest = metal::choose_body(
      std::numeric_limits<int>::max(), options.head_dim, options.v_head_dim, options.dtype);
  const int cores = metal::gpu_cores();
  return metal_target(cores > 0 ? cores : kHostCores, itemsize, widest.rows);
}

} // namespace

PlanTarget target_of(const TargetOptions& options) {
  const int itemsize = options.dtype == cpu::DType::float32 ? 4 : 2;
  PlanTarget target = options.kernels ? kernels_target(options, itemsize)
                                      : cpu_target(cpu::num_threads(), itemsize, cpu::kernels().lanes);
  if (options.workers > 0) {
    target.workers = options.workers;
  }
  return target;
}

} // namespace paged_mlx
