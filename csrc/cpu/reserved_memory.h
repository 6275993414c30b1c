// Memory that becomes longer and shorter where it is.
#pragma once

#include <cstddef>

namespace paged_mlx::cpu {

// Addresses of which the first bytes are memory. A fresh byte is zero, and the machine gives
// memory for it when it is first touched.
class ReservedMemory {
 public:
  // Reserves at least `capacity` bytes; begin() is null where the system has no such addresses.
  explicit ReservedMemory(size_t capacity);
  ~ReservedMemory();
  ReservedMemory(const ReservedMemory&) = delete;
  ReservedMemory& operator=(const ReservedMemory&) = delete;

  // A multiple of kHugePage.
  char* begin() const {
    return begin_;
  }

  size_t size() const {
    return size_;
  }

  // Has so many bytes, whose first ones are kept; false, and nothing has changed, where that is
  // not possible. What was dropped can be read until the memory is gone, and is fresh.
  bool resize(size_t bytes);

 private:
  char* mapped_ = nullptr;
  size_t mapped_bytes_ = 0;
  char* begin_ = nullptr;
  size_t capacity_ = 0;
  size_t size_ = 0;
  size_t open_ = 0; // bytes that may be touched
};

} // namespace paged_mlx::cpu
