#include "ops/plan_target.h"

#include <algorithm>

#include "cpu/dispatch.h"
#include "metal/gpu_cores.h"
#include "metal/pipeline_limits.h"

namespace paged_mlx {

namespace {

// What kernels on the host stand in for: the smallest GPU of a Mac.
constexpr int kHostCores = 8;

PlanTarget kernels_target(const TargetOptions& options, int itemsize) {
  const int cores = options.cores > 0 ? options.cores : metal::gpu_cores();
  const int head_dim = options.head_dim, v_head_dim = options.v_head_dim;
  const KindRows rows = metal::kind_rows(head_dim, v_head_dim, options.dtype, options.formats);
  const metal::Body decodes = metal::choose_body(kVectorItem, options.gqa_factor, head_dim,
                                                 v_head_dim, options.dtype, options.formats);
  const int resident =
      metal::threadgroups_per_core(decodes, options.dtype, head_dim, v_head_dim, options.formats);
  PlanTarget target = gpu_target(cores > 0 ? cores : kHostCores, itemsize, rows, resident);
  if (!has_fused_sdpa(head_dim, v_head_dim)) {
    target.thresholds.sdpa_prompt = 0;
  }
  return target;
}

} // namespace

PlanTarget target_of(const TargetOptions& options) {
  const int itemsize = options.dtype == cpu::DType::float32 ? 4 : 2;
  PlanTarget target = options.kernels
      ? kernels_target(options, itemsize)
      : cpu_target(cpu::num_threads(), itemsize, cpu::kernels().lanes);
  if (options.workers > 0) {
    target.workers = options.workers;
    target.least_workers = std::min(target.least_workers, target.workers);
  }
  return target;
}

} // namespace paged_mlx
