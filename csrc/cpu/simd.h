// Vectors of float, as wide as the instruction set of this translation unit.
//
// Arithmetic is the compiler's own (gcc and clang vector extensions); what they
// do badly is a shim here, per instruction set: fused multiply-add, maximum,
// "any lane", and the conversions of 16-bit floats.
//
// Elements are loaded two vectors at a time, in *lane order*: for float32 and
// float16 the memory order; for bfloat16 the even elements, then the odd ones,
// because that costs one operation per vector. Queries, tiles of K and V and
// accumulators all keep lane order; store2 undoes it.
//
// Included by translation units for different instruction sets, so everything
// is in an anonymous namespace and nothing comes from the standard library.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define PAGED_MLX_INLINE inline __attribute__((always_inline))

namespace paged_mlx::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr bool kManyRegisters = true; // 32 vector registers; otherwise 16
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr bool kManyRegisters = false;
#elif defined(__aarch64__)
constexpr int kLanes = 4;
constexpr bool kManyRegisters = true;
#else
constexpr int kLanes = 4;
constexpr bool kManyRegisters = false;
#endif
constexpr int kPair = 2 * kLanes; // elements of one load2

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t VecI __attribute__((vector_size(kLanes * 4)));
typedef uint32_t VecU __attribute__((vector_size(kLanes * 4)));
typedef float Vec4 __attribute__((vector_size(16)));
typedef float VecUnaligned __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint32_t VecUUnaligned __attribute__((vector_size(kLanes * 4), aligned(2), may_alias));
typedef float Vec4Unaligned __attribute__((vector_size(16), aligned(4), may_alias));

constexpr float kNegInf = -__builtin_inff();
constexpr float kLog2e = 1.44269504088896340736f;

PAGED_MLX_INLINE Vec load(const float* p) {
  return *reinterpret_cast<const VecUnaligned*>(p);
}
PAGED_MLX_INLINE void store(float* p, Vec v) {
  *reinterpret_cast<VecUnaligned*>(p) = v;
}
PAGED_MLX_INLINE Vec4 load4(const float* p) {
  return *reinterpret_cast<const Vec4Unaligned*>(p);
}
PAGED_MLX_INLINE void store4(float* p, Vec4 v) {
  *reinterpret_cast<Vec4Unaligned*>(p) = v;
}
PAGED_MLX_INLINE Vec splat(float x) {
  return x - Vec{}; // x + 0 would not be x for -0
}
// 32 bits in every lane, whatever they mean.
PAGED_MLX_INLINE Vec splat_word(const float* p) {
  int32_t word;
  memcpy(&word, p, sizeof(word));
  return (Vec)(word - VecI{});
}
PAGED_MLX_INLINE VecI splat_int(int32_t x) {
  return x - VecI{};
}
PAGED_MLX_INLINE Vec select(VecI mask, Vec yes, Vec no) {
  return mask ? yes : no;
}
PAGED_MLX_INLINE VecI iota() {
  VecI v;
  for (int i = 0; i < kLanes; i++) {
    v[i] = i;
  }
  return v;
}
// From memory into L2.
PAGED_MLX_INLINE void prefetch_far(const char* p) {
  __builtin_prefetch(p, 0, 2);
}
// Into L1.
PAGED_MLX_INLINE void prefetch_near(const char* p) {
  __builtin_prefetch(p, 0, 3);
}

// v in a register, where a compiler would read it from memory at every use: loads are
// fewer than multiplications only so.
PAGED_MLX_INLINE Vec keep(Vec v) {
#if defined(__x86_64__) && !defined(PAGED_MLX_EMULATED_LANES)
  __asm__("" : "+v"(v));
#endif
  return v;
}

