#include "cpu/reserved_memory.h"

#include <algorithm>
#include <cstdint>

#include "cpu/machine.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace paged_mlx::cpu {

#if defined(__linux__)

namespace {

size_t whole(size_t bytes, size_t unit) {
  return (bytes + unit - 1) / unit * unit;
}

size_t memory_page() {
  static const auto bytes = size_t(sysconf(_SC_PAGESIZE));
  return bytes;
}

} // namespace

ReservedMemory::ReservedMemory(size_t capacity) {
  capacity = whole(capacity, kHugePage);
  mapped_bytes_ = capacity + kHugePage;
  void* const mapped =
      mmap(nullptr, mapped_bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped == MAP_FAILED) {
    return;
  }
  mapped_ = static_cast<char*>(mapped);
  const auto at = reinterpret_cast<uintptr_t>(mapped);
  begin_ = mapped_ + (whole(at, kHugePage) - at);
  capacity_ = capacity;
  use_huge_pages(begin_, capacity);
}

ReservedMemory::~ReservedMemory() {
  if (mapped_) {
    munmap(mapped_, mapped_bytes_);
  }
}

bool ReservedMemory::resize(size_t bytes) {
  if (bytes > capacity_) {
    return false;
  }
  const size_t end = whole(bytes, memory_page());
  if (end > open_) {
    if (mprotect(begin_ + open_, end - open_, PROT_READ | PROT_WRITE) != 0) {
      return false;
    }
    open_ = end;
  }
  if (bytes < size_) {
    std::fill(begin_ + bytes, begin_ + std::min(end, size_), 0);
    give_back(begin_ + end, open_ - end);
  }
  size_ = bytes;
  return true;
}

#else

ReservedMemory::ReservedMemory(size_t) {}
ReservedMemory::~ReservedMemory() = default;

bool ReservedMemory::resize(size_t) {
  return false;
}

#endif

} // namespace paged_mlx::cpu
