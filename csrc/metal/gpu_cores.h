// Cores of the GPU, which Metal itself does not tell.
#pragma once

#include <string>

namespace paged_mlx::metal {

// Of a GPU of this architecture ("applegpu_g14s"), about: the last letter names
// the size of the chip.
int cores_of_architecture(const std::string& architecture);

// Of this machine's GPU: what the I/O Registry says, else what its architecture
// suggests. 0: there is none.
int gpu_cores();

} // namespace paged_mlx::metal
