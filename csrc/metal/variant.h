// A variant of a kernel: one embedded source, compiled with macros and
// specialised by function constants.
#pragma once

#include <algorithm>
#include <array>
#include <mutex>
#include <string>
#include <unordered_map>

namespace paged_mlx::metal {

// A macro of the text, without PAGED_MLX_. Its value is a word that lives as long as the
// process or, where that is null, a number.
struct Macro {
  const char* name;
  const char* word;
  int number;

  bool operator==(const Macro& other) const;
};

// A function constant. Its type is the kernel's: bool, or int.
struct Constant {
  int id;
  bool is_bool;
  int value;

  bool operator==(const Constant&) const = default;
};

// A few items in a row, without memory of their own.
template <typename T, int kMost>
class Few {
 public:
  void push_back(const T& item) {
    items_.at(size_++) = item;
  }
  const T* begin() const {
    return items_.data();
  }
  const T* end() const {
    return items_.data() + size_;
  }
  int size() const {
    return size_;
  }
  bool operator==(const Few& other) const {
    return std::equal(begin(), end(), other.begin(), other.end());
  }

 private:
  std::array<T, kMost> items_{};
  int size_ = 0;
};

// Made at every launch: no memory is allocated for it, and no name is put together.
struct Variant {
  const char* kernel = ""; // of kernels/<kernel>.metal, also the function's name
  Few<Macro, 8> macros;
  Few<Constant, 8> constants;

  Variant& define(const char* macro, const char* word);
  Variant& define(const char* macro, int number);
  Variant& set(int id, bool value);
  Variant& set(int id, int value);

  bool operator==(const Variant& other) const;

  // Whether both are compiled from one text: they may differ in function constants.
  bool has_text_of(const Variant& other) const;

  // Names the compiled text: the kernel and its macros.
  std::string library_name() const;

  // Names the pipeline, function constants included.
  std::string name() const;

  // What the Metal compiler gets.
  std::string text() const;
};

struct VariantHash {
  size_t operator()(const Variant& variant) const;
};

// What is made once for each variant, for threads to share.
template <typename Value>
class VariantMap {
 public:
  template <typename Make>
  Value& at(const Variant& variant, Make make) {
    const std::lock_guard lock(mutex_);
    const auto found = made_.find(variant);
    return found != made_.end() ? found->second : made_.emplace(variant, make()).first->second;
  }

 private:
  std::mutex mutex_;
  std::unordered_map<Variant, Value, VariantHash> made_;
};

} // namespace paged_mlx::metal
