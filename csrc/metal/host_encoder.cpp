#include "metal/host_encoder.h"

#include <algorithm>
#include <utility>

namespace paged_mlx::metal {

namespace {

// Scratch memory that nobody wrote reads as NaN.
constexpr uint32_t kUnwritten = 0xffffffffu;

} // namespace

HostEncoder::HostEncoder(HostLaunch launch, int limit)
    : launch_(std::move(launch)), limit_(limit) {}

Buffer HostEncoder::buffer(const void* address, size_t nbytes) {
  buffers_.push_back({const_cast<void*>(address), nbytes});
  return &buffers_.back();
}

int HostEncoder::max_threads(const Variant&) {
  return limit_;
}

// A kernel sees what was bound for it, not what an earlier one was given.
void HostEncoder::set_variant(const Variant& variant) {
  next_ = {};
  next_.variant = variant;
}

void HostEncoder::bind(int index, Buffer buffer) {
  next_.bytes.erase(index);
  next_.buffers[index] = *static_cast<const HostBuffer*>(buffer);
}

void HostEncoder::set_input(int index, Buffer buffer) {
  bind(index, buffer);
}

void HostEncoder::set_output(int index, Buffer buffer) {
  bind(index, buffer);
}

void HostEncoder::set_pages(int index, Buffer buffer) {
  bind(index, buffer);
}

void HostEncoder::set_written_pages(int index, Buffer buffer) {
  bind(index, buffer);
}

void HostEncoder::set_bytes(int index, const void* bytes, size_t size) {
  const char* from = static_cast<const char*>(bytes);
  next_.buffers.erase(index);
  next_.bytes[index].assign(from, from + size);
}

Buffer HostEncoder::temporary(size_t bytes) {
  const size_t words = (bytes + 3) / 4;
  temporaries_.push_back(std::make_unique<uint32_t[]>(words));
  std::fill_n(temporaries_.back().get(), words, kUnwritten);
  return buffer(temporaries_.back().get(), bytes);
}

void HostEncoder::dispatch(Size groups, Size group) {
  next_.groups = groups;
  next_.group = group;
  launch_(next_);
}

} // namespace paged_mlx::metal
