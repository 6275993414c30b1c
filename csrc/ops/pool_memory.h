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
// system has them: kernels that read pages all over a pool spend less on finding them.
mx::array pool_memory(const std::optional<mx::array>& kept, const mx::Shape& shape, float fill,
                      mx::Dtype dtype, mx::StreamOrDevice s = {});

} // namespace paged_mlx
