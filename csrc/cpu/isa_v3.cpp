// x86-64-v3: AVX2, FMA and F16C.
#if defined(__x86_64__)
#ifndef __AVX2__
#error "compile with -march=x86-64-v3"
#endif
#define PAGED_MLX_KERNELS kernels_v3
#include "cpu/kernels.inc"
#endif
