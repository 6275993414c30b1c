// The one form of an error: what it must be, why, what it is.
#pragma once

#include <array>
#include <initializer_list>
#include <string>
#include <string_view>

#include "mlx/array.h"

namespace paged_mlx {

namespace mx = mlx::core;

// Throws std::invalid_argument (ValueError): "[op] must; got found."
[[noreturn]] void fail(const std::string& op, const std::string& must, const std::string& found);

// Checks shapes by name. A name gets its value where it is first seen and must
// have that value everywhere after. Names are literals, and a check that passes
// makes no string.
//
//   ShapeCheck shape("paged_attention");
//   shape("q", q, {"tokens", "num_q_heads", "head_dim"});
//   shape("k_pages", k_pages, {"num_pages", "num_kv_heads", "page_size", "head_dim"});
class ShapeCheck {
 public:
  explicit ShapeCheck(const char* op) : op_(op) {}

  void operator()(const char* name, const mx::array& a,
                  std::initializer_list<std::string_view> dims);

  int at(std::string_view dim) const;

  // Gives a name the value that array `name` tells of it, which it must have if it has one.
  void set(const char* name, std::string_view dim, int size);

 private:
  struct Bound {
    std::string_view dim;
    int size;
    const char* from;
  };

  const Bound* find(std::string_view dim) const;
  [[noreturn]] void refuse(const char* name, const mx::array& a,
                           std::initializer_list<std::string_view> dims) const;

  const char* op_;
  std::array<Bound, 16> bound_;
  size_t count_ = 0;
};

// `a` must have `dtype`; `why` is a clause such as "the dtype of q".
void check_dtype(const std::string& op, const char* name, const mx::array& a, mx::Dtype dtype,
                 const char* why);

// `a` must be float32, float16 or bfloat16.
void check_float(const std::string& op, const char* name, const mx::array& a);

std::string shape_string(const mx::array& a);
std::string dtype_string(mx::Dtype dtype);

} // namespace paged_mlx
