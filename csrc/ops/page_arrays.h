// The arrays of a layer's pages as operations take them, in the order of page_format.h, and what
// they must have in common: all of these throw std::invalid_argument.
#pragma once

#include <vector>

#include "mlx/array.h"

#include "cpu/page_side.h"
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

// Pages that no other array tells the dtype of. Returns it.
mx::Dtype check_page_dtypes(const char* op, const std::vector<mx::array>& pages,
                            PageFormats formats);

// A side of so many arrays from `arrays` on, as the CPU's kernels take it; dense pages alone.
cpu::PageSide page_side(const mx::array* arrays, PageFormat format, int dim, bool rotated = false);
cpu::PageSide dense_side(const mx::array& pages, bool rotated = false);

// Where the arrays of a layer stand among a node's inputs or outputs.
struct LayerArrays {
  PageFormats formats;
  int head_dim, v_head_dim;
  int first = 0; // index of the first

  bool operator==(const LayerArrays&) const = default;
  int count() const {
    return num_arrays(formats);
  }
  int v() const {
    return first + num_arrays(formats.k);
  }
  int open_k() const {
    return v() + num_arrays(formats.v);
  }
  // Open pages of a layer; 0 where the formats have none.
  int num_open(const std::vector<mx::array>& arrays) const {
    return formats.has_open_pages() ? arrays[open_k()].shape(0) : 0;
  }

  // Names the layer's arrays to a call of the launch code; at(i): array i of the node.
  template <typename Call, typename At>
  void bind(Call& call, At at) const {
    call.formats = formats;
    call.k_pages = at(first);
    call.v_pages = at(v());
    if (formats.k != PageFormat::dense) {
      call.k_scales = {at(first + 1), at(first + 2)};
    }
    if (formats.v != PageFormat::dense) {
      call.v_scales = {at(v() + 1), at(v() + 2)};
    }
  }
  template <typename Call, typename At>
  void bind_open(Call& call, At at) const {
    if (formats.has_open_pages()) {
      call.open_k = at(open_k());
      call.open_v = at(open_k() + 1);
    }
  }

  // The two sides, and those of the open pages, as the CPU's kernels take them.
  cpu::PageSide k_side(const std::vector<mx::array>& arrays) const;
  cpu::PageSide v_side(const std::vector<mx::array>& arrays) const;
  cpu::PageSide open_k_side(const std::vector<mx::array>& arrays) const;
  cpu::PageSide open_v_side(const std::vector<mx::array>& arrays) const;
};

} // namespace paged_mlx
