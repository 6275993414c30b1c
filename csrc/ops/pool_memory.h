// The memory of a pool: fresh pages, and pages that become more or fewer.
#pragma once

#include <optional>

#include "mlx/array.h"
#include "mlx/utils.h"

namespace paged_mlx {

namespace mx = mlx::core;

// New memory for pages of `shape` [num_pages, num_kv_heads, page_size, head_dim]: those
// of `kept`, as far as there are any and as many as there is room for, then pages full of
// `fill`. The rest of kept's shape is that of `shape`.
//
// On the CPU it begins at a page of the machine's memory, and lies in huge ones where the
// system has them: kernels that read pages all over a pool spend less on finding them. Where
// MLX has no GPU, it may have addresses for `most_pages` pages; the system then gives memory for
// pages full of 0 when they are first touched, and MLX counts it from the beginning.
mx::array pool_memory(const std::optional<mx::array>& kept, const mx::Shape& shape, float fill,
                      mx::Dtype dtype, int most_pages = 0, mx::StreamOrDevice s = {});

// Pages that have been computed in memory of pool_memory's, with more or fewer of them: what
// they hold stays where it is, and of all their versions those that drop out read 0. None, and
// nothing has changed, where there are no addresses for so many, or there is no memory.
std::optional<mx::array> resized_in_place(const mx::array& pages, int num_pages, float fill);

} // namespace paged_mlx
