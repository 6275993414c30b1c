// A dtype of MLX as the backends, which include no MLX, name it.
#pragma once

#include "mlx/dtype.h"

#include "cpu/attention.h"

namespace paged_mlx {

inline cpu::DType cpu_dtype(mlx::core::Dtype dtype) {
  return dtype == mlx::core::float32 ? cpu::DType::float32
      : dtype == mlx::core::float16  ? cpu::DType::float16
                                     : cpu::DType::bfloat16;
}

} // namespace paged_mlx
