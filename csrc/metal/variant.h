// A variant of a kernel: one embedded source, compiled with macros and
// specialised by function constants.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace paged_mlx::metal {

// A function constant. Its type is the kernel's: bool, or int.
struct Constant {
  int id;
  bool is_bool;
  int value;

  bool operator==(const Constant&) const = default;
};

struct Variant {
  std::string kernel; // of kernels/<kernel>.metal, also the function's name
  std::vector<std::pair<std::string, std::string>> macros; // without PAGED_MLX_
  std::vector<Constant> constants;

  Variant& define(const std::string& macro, const std::string& value);
  Variant& define(const std::string& macro, int value);
  Variant& set(int id, bool value);
  Variant& set(int id, int value);

  // Names the compiled text: the kernel and its macros.
  std::string library_name() const;

  // Names the pipeline, function constants included: the cache key.
  std::string name() const;

  // What the Metal compiler gets.
  std::string text() const;
};

} // namespace paged_mlx::metal
