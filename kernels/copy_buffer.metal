// The old contents of a buffer that a write could not reuse.
//
// Grid: one thread per unit; threadgroups in x, then in y.

#include "page_moves.h"

using namespace paged_mlx;

[[kernel]] void copy_buffer(constant long& units [[buffer(PAGED_MLX_BUFFER_ARGUMENTS)]],
                            const device Unit* from [[buffer(PAGED_MLX_BUFFER_K_PAGES)]],
                            device Unit* to [[buffer(PAGED_MLX_BUFFER_V_PAGES)]],
                            uint3 group [[threadgroup_position_in_grid]],
                            uint3 groups [[threadgroups_per_grid]],
                            uint3 size [[threads_per_threadgroup]],
                            uint thread_index [[thread_index_in_threadgroup]]) {
  const long at = (long(group.y) * groups.x + group.x) * size.x + thread_index;
  if (at < units) {
    to[at] = from[at];
  }
}
