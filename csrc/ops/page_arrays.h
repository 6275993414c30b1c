// The arrays of a layer's pages as operations take them, in the order of page_format.h, and what
// they must have in common: all of these throw std::invalid_argument.
#pragma once

#include <vector>

#include "mlx/array.h"

#include "page_format.h"
#include "shape_check.h"

namespace paged_mlx {

namespace mx = mlx::core;

// `shape` knows num_pages, num_kv_heads, page_size, head_dim and v_head_dim then.
void check_page_shapes(const char* op, ShapeCheck& shape, const std::vector<mx::array>& pages,
                       PageFormats formats);

// `why` is a clause such as "the dtype of q".
void check_page_dtypes(const char* op, const std::vector<mx::array>& pages, PageFormats formats,
                       mx::Dtype dtype, const char* why);

// Pages that no other array tells the dtype of.
void check_page_dtypes(const char* op, const std::vector<mx::array>& pages, PageFormats formats);

} // namespace paged_mlx
