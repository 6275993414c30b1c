// Small pieces that every primitive's eval shares.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>
#include <string_view>

#include "mlx/allocator.h"
#include "mlx/array.h"
#include "mlx/ops.h"
#include "mlx/primitives.h"

#include "cpu/attention.h"

namespace paged_mlx {

namespace mx = mlx::core;

inline cpu::DType cpu_dtype(mx::Dtype dtype) {
  return dtype == mx::float32 ? cpu::DType::float32
      : dtype == mx::float16  ? cpu::DType::float16
                              : cpu::DType::bfloat16;
}

// Pages as the kernels read them, row by row. Versions of a pool and arrays that
// are known to be contiguous pass as they are.
inline mx::array row_contiguous(const mx::array& pages, mx::Stream s) {
  const bool known = !pages.is_tracer() && pages.is_available();
  if (known && pages.flags().row_contiguous) {
    return pages;
  }
  if (!known && pages.has_primitive()) {
    const std::string_view made_by = pages.primitive().name();
    if (made_by == "PagedAttention" || made_by == "WritePages" || made_by == "CopyPages" ||
        made_by == "GatherPages" || made_by == "PoolMemory" || made_by == "WriteAttend" ||
        made_by == "After") {
      return pages;
    }
  }
  return mx::contiguous(pages, false, s);
}

// Bytes of one token of one head.
inline int row_bytes(const mx::array& pages) {
  return pages.shape(3) * int(pages.itemsize());
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
