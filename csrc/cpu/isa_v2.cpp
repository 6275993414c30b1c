// x86-64-v2: SSE4.2. Correct everywhere; not fast.
#if defined(__x86_64__)
#ifndef __SSE4_1__
#error "compile with -march=x86-64-v2"
#endif
#define PAGED_MLX_KERNELS kernels_v2
#include "cpu/kernels.inc"
#endif
