#include "metal/variant.h"

#include <stdexcept>

#include "kernel_sources.h"

namespace paged_mlx::metal {

Variant& Variant::define(const std::string& macro, const std::string& value) {
  macros.emplace_back(macro, value);
  return *this;
}

Variant& Variant::define(const std::string& macro, int value) {
  return define(macro, std::to_string(value));
}

Variant& Variant::set(int id, bool value) {
  constants.push_back({id, true, value});
  return *this;
}

Variant& Variant::set(int id, int value) {
  constants.push_back({id, false, value});
  return *this;
}

std::string Variant::library_name() const {
  std::string name = "paged_mlx_" + kernel;
  for (const auto& [macro, value] : macros) {
    name += "_" + macro + "_" + value;
  }
  return name;
}

std::string Variant::name() const {
  std::string name = library_name();
  for (const Constant& constant : constants) {
    name += "_c" + std::to_string(constant.id) + "_" + std::to_string(constant.value);
  }
  return name;
}

std::string Variant::text() const {
  std::string text;
  for (const auto& [macro, value] : macros) {
    text += "#define PAGED_MLX_" + macro + " " + value + "\n";
  }
  for (const KernelSource& source : kKernelSources) {
    if (source.name && kernel == source.name) {
      return text + "#line 1 \"" + kernel + ".metal\"\n" + source.text;
    }
  }
  throw std::logic_error("[Variant] no kernel is called " + kernel + ".");
}

} // namespace paged_mlx::metal
