#include "bindings/module.h"

#include <nanobind/stl/string.h>

#include "mlx/version.h"

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
