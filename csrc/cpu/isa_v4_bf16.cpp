// x86-64-v4 with AVX512-BF16 and AVX512-VNNI dot products.
#if defined(__x86_64__)
#if !defined(__AVX512BF16__) || !defined(__AVX512VNNI__)
#error "compile with -march=x86-64-v4 -mavx512bf16 -mavx512vnni"
#endif
#define PAGED_MLX_KERNELS kernels_v4_bf16
#include "cpu/kernels.inc"
#endif
