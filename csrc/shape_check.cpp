#include "shape_check.h"

#include <stdexcept>

namespace paged_mlx {

void fail(const std::string& op, const std::string& must, const std::string& found) {
  throw std::invalid_argument("[" + op + "] " + must + "; got " + found + ".");
}

std::string shape_string(const mx::array& a) {
  std::ostringstream s;
  s << "(";
  for (size_t i = 0; i < a.ndim(); i++) {
    s << (i ? ", " : "") << a.shape(static_cast<int>(i));
  }
  s << (a.ndim() == 1 ? ",)" : ")");
  return s.str();
}

std::string dtype_string(mx::Dtype dtype) {
  static const char* const names[] = {
      "bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16",
      "int32", "int64", "float16", "float32", "float64", "bfloat16", "complex64"};
  return names[static_cast<int>(dtype.val())];
}

void ShapeCheck::operator()(
    const char* name,
    const mx::array& a,
    std::initializer_list<const char*> dims) {
  bool ok = a.ndim() == dims.size();
  std::string list, why;
  int axis = 0;
  for (const std::string dim : dims) {
    list += (axis ? ", " : "") + dim;
    if (auto it = bound_.find(dim); it != bound_.end()) {
      why += (why.empty() ? ", where " : " and ") + dim + " = " + std::to_string(it->second.first) +
          " from " + it->second.second;
      ok = ok && a.shape(axis) == it->second.first;
    }
    axis++;
  }
  if (!ok) {
    fail(op_, std::string(name) + " must have shape [" + list + "]" + why, shape_string(a));
  }
  axis = 0;
  for (const std::string dim : dims) {
    bound_.try_emplace(dim, a.shape(axis++), name);
  }
}

void check_dtype(
    const std::string& op,
    const char* name,
    const mx::array& a,
    mx::Dtype dtype,
    const char* why) {
  if (a.dtype() != dtype) {
    fail(
        op,
        std::string(name) + " must be " + dtype_string(dtype) + ", " + why,
        dtype_string(a.dtype()));
  }
}

void check_float(const std::string& op, const char* name, const mx::array& a) {
  if (a.dtype() != mx::float32 && a.dtype() != mx::float16 && a.dtype() != mx::bfloat16) {
    fail(op, std::string(name) + " must be float32, float16 or bfloat16", dtype_string(a.dtype()));
  }
}

} // namespace paged_mlx
