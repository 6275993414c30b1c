#include "metal/variant.h"

#include <cstring>
#include <functional>
#include <stdexcept>
#include <string_view>

#include "kernel_sources.h"

namespace paged_mlx::metal {

namespace {

bool same(const char* a, const char* b) {
  return a == b || (a && b && std::strcmp(a, b) == 0);
}

std::string value_of(const Macro& macro) {
  return macro.word ? macro.word : std::to_string(macro.number);
}

} // namespace

bool Macro::operator==(const Macro& other) const {
  return number == other.number && same(name, other.name) && same(word, other.word);
}

Variant& Variant::define(const char* macro, const char* word) {
  macros.push_back({macro, word, 0});
  return *this;
}

Variant& Variant::define(const char* macro, int number) {
  macros.push_back({macro, nullptr, number});
  return *this;
}

Variant& Variant::set(int id, bool value) {
  constants.push_back({id, true, value});
  return *this;
}

Variant& Variant::set(int id, int value) {
  constants.push_back({id, false, value});
  return *this;
}

bool Variant::operator==(const Variant& other) const {
  return has_text_of(other) && constants == other.constants;
}

bool Variant::has_text_of(const Variant& other) const {
  return same(kernel, other.kernel) && macros == other.macros;
}

size_t VariantHash::operator()(const Variant& variant) const {
  size_t hash = std::hash<std::string_view>()(variant.kernel);
  auto add = [&hash](size_t value) { hash = (hash ^ value) * 0x9e3779b97f4a7c15u; };
  for (const Macro& macro : variant.macros) {
    add(macro.word ? size_t(macro.word[0]) : size_t(macro.number));
  }
  for (const Constant& constant : variant.constants) {
    add(size_t(constant.value));
  }
  return hash ^ (hash >> 32);
}

std::string Variant::library_name() const {
  std::string name = std::string("paged_mlx_") + kernel;
  for (const Macro& macro : macros) {
    name += std::string("_") + macro.name + "_" + value_of(macro);
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
  for (const Macro& macro : macros) {
    text += std::string("#define PAGED_MLX_") + macro.name + " " + value_of(macro) + "\n";
  }
  for (const KernelSource& source : kKernelSources) {
    if (same(kernel, source.name)) {
      return text + "#line 1 \"" + kernel + ".metal\"\n" + source.text;
    }
  }
  throw std::logic_error(std::string("[Variant] no kernel is called ") + kernel + ".");
}

} // namespace paged_mlx::metal
