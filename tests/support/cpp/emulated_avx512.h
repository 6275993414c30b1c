// AVX-512 for machines without it: the few instructions that csrc/cpu/simd.h names, a
// lane at a time. Included before a translation unit of the CPU backend that is compiled
// for x86-64-v3, it makes that unit believe in AVX-512: the same source, lanes and register
// blocks as on a machine that has it, slowly.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#define PAGED_MLX_EMULATED_LANES // they are in no register
#define __AVX512F__ 1
#define __AVX512DQ__ 1
#define __AVX512BW__ 1
#define __AVX512VL__ 1

namespace emulated {

typedef float Lanes __attribute__((vector_size(64)));
typedef float Half __attribute__((vector_size(32)));
typedef uint16_t Elements __attribute__((vector_size(64)));

inline float bfloat16(uint16_t bits) {
  const uint32_t word = uint32_t(bits) << 16;
  float x;
  std::memcpy(&x, &word, sizeof(x));
  return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x;
}

inline Lanes fmadd(Lanes a, Lanes b, Lanes c) {
  for (int i = 0; i < 16; i++) {
    c[i] = std::fma(a[i], b[i], c[i]);
  }
  return c;
}

inline Lanes max(Lanes a, Lanes b) {
  for (int i = 0; i < 16; i++) {
    b[i] = a[i] > b[i] ? a[i] : b[i];
  }
  return b;
}

inline uint32_t greater(Lanes a, Lanes b) {
  uint32_t mask = 0;
  for (int i = 0; i < 16; i++) {
    mask |= uint32_t(a[i] > b[i]) << i;
  }
  return mask;
}

inline Half half(Lanes v, int which) {
  Half h;
  for (int i = 0; i < 8; i++) {
    h[i] = v[8 * which + i];
  }
  return h;
}

inline Lanes widen(__m256i halves) {
  const Half low = (Half)_mm256_cvtph_ps(_mm256_castsi256_si128(halves));
  const Half high = (Half)_mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1));
  Lanes v;
  for (int i = 0; i < 8; i++) {
    v[i] = low[i];
    v[8 + i] = high[i];
  }
  return v;
}

inline __m256i narrow(Lanes v) {
  const __m128i low = _mm256_cvtps_ph((__m256)half(v, 0), _MM_FROUND_TO_NEAREST_INT);
  const __m128i high = _mm256_cvtps_ph((__m256)half(v, 1), _MM_FROUND_TO_NEAREST_INT);
  return _mm256_set_m128i(high, low);
}

// The first elements only; the rest are 0 and not read.
inline Elements load_part(uint32_t mask, const void* from) {
  Elements v = {};
  for (int i = 0; i < 32; i++) {
    if (mask >> i & 1) {
      v[i] = static_cast<const uint16_t*>(from)[i];
    }
  }
  return v;
}

// The odd pair is added first, each product unrounded.
inline Lanes dot(Lanes sum, Elements a, Elements b) {
  for (int i = 0; i < 16; i++) {
    sum[i] = std::fma(bfloat16(a[2 * i + 1]), bfloat16(b[2 * i + 1]), sum[i]);
    sum[i] = std::fma(bfloat16(a[2 * i]), bfloat16(b[2 * i]), sum[i]);
  }
  return sum;
}

} // namespace emulated

#define _mm512_fmadd_ps(a, b, c) \
  (__m512) emulated::fmadd((emulated::Lanes)(a), (emulated::Lanes)(b), (emulated::Lanes)(c))
#define _mm512_max_ps(a, b) (__m512) emulated::max((emulated::Lanes)(a), (emulated::Lanes)(b))
#undef _mm512_cmp_ps_mask
#define _mm512_cmp_ps_mask(a, b, greater_than) \
  emulated::greater((emulated::Lanes)(a), (emulated::Lanes)(b))
#define _mm512_castps512_ps256(v) (__m256) emulated::half((emulated::Lanes)(v), 0)
#undef _mm512_extractf32x8_ps
#define _mm512_extractf32x8_ps(v, which) (__m256) emulated::half((emulated::Lanes)(v), which)
#define _mm512_cvtph_ps(halves) (__m512) emulated::widen(halves)
#undef _mm512_cvtps_ph
#define _mm512_cvtps_ph(v, rounding) emulated::narrow((emulated::Lanes)(v))
#define _mm512_loadu_si512(from) (__m512i) emulated::load_part(~uint32_t(0), from)
#define _mm512_maskz_loadu_epi16(mask, from) (__m512i) emulated::load_part(mask, from)
#define _mm512_dpbf16_ps(sum, a, b)        \
  (__m512) emulated::dot(                  \
      (emulated::Lanes)(sum), (emulated::Elements)(a), (emulated::Elements)(b))
typedef emulated::Elements __m512bh_emulated;
#define __m512bh __m512bh_emulated
#define __mmask32 uint32_t
