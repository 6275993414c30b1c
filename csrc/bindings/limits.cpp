#include "cpu/limits.h"

#include <algorithm>

#include <nanobind/ndarray.h>

#include "mlx/array.h"

#include "bindings/module.h"
#include "shape_check.h"

namespace nb = nanobind;
namespace mx = mlx::core;
using namespace nb::literals;

namespace paged_mlx {

namespace {

using Ints = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

size_t page_bytes(const char* name, const mx::array& pages) {
  if (pages.ndim() != 4 || !pages.is_available() || !pages.flags().row_contiguous) {
    const std::string must = std::string(name) + " must be evaluated pages, row by row";
    fail("read_pages", must, "something else");
  }
  return pages.nbytes() / std::max(1, pages.shape(0));
}

float read_pages(const mx::array& k_pages, const mx::array& v_pages, const Ints& page_ids) {
  const size_t k_bytes = page_bytes("k_pages", k_pages), v_bytes = page_bytes("v_pages", v_pages);
  const int num_pages = std::min(k_pages.shape(0), v_pages.shape(0));
  const int32_t* const ids = page_ids.data();
  const int count = int(page_ids.size());
  for (int i = 0; i < count; i++) {
    if (ids[i] < 0 || ids[i] >= num_pages) {
      fail(
          "read_pages",
          "page_ids must lie in [0, " + std::to_string(num_pages) + "), the pages of the pool",
          std::to_string(ids[i]));
    }
  }
  const nb::gil_scoped_release release;
  return cpu::read_pages(k_pages.data<char>(), v_pages.data<char>(), k_bytes, v_bytes, ids, count);
}

} // namespace

void bind_limits(nb::module_& m) {
  m.def(
      "read_pages",
      &read_pages,
      "k_pages"_a,
      "v_pages"_a,
      "page_ids"_a,
      "Read the named pages of K and V, int32 [n], and compute nothing: the memory's limit.");
  m.def(
      "spend_flops",
      &cpu::spend_flops,
      "flops"_a,
      "dot_products"_a = false,
      nb::call_guard<nb::gil_scoped_release>(),
      "Do so many floating-point operations as fast as the instruction set in use can, and "
      "read nothing; with dot_products, of pairs of bfloat16 where it has them.");
}

} // namespace paged_mlx
