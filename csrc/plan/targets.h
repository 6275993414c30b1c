// The width of each backend and the costs of its work: the one table of figures.
#pragma once

#include <optional>

#include "plan/cost.h"

namespace paged_mlx {

enum class PlanDevice { cpu, gpu };

// The CPU backend with `threads` threads and vectors of `lanes` floats, for elements of
// `itemsize` bytes.
PlanTarget cpu_target(int threads, int itemsize, int lanes);

// A GPU of `cores` cores whose bodies attend `rows` rows, and which hold `resident` threadgroups
// at the same time (0: nobody knows).
PlanTarget gpu_target(int cores, int itemsize, const KindRows& rows, int resident);

// Whether MLX's attention has a fused kernel for these head dims on a GPU; without one it
// keeps all scores in memory.
bool has_fused_sdpa(int head_dim, int v_head_dim);

// Thresholds of a device for elements of `itemsize` bytes: those measured on this machine, or
// those of the table.
Thresholds thresholds(PlanDevice device, int itemsize);
bool thresholds_are_measured(PlanDevice device, int itemsize);

// Puts thresholds measured on this machine in place of the table's; none: the table's again.
void set_thresholds(PlanDevice device, int itemsize, const std::optional<Thresholds>& measured);

} // namespace paged_mlx
