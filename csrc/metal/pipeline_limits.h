// The limits that Metal reports of the pipelines made so far.
#pragma once

#include <map>
#include <string>

#include "metal/launch.h"
#include "metal/variant.h"

namespace paged_mlx::metal {

// Most threads of a threadgroup of this variant; 0: forget it.
void note_pipeline(const Variant& variant, int max_threads);

// Most threads of a threadgroup by the name of the pipeline: fewer than 1,024 tell how many
// registers it takes.
std::map<std::string, int> pipeline_limits();

// Threadgroups of a body that a core holds at the same time, by the lowest limit of its
// pipelines; 0: none is made yet.
int threadgroups_per_core(const Body& body, DType dtype, int head_dim, int v_head_dim,
                          PageFormats formats);

} // namespace paged_mlx::metal
