// Declarations that the files of the module share.
#pragma once

#include <optional>
#include <string>
#include <utility>

#include <nanobind/nanobind.h>

#include "page_format.h"

namespace paged_mlx {

// (k_format, v_format) as Python names them: None, "q8" or "q4".
using FormatNames = std::pair<std::optional<std::string>, std::optional<std::string>>;

// Throws std::invalid_argument for a format that does not exist.
PageFormats page_formats(const char* op, const FormatNames& names);

void bind_plan(nanobind::module_& m);
void bind_operations(nanobind::module_& m);
void bind_diagnostics(nanobind::module_& m);
void bind_handles(nanobind::module_& m);

} // namespace paged_mlx
