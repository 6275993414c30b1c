// The machine as this process may use it.
#pragma once

#include <cstddef>

namespace paged_mlx::cpu {

// Physical cores in the affinity mask of the process, no more than its cgroup
// may keep busy. At least 1.
int usable_cores();

constexpr size_t kHugePage = 2 << 20;

// Asks for huge pages under the whole ones of [begin, begin + bytes), which nothing has
// touched yet. A wish: where the system has none to give, nothing happens.
void use_huge_pages(void* begin, size_t bytes);

// Gives the memory under [begin, begin + bytes) back; what it holds then is of no matter. Also a
// wish.
void give_back(void* begin, size_t bytes);

} // namespace paged_mlx::cpu
