// x86-64-v4: AVX-512 F, BW, CD, DQ and VL.
#if defined(__x86_64__)
#ifndef __AVX512BW__
#error "compile with -march=x86-64-v4"
#endif
#define PAGED_MLX_KERNELS kernels_v4
#include "cpu/kernels.inc"
#endif
