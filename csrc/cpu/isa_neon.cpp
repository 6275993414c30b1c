// arm64: NEON, which every arm64 has.
#if defined(__aarch64__)
#define PAGED_MLX_KERNELS kernels_neon
#include "cpu/kernels.inc"
#endif
