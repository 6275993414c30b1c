#include "shape_check.h"

#include <sstream>
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
  static const char* const names[] = {"bool",    "uint8",   "uint16",   "uint32",   "uint64",
                                      "int8",    "int16",   "int32",    "int64",    "float16",
                                      "float32", "float64", "bfloat16", "complex64"};
  return names[static_cast<int>(dtype.val())];
}

void ShapeCheck::operator()(const char* name, const mx::array& a,
                            std::initializer_list<std::string_view> dims) {
  bool ok = a.ndim() == dims.size();
  int axis = 0;
  for (const std::string_view dim : dims) {
    const Bound* bound = find(dim);
    ok = ok && (!bound || a.shape(axis) == bound->size);
    axis++;
  }
  if (!ok) {
    refuse(name, a, dims);
  }
  axis = 0;
  for (const std::string_view dim : dims) {
    if (!find(dim)) {
      bound_.at(count_++) = {dim, a.shape(axis), name};
    }
    axis++;
  }
}

const ShapeCheck::Bound* ShapeCheck::find(std::string_view dim) const {
  for (size_t i = 0; i < count_; i++) {
    if (bound_[i].dim == dim) {
      return &bound_[i];
    }
  }
  return nullptr;
}

int ShapeCheck::at(std::string_view dim) const {
  const Bound* bound = find(dim);
  if (!bound) {
    throw std::logic_error(std::string(op_) + " has checked no " + std::string(dim));
  }
  return bound->size;
}

void ShapeCheck::set(const char* name, std::string_view dim, int size) {
  const Bound* bound = find(dim);
  if (!bound) {
    bound_.at(count_++) = {dim, size, name};
  } else if (bound->size != size) {
    fail(op_,
         std::string(name) + " must be of " + std::string(dim) + " = " +
             std::to_string(bound->size) + " from " + bound->from,
         std::to_string(size));
  }
}

void ShapeCheck::refuse(const char* name, const mx::array& a,
                        std::initializer_list<std::string_view> dims) const {
  std::string list, why;
  for (const std::string_view dim : dims) {
    list += (list.empty() ? "" : ", ") + std::string(dim);
    if (const Bound* bound = find(dim)) {
      why += (why.empty() ? ", where " : " and ") + std::string(dim) + " = " +
          std::to_string(bound->size) + " from " + bound->from;
    }
  }
  fail(op_, std::string(name) + " must have shape [" + list + "]" + why, shape_string(a));
}

void check_dtype(const std::string& op, const char* name, const mx::array& a, mx::Dtype dtype,
                 const char* why) {
  if (a.dtype() != dtype) {
    fail(op, std::string(name) + " must be " + dtype_string(dtype) + ", " + why,
         dtype_string(a.dtype()));
  }
}

void check_float(const std::string& op, const char* name, const mx::array& a) {
  if (a.dtype() != mx::float32 && a.dtype() != mx::float16 && a.dtype() != mx::bfloat16) {
    fail(op, std::string(name) + " must be float32, float16 or bfloat16", dtype_string(a.dtype()));
  }
}

} // namespace paged_mlx