// a * b + c, rounded once where the machine can. max(a, b) is b where either is NaN.
// any(mask): some lane is set.
#if defined(__AVX512F__)
PAGED_MLX_INLINE Vec fma(Vec a, Vec b, Vec c) {
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
PAGED_MLX_INLINE Vec max(Vec a, Vec b) {
  return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
}
PAGED_MLX_INLINE bool any_greater(Vec a, Vec b) {
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ) != 0;
}
#elif defined(__AVX2__)
PAGED_MLX_INLINE Vec fma(Vec a, Vec b, Vec c) {
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
PAGED_MLX_INLINE Vec max(Vec a, Vec b) {
  return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
}
PAGED_MLX_INLINE bool any_greater(Vec a, Vec b) {
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GT_OQ)) != 0;
}
#elif defined(__x86_64__)
PAGED_MLX_INLINE Vec fma(Vec a, Vec b, Vec c) {
  return a * b + c;
}
PAGED_MLX_INLINE Vec max(Vec a, Vec b) {
  return (Vec)_mm_max_ps((__m128)a, (__m128)b);
}
PAGED_MLX_INLINE bool any_greater(Vec a, Vec b) {
  return _mm_movemask_ps(_mm_cmpgt_ps((__m128)a, (__m128)b)) != 0;
}
#else
PAGED_MLX_INLINE Vec fma(Vec a, Vec b, Vec c) {
  return (Vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
PAGED_MLX_INLINE Vec max(Vec a, Vec b) {
  return select(a > b, a, b);
}
PAGED_MLX_INLINE bool any_greater(Vec a, Vec b) {
  return vmaxvq_u32((uint32x4_t)(a > b)) != 0;
}
#endif

// The four quarters added up: [x0 + x2 + ..., ...], always in the same order.
#if defined(__AVX512F__)
PAGED_MLX_INLINE Vec4 fold(Vec v) {
  const __m256 h =
      _mm256_add_ps(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1));
  return (Vec4)_mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
}
#elif defined(__AVX2__)
PAGED_MLX_INLINE Vec4 fold(Vec v) {
  return __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
}
#else
PAGED_MLX_INLINE Vec4 fold(Vec v) {
  return v;
}
#endif

// [a0 + a2, b0 + b2, a1 + a3, b1 + b3]: half of the way to two sums.
PAGED_MLX_INLINE Vec4 fold_two(Vec4 a, Vec4 b) {
  return __builtin_shufflevector(a, b, 0, 4, 1, 5) + __builtin_shufflevector(a, b, 2, 6, 3, 7);
}
// The sums of four vectors, from fold_two(a, b) and fold_two(c, d).
PAGED_MLX_INLINE Vec4 sum_four(Vec4 ab, Vec4 cd) {
  return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
}
PAGED_MLX_INLINE float sum(Vec v) {
  const Vec4 f = fold(v);
  return (f[0] + f[2]) + (f[1] + f[3]);
}
PAGED_MLX_INLINE float max_lane(Vec v) {
  float m = v[0];
  for (int i = 1; i < kLanes; i++) {
    m = v[i] > m ? v[i] : m;
  }
  return m;
}
PAGED_MLX_INLINE void transpose4(Vec4& a, Vec4& b, Vec4& c, Vec4& d) {
  const Vec4 ab0 = __builtin_shufflevector(a, b, 0, 4, 1, 5);
  const Vec4 ab1 = __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const Vec4 cd0 = __builtin_shufflevector(c, d, 0, 4, 1, 5);
  const Vec4 cd1 = __builtin_shufflevector(c, d, 2, 6, 3, 7);
  a = __builtin_shufflevector(ab0, cd0, 0, 1, 4, 5);
  b = __builtin_shufflevector(ab0, cd0, 2, 3, 6, 7);
  c = __builtin_shufflevector(ab1, cd1, 0, 1, 4, 5);
  d = __builtin_shufflevector(ab1, cd1, 2, 3, 6, 7);
}

// 2^x for x <= about 128, to within one unit in the last place; exactly 1 at 0,
// exactly 0 from -127 down, NaN for NaN. A minimax fit of (2^r - 1) / r on
// [-1/2, 1/2].
PAGED_MLX_INLINE Vec exp2(Vec x) {
  const Vec kRound = splat(12582912.0f); // 1.5 * 2^23: adding it rounds to an integer
  x = max(splat(-127.0f), x);
  const Vec shifted = x + kRound;
  const Vec r = x - (shifted - kRound);
  Vec p = splat(0.00015353361959569156f);
  p = fma(p, r, splat(0.0013398875016719103f));
  p = fma(p, r, splat(0.00961843691766262f));
  p = fma(p, r, splat(0.055503323674201965f));
  p = fma(p, r, splat(0.24022647738456726f));
  p = fma(p, r, splat(0.6931471824645996f));
  p = fma(p, r, splat(1.0f));
  return (Vec)((VecU)p + ((VecU)shifted << 23));
}
PAGED_MLX_INLINE float exp2(float x) {
  return exp2(splat(x))[0];
}

// tanh: an odd series near 0, where 1 - 2 / (e^2x + 1) would cancel.
PAGED_MLX_INLINE Vec tanh(Vec x) {
  const Vec far = max(splat(-20.0f), splat(0.0f) - max(splat(-20.0f), splat(0.0f) - x));
  const Vec e = exp2(far * splat(2.0f * kLog2e));
  const Vec outer = splat(1.0f) - splat(2.0f) / (e + splat(1.0f));
  const Vec z = x * x;
  // Taylor's coefficients of tanh(x) / x.
  Vec p = splat(-0.0014558343870513183f);
  p = fma(p, z, splat(0.003592128036572481f));
  p = fma(p, z, splat(-0.008863235529902197f));
  p = fma(p, z, splat(0.021869488536155203f));
  p = fma(p, z, splat(-0.05396825396825397f));
  p = fma(p, z, splat(0.13333333333333333f));
  p = fma(p, z, splat(-0.3333333333333333f));
  const Vec inner = fma(p * z, x, x);
  return select(z < splat(0.25f), inner, outer);
}

struct Pair {
  Vec a;
  Vec b;
};

// One element type: how kPair of its elements become two vectors, and back.
struct Float32 {
  using T = float;
  static PAGED_MLX_INLINE Pair load2(const T* p) {
    return {load(p), load(p + kLanes)};
  }
  static PAGED_MLX_INLINE void store2(T* p, Pair v) {
    store(p, v.a);
    store(p + kLanes, v.b);
  }
};

struct BFloat16 {
  using T = uint16_t;
  static PAGED_MLX_INLINE Pair load2(const T* p) {
    const VecU both = *reinterpret_cast<const VecUUnaligned*>(p);
    return {(Vec)(both << 16), (Vec)(both & 0xffff0000u)};
  }
  // The bits of v rounded to nearest even, in the upper half of each lane.
  static PAGED_MLX_INLINE VecU rounded(Vec v) {
    const VecU bits = (VecU)v;
    const VecU up = bits + 0x7fffu + ((bits >> 16) & 1u);
    return (VecU)select(v == v, (Vec)up, (Vec)(bits | 0x400000u));
  }
  static PAGED_MLX_INLINE void store2(T* p, Pair v) {
    *reinterpret_cast<VecUUnaligned*>(p) = (rounded(v.a) >> 16) | (rounded(v.b) & 0xffff0000u);
  }
};

struct Float16 {
  using T = uint16_t;
#if defined(__AVX512F__)
  static PAGED_MLX_INLINE Vec load1(const T* p) {
    return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static PAGED_MLX_INLINE void store1(T* p, Vec v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
  }
#elif defined(__F16C__)
  static PAGED_MLX_INLINE Vec load1(const T* p) {
    return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static PAGED_MLX_INLINE void store1(T* p, Vec v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
  }
#elif defined(__aarch64__)
  static PAGED_MLX_INLINE Vec load1(const T* p) {
    return (Vec)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
  }
  static PAGED_MLX_INLINE void store1(T* p, Vec v) {
    vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)v)));
  }
