// The one form of an error: what it must be, why, what it is.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <map>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "mlx/array.h"

namespace paged_mlx {

namespace mx = mlx::core;

// Throws std::invalid_argument (ValueError): "[op] must; got found."
[[noreturn]] void fail(const std::string& op, const std::string& must, const std::string& found);

// Checks shapes by name. A name gets its value where it is first seen and must
// have that value everywhere after:
//
//   ShapeCheck shape("paged_attention");
//   shape("q", q, {"tokens", "num_q_heads", "head_dim"});
//   shape("k_pages", k_pages, {"num_pages", "num_kv_heads", "page_size", "head_dim"});
class ShapeCheck {
 public:
  explicit ShapeCheck(std::string op) : op_(std::move(op)) {}

  void operator()(const char* name, const mx::array& a, std::initializer_list<const char*> dims);

  int at(const std::string& dim) const {
    return bound_.at(dim).first;
  }

 private:
  std::string op_;
  std::map<std::string, std::pair<int, std::string>> bound_; // dim -> (value, from)
};

// `a` must have `dtype`; `why` is a clause such as "the dtype of q".
void check_dtype(const std::string& op, const char* name, const mx::array& a, mx::Dtype dtype, const char* why);

// `a` must be float32, float16 or bfloat16.
void check_float(const std::string& op, const char* name, const mx::array& a);

std::string shape_string(const mx::array& a);
std::string dtype_string(mx::Dtype dtype);

} // namespace paged_mlx
