// Whole pages are copied, in many pools by one dispatch.
//
//   pairs    [num_pairs, 2]   int32: source and target page; no page is both
//   pool<b>  [num_pages, page_units[b - PAGED_MLX_BUFFER_POOLS]]
//
// Grid: x over the units of the largest page, in threads; y over pairs; z over
// pools. Buffers of pools that are not there are bound to any other.

#include "page_moves.h"

using namespace paged_mlx;

// Metal takes no array of buffers: each is a parameter of its own, named after
// its index.
// clang-format off
#define PAGED_MLX_EACH_POOL(X) \
  X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12) X(13) X(14) X(15) \
  X(16) X(17) X(18) X(19) X(20) X(21) X(22) X(23) X(24) X(25) X(26) X(27) X(28) X(29)
// clang-format on
#define PAGED_MLX_POOL_PARAMETER(b) device Unit *pool##b [[buffer(b)]],
#define PAGED_MLX_POOL_CASE(b)     \
  case b - PAGED_MLX_BUFFER_POOLS: \
    pool = pool##b;                \
    break;

[[kernel]] void copy_pages(constant CopyPagesArguments& arguments
                           [[buffer(PAGED_MLX_BUFFER_ARGUMENTS)]],
                           const device int2* pairs [[buffer(PAGED_MLX_BUFFER_PAIRS)]],
                           PAGED_MLX_EACH_POOL(PAGED_MLX_POOL_PARAMETER) uint3 group
                           [[threadgroup_position_in_grid]],
                           uint3 size [[threads_per_threadgroup]],
                           uint thread_index [[thread_index_in_threadgroup]]) {
  const long units = arguments.page_units[group.z];
  const long unit = long(group.x) * size.x + thread_index;
  const int2 pair = pairs[group.y];
  if (unit >= units || pair.x == pair.y) {
    return;
  }
  device Unit* pool = nullptr;
  switch (group.z) { PAGED_MLX_EACH_POOL(PAGED_MLX_POOL_CASE) }
  pool[pair.y * units + unit] = pool[pair.x * units + unit];
}
