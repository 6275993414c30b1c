// What the kernels that move pages share. They move units of 16, 8, 4, 2
// or 1 bytes, the widest that the rows allow, and know no dtype. Compiled with the
// macro PAGED_MLX_UNIT: uint4, uint2, uint, ushort or uchar.
#ifndef PAGED_MLX_PAGE_MOVES_H
#define PAGED_MLX_PAGE_MOVES_H

#include <metal_stdlib>

#include "arguments.h"

namespace paged_mlx {

using namespace metal;

typedef PAGED_MLX_UNIT Unit;

} // namespace paged_mlx

#endif
