// x86-64-v4 with AVX512-BF16 dot products.
#if defined(__x86_64__)
#ifndef __AVX512BF16__
#error "compile with -march=x86-64-v4 -mavx512bf16"
#endif
#define PAGED_MLX_KERNELS kernels_v4_bf16
#include "cpu/kernels.inc"
#endif
