#include "ops/page_arrays.h"

#include <string>

namespace paged_mlx {

void check_page_shapes(const char* op, ShapeCheck& shape, const std::vector<mx::array>& pages,
                       PageFormats formats) {
  if (!formats.dense()) {
    fail(op, "formats must be (None, None)", "another format");
  }
  if (pages.size() != size_t(num_arrays(formats))) {
    fail(op, "pages must hold " + std::to_string(num_arrays(formats)) + " arrays, those of a layer",
         std::to_string(pages.size()));
  }
  shape("k_pages", pages[0], {"num_pages", "num_kv_heads", "page_size", "head_dim"});
  shape("v_pages", pages[1], {"num_pages", "num_kv_heads", "page_size", "v_head_dim"});
}

void check_page_dtypes(const char* op, const std::vector<mx::array>& pages, PageFormats formats,
                       mx::Dtype dtype, const char* why) {
  check_dtype(op, "k_pages", pages[0], dtype, why);
  check_dtype(op, "v_pages", pages[1], dtype, why);
}

void check_page_dtypes(const char* op, const std::vector<mx::array>& pages, PageFormats formats) {
  check_float(op, "k_pages", pages[0]);
  check_page_dtypes(op, pages, formats, pages[0].dtype(), "the dtype of k_pages");
}

} // namespace paged_mlx
