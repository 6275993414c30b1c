// The target of a plan: the device that the operation will run on.
#pragma once

#include "metal/launch.h"
#include "plan/targets.h"

namespace paged_mlx {

struct TargetOptions {
  bool kernels; // Metal kernels run it: on the GPU, or on the host
  int workers;  // items that run at the same time; 0: as the device has
  int cores;    // of the GPU; 0: as it has
  cpu::DType dtype;
  int head_dim, v_head_dim;
  int gqa_factor;
  PageFormats formats;
};

PlanTarget target_of(const TargetOptions& options);

} // namespace paged_mlx
