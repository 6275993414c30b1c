#include "ops/page_arrays.h"

#include <string>

#include "ops/dtypes.h"

namespace paged_mlx {

namespace {

// Names of a side's arrays and of their axes, in errors.
struct SideNames {
  const char *pages, *codes, *scales, *biases, *dim, *words, *groups;
};
constexpr SideNames kNames[2] = {
    {"k_pages", "k_codes", "k_scales", "k_biases", "head_dim", "k_words", "k_groups"},
    {"v_pages", "v_codes", "v_scales", "v_biases", "v_head_dim", "v_words", "v_groups"},
};

void check_codes(const char* op, ShapeCheck& shape, const mx::array* side, PageFormat format,
                 const SideNames& names) {
  shape(names.codes, side[0], {"num_pages", "num_kv_heads", "page_size", names.words});
  const int dim = side[0].shape(3) * (32 / code_bits(format));
  shape.set(names.codes, names.dim, dim);
  if (format == PageFormat::channel4) {
    shape(names.scales, side[1], {"num_pages", "num_kv_heads", names.dim});
    shape(names.biases, side[2], {"num_pages", "num_kv_heads", names.dim});
    return;
  }
  const int group = group_size(dim);
  if (group == 0 || (format == PageFormat::token4 && rotation_size(dim) == 0)) {
    fail(op,
         std::string(names.codes) + " must be of a head_dim that " +
             (group == 0 ? "32 divides" : "is a power of two or that 64 divides"),
         std::to_string(dim));
  }
  shape.set(names.codes, names.groups, dim / group);
  shape(names.scales, side[1], {"num_pages", "num_kv_heads", "page_size", names.groups});
  shape(names.biases, side[2], {"num_pages", "num_kv_heads", "page_size", names.groups});
}

void check_side(const char* op, ShapeCheck& shape, const mx::array* side, PageFormat format,
                const SideNames& names) {
  if (format == PageFormat::dense) {
    shape(names.pages, side[0], {"num_pages", "num_kv_heads", "page_size", names.dim});
  } else {
    check_codes(op, shape, side, format, names);
  }
}

} // namespace

void check_page_shapes(const char* op, ShapeCheck& shape, const std::vector<mx::array>& pages,
                       PageFormats formats) {
  if (pages.size() != size_t(num_arrays(formats))) {
    fail(op,
         "pages must hold " + std::to_string(num_arrays(formats)) +
             " arrays, those of a layer of its formats",
         std::to_string(pages.size()));
  }
  const LayerArrays layer{formats, 0, 0};
  check_side(op, shape, pages.data(), formats.k, kNames[0]);
  check_side(op, shape, pages.data() + layer.v(), formats.v, kNames[1]);
  if (formats.has_open_pages()) {
    const mx::array* const open = pages.data() + layer.open_k();
    shape("open_k", open[0], {"num_open", "num_kv_heads", "page_size", "head_dim"});
    shape("open_v", open[1], {"num_open", "num_kv_heads", "page_size", "v_head_dim"});
  }
}

void check_page_dtypes(const char* op, const std::vector<mx::array>& pages, PageFormats formats,
                       mx::Dtype dtype, const char* why) {
  const LayerArrays layer{formats, 0, 0};
  auto side = [&](int first, PageFormat format, const SideNames& names) {
    if (format == PageFormat::dense) {
      return check_dtype(op, names.pages, pages[first], dtype, why);
    }
    check_dtype(op, names.codes, pages[first], mx::uint32, "codes");
    check_dtype(op, names.scales, pages[first + 1], dtype, why);
    check_dtype(op, names.biases, pages[first + 2], dtype, why);
  };
  side(0, formats.k, kNames[0]);
  side(layer.v(), formats.v, kNames[1]);
  if (formats.has_open_pages()) {
    check_dtype(op, "open_k", pages[layer.open_k()], dtype, why);
    check_dtype(op, "open_v", pages[layer.open_k() + 1], dtype, why);
  }
}

mx::Dtype check_page_dtypes(const char* op, const std::vector<mx::array>& pages,
                            PageFormats formats) {
  const bool coded = formats.k != PageFormat::dense;
  check_float(op, coded ? "k_scales" : "k_pages", pages[coded]);
  check_page_dtypes(op, pages, formats, pages[coded].dtype(),
                    coded ? "the dtype of k_scales" : "the dtype of k_pages");
  return pages[coded].dtype();
}

cpu::PageSide page_side(const mx::array* arrays, PageFormat format, int dim, bool rotated) {
  const bool coded = format != PageFormat::dense;
  cpu::PageSide side;
  side.format = format;
  side.dtype = cpu_dtype(arrays[coded].dtype());
  side.dim = dim;
  side.num_pages = arrays[0].shape(0);
  side.page_size = arrays[0].shape(2);
  side.rotated = rotated;
  auto data = [](const mx::array& array) { return const_cast<char*>(array.data<char>()); };
  side.pages = data(arrays[0]);
  side.scales = coded ? data(arrays[1]) : nullptr;
  side.biases = coded ? data(arrays[2]) : nullptr;
  return side;
}

cpu::PageSide dense_side(const mx::array& pages, bool rotated) {
  return page_side(&pages, PageFormat::dense, pages.shape(3), rotated);
}

cpu::PageSide LayerArrays::k_side(const std::vector<mx::array>& arrays) const {
  return page_side(arrays.data() + first, formats.k, head_dim);
}

cpu::PageSide LayerArrays::v_side(const std::vector<mx::array>& arrays) const {
  return page_side(arrays.data() + v(), formats.v, v_head_dim, formats.rotates());
}

cpu::PageSide LayerArrays::open_k_side(const std::vector<mx::array>& arrays) const {
  return formats.has_open_pages() ? dense_side(arrays[open_k()]) : cpu::PageSide{};
}

cpu::PageSide LayerArrays::open_v_side(const std::vector<mx::array>& arrays) const {
  return formats.has_open_pages() ? dense_side(arrays[open_k() + 1], formats.rotates())
                                  : cpu::PageSide{};
}

} // namespace paged_mlx