#else
  // The exponent is moved by a multiplication, which also normalises.
  static PAGED_MLX_INLINE Vec load1(const T* p) {
    const VecU h = (VecU)_mm_cvtepu16_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    const Vec scaled = (Vec)((h & 0x7fffu) << 13) * splat(0x1p112f);
    const VecU special = (VecU)((h & 0x7c00u) == 0x7c00u) & 0x7f800000u;
    return (Vec)((VecU)scaled | special | ((h & 0x8000u) << 16));
  }
  static PAGED_MLX_INLINE void store1(T* p, Vec v) {
    const VecU bits = (VecU)v;
    const VecU size = bits & 0x7fffffffu;
    const VecU normal = (size - (112u << 23) + 0xfffu + ((size >> 13) & 1u)) >> 13;
    const VecU small = (VecU)((Vec)size + splat(0.5f)) - 0x3f000000u; // below 2^-14
    VecU h = (VecU)select((VecI)(size < 0x38800000u), (Vec)small, (Vec)normal);
    h = (VecU)select((VecI)(size >= 0x477ff000u), (Vec)(VecU{} + 0x7c00u), (Vec)h);
    h = (VecU)select((VecI)(size > 0x7f800000u), (Vec)(VecU{} + 0x7e00u), (Vec)h);
    h |= (bits >> 16) & 0x8000u;
    for (int i = 0; i < kLanes; i++) {
      p[i] = T(h[i]);
    }
  }
#endif
  static PAGED_MLX_INLINE Pair load2(const T* p) {
    return {load1(p), load1(p + kLanes)};
  }
  static PAGED_MLX_INLINE void store2(T* p, Pair v) {
    store1(p, v.a);
    store1(p + kLanes, v.b);
  }
};

