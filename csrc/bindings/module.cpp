#include "bindings/module.h"

#include <nanobind/stl/string.h>

#include "mlx/version.h"
#include "shape_check.h"

namespace paged_mlx {

namespace {

PageFormat page_format(const char* op, const std::optional<std::string>& name, PageFormat four) {
  if (name && *name != "q8" && *name != "q4") {
    fail(op, "formats must be a pair of None, 'q8' or 'q4'", "'" + *name + "'");
  }
  return !name ? PageFormat::dense : *name == "q8" ? PageFormat::token8 : four;
}

} // namespace

PageFormats page_formats(const char* op, const FormatNames& names) {
  return {page_format(op, names.first, PageFormat::channel4),
          page_format(op, names.second, PageFormat::token4)};
}

} // namespace paged_mlx

NB_MODULE(_ext, m) {
  m.doc() = "Native part of paged_mlx. Use it through paged_mlx.fast.";
  m.attr("mlx_build_version") = std::to_string(MLX_VERSION_MAJOR) + "." +
      std::to_string(MLX_VERSION_MINOR) + "." + std::to_string(MLX_VERSION_PATCH);
  m.attr("mlx_version") = mlx::core::version(); // of the library that was loaded
  paged_mlx::bind_plan(m);
  paged_mlx::bind_operations(m);
  paged_mlx::bind_handles(m);
  paged_mlx::bind_diagnostics(m);
}
