// What each backend can do at once and what things cost it.
#pragma once

#include "planner.h"

namespace paged_mlx {

// The CPU backend with `threads` threads, for elements of `itemsize` bytes.
PlanTarget cpu_target(int threads, int itemsize);

} // namespace paged_mlx
