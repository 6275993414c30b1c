// What the files of the module share.
#pragma once

#include <nanobind/nanobind.h>

namespace paged_mlx {

void bind_plan(nanobind::module_& m);
void bind_operations(nanobind::module_& m);
void bind_diagnostics(nanobind::module_& m);
void bind_handles(nanobind::module_& m);

} // namespace paged_mlx
