// What Metal says of the pipelines made so far.
#pragma once

#include <map>
#include <string>

namespace paged_mlx::metal {

void note_pipeline(const std::string& name, int max_threads);

// Most threads of a threadgroup by the name of the pipeline: fewer than 1,024 tell how many
// registers it takes.
std::map<std::string, int> pipeline_limits();

} // namespace paged_mlx::metal
