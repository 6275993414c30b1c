// The instruction set that the kernels use.
#pragma once

#include <string>
#include <vector>

#include "cpu/job.h"

namespace paged_mlx::cpu {

// The kernels in use: the best that this machine runs, unless set_isa chose.
const Kernels& kernels();

// Names that this machine runs, the best last: "v2", "v3", "v4", "v4_bf16", or "neon".
std::vector<std::string> isa_names();
std::string isa();

// Uses the kernels of that name from now on, so that one machine can test them
// all; "" is the best again. False, and nothing changes, when there are none.
bool set_isa(const std::string& name);

} // namespace paged_mlx::cpu
