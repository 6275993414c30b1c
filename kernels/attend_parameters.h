// What every attention kernel is given: its buffers, then where the thread stands. A side
// in a format has its codes for pages, and its scales and biases beside them.
#ifndef PAGED_MLX_ATTEND_PARAMETERS_H
#define PAGED_MLX_ATTEND_PARAMETERS_H

#include "arguments.h"
#include "page_formats.h"
#include "scores.h"

#define PAGED_MLX_ATTEND_PARAMETERS                                                               \
  constant AttendArguments &arguments [[buffer(PAGED_MLX_BUFFER_ARGUMENTS)]],                     \
      const device int *plan [[buffer(PAGED_MLX_BUFFER_PLAN)]],                                   \
      const device PAGED_MLX_T *q [[buffer(PAGED_MLX_BUFFER_Q)]],                                 \
      const device PAGED_MLX_K_STORED *k_pages [[buffer(PAGED_MLX_BUFFER_K_PAGES)]],              \
      const device PAGED_MLX_V_STORED *v_pages [[buffer(PAGED_MLX_BUFFER_V_PAGES)]],              \
      PAGED_MLX_K_SCALE_PARAMETERS PAGED_MLX_V_SCALE_PARAMETERS device PAGED_MLX_T *out           \
      [[buffer(PAGED_MLX_BUFFER_OUT)]],                                                           \
      device float *lse [[buffer(PAGED_MLX_BUFFER_LSE)]],                                         \
      device float *partial_out [[buffer(PAGED_MLX_BUFFER_PARTIAL_OUT)]],                         \
      device float *partial_state [[buffer(PAGED_MLX_BUFFER_PARTIAL_STATE)]],                     \
      const device float *alibi_slopes                                                            \
      [[buffer(PAGED_MLX_BUFFER_ALIBI), function_constant(kHasAlibi)]],                           \
      const device float *sinks [[buffer(PAGED_MLX_BUFFER_SINKS), function_constant(kHasSinks)]], \
      const device void *mask [[buffer(PAGED_MLX_BUFFER_MASK), function_constant(kHasMask)]],     \
      uint3 group [[threadgroup_position_in_grid]],                                               \
      ushort thread_index [[thread_index_in_threadgroup]],                                        \
      ushort simdgroup [[simdgroup_index_in_threadgroup]],                                        \
      ushort lane [[thread_index_in_simdgroup]]

#endif
