// What each backend can do at once and what things cost it.
#pragma once

#include "planner.h"

namespace paged_mlx {

// The CPU backend with `threads` threads and vectors of `lanes` floats, for elements of
// `itemsize` bytes.
PlanTarget cpu_target(int threads, int itemsize, int lanes);

// A GPU of `cores` cores. `wide_rows`: rows that a threadgroup of its widest
// body attends.
PlanTarget metal_target(int cores, int itemsize, int wide_rows);

} // namespace paged_mlx
