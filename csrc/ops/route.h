// Small pieces that every primitive's eval shares.
#pragma once

#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "mlx/allocator.h"
#include "mlx/array.h"

#include "cpu/attention.h"

namespace paged_mlx {

namespace mx = mlx::core;

inline cpu::DType cpu_dtype(mx::Dtype dtype) {
  return dtype == mx::float32 ? cpu::DType::float32
      : dtype == mx::float16  ? cpu::DType::float16
                              : cpu::DType::bfloat16;
}

[[noreturn]] inline void no_gpu(const char* op) {
  throw std::runtime_error(
      std::string("[") + op + "] this build has no GPU backend: use stream=mx.cpu.");
}

// How an operation that writes pages treats the buffer it is given.
enum class WriteMode {
  donate, // reuse the buffer when MLX says nobody else holds it, else copy it
  alias,  // always write through: for the linear versions of a PagePool
};

// Whole buffers copied because a write could not be done in place.
inline std::atomic<int64_t> g_buffer_copies{0};

// Points `out` at the buffer of `in`, or at fresh memory. True when the caller
// must copy the old contents first.
inline bool needs_copy(const mx::array& in, mx::array& out, WriteMode mode) {
  if (mode == WriteMode::alias || in.is_donatable()) {
    out.copy_shared_buffer(in);
    return false;
  }
  g_buffer_copies++;
  out.set_data(mx::allocator::malloc(out.nbytes()));
  return true;
}

} // namespace paged_mlx