// The first n < kPair elements; the rest of the lanes are 0 and not read.
template <typename X>
PAGED_MLX_INLINE Pair load2_part(const typename X::T* p, int n) {
  typename X::T whole[kPair] = {};
  memcpy(whole, p, n * sizeof(whole[0]));
  return X::load2(whole);
}
template <typename X>
PAGED_MLX_INLINE void store2_part(typename X::T* p, int n, Pair v) {
  typename X::T whole[kPair];
  X::store2(whole, v);
  memcpy(p, whole, n * sizeof(whole[0]));
}

// No infinity and no NaN among n elements.
template <typename X>
PAGED_MLX_INLINE bool all_finite(const typename X::T* p, int n) {
  Vec zero = {};
  for (int d = 0; d < n; d += kPair) {
    const Pair v = d + kPair <= n ? X::load2(p + d) : load2_part<X>(p + d, n - d);
    zero += v.a * Vec{} + v.b * Vec{};
  }
  return sum(zero) == 0.0f;
}

// A row of n elements to float in lane order, padded with zeros.
template <typename X>
PAGED_MLX_INLINE void widen_row(const typename X::T* from, int n, float* to) {
  int d = 0;
  for (; d + kPair <= n; d += kPair) {
    const Pair v = X::load2(from + d);
    store(to + d, v.a);
    store(to + d + kLanes, v.b);
  }
  if (d < n) {
    const Pair v = load2_part<X>(from + d, n - d);
    store(to + d, v.a);
    store(to + d + kLanes, v.b);
  }
}

// How the elements of a query meet those of a key: as floats in lane order,
// unless the machine multiplies 16-bit floats itself, two to a word.
template <typename X>
struct DotProduct {
  using Query = float;
  using Key = Pair;
  static constexpr int kPerWord = 1; // elements of a 32-bit word of a packed row

  static PAGED_MLX_INLINE void pack_row(const typename X::T* from, int n, Query* to) {
    widen_row<X>(from, n, to);
  }
  // kPair elements of a key; those of a query times those of keys, one partial sum per lane.
  static PAGED_MLX_INLINE Key load_key(const typename X::T* p) {
    return X::load2(p);
  }
  static PAGED_MLX_INLINE Key load_key_part(const typename X::T* p, int n) {
    return load2_part<X>(p, n);
  }
  template <int kKeys>
  static PAGED_MLX_INLINE void add(const Query* q, const Key (&k)[kKeys], Vec (&sums)[kKeys]) {
    const Vec a = keep(load(q));
    for (int j = 0; j < kKeys; j++) {
      sums[j] = fma(a, k[j].a, sums[j]);
    }
    const Vec b = keep(load(q + kLanes));
    for (int j = 0; j < kKeys; j++) {
      sums[j] = fma(b, k[j].b, sums[j]);
    }
  }
  // One word of each of kLanes rows.
  static PAGED_MLX_INLINE Vec add_words(Vec a, Vec b, Vec sum) {
    return fma(a, b, sum);
  }
};

#if defined(__AVX512BF16__)
template <>
struct DotProduct<BFloat16> {
  using Query = uint16_t;
  using Key = __m512bh;
  static constexpr int kPerWord = 2;

  static PAGED_MLX_INLINE void pack_row(const uint16_t* from, int n, Query* to) {
    memcpy(to, from, n * sizeof(Query));
    memset(to + n, 0, ((n + kPair - 1) / kPair * kPair - n) * sizeof(Query));
  }
  static PAGED_MLX_INLINE Key load_key(const uint16_t* p) {
    return (Key)_mm512_loadu_si512(p);
  }
  static PAGED_MLX_INLINE Key load_key_part(const uint16_t* p, int n) {
    return (Key)_mm512_maskz_loadu_epi16((__mmask32(1) << n) - 1, p);
  }
  template <int kKeys>
  static PAGED_MLX_INLINE void add(const Query* q, const Key (&k)[kKeys], Vec (&sums)[kKeys]) {
    const Key words = (Key)_mm512_loadu_si512(q);
    for (int j = 0; j < kKeys; j++) {
      sums[j] = (Vec)_mm512_dpbf16_ps((__m512)sums[j], words, k[j]);
    }
  }
  static PAGED_MLX_INLINE Vec add_words(Vec a, Vec b, Vec sum) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (Key)a, (Key)b);
  }
};
#endif

constexpr int padded(int dim) {
  return (dim + kPair - 1) / kPair * kPair;
}

} // namespace
} // namespace paged_mlx::cpu
