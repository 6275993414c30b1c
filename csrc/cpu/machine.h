// The machine as this process may use it.
#pragma once

namespace paged_mlx::cpu {

// Physical cores in the affinity mask of the process, no more than its cgroup
// may keep busy. At least 1.
int usable_cores();

} // namespace paged_mlx::cpu
