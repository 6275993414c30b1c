// <metal_math>, <metal_integer>, <metal_relational> and <metal_geometric>.
//
// Functions of half and bfloat are computed in float and rounded once.
#pragma once
#include "vectors.h"

extern "C" {
float metal_host_exp(float);
float metal_host_exp2(float);
float metal_host_exp10(float);
float metal_host_log(float);
float metal_host_log2(float);
float metal_host_log10(float);
float metal_host_sin(float);
float metal_host_cos(float);
float metal_host_tan(float);
float metal_host_asin(float);
float metal_host_acos(float);
float metal_host_atan(float);
float metal_host_sinh(float);
float metal_host_cosh(float);
float metal_host_tanh(float);
float metal_host_pow(float, float);
float metal_host_atan2(float, float);
float metal_host_fmod(float, float);
float metal_host_ldexp(float, int);
}

namespace metal {

// name(x) of a scalar and of a vector, from an expression in float x.
#define METAL_HOST_UNARY(name, expression)                                   \
  template <class T, METAL_HOST_IF(metal_host::is_float<T>)>                 \
  METAL_HOST_INLINE T name(T a) {                                            \
    float x = (float)a;                                                      \
    return (T)(expression);                                                  \
  }                                                                          \
  template <class T, int N> METAL_HOST_INLINE vec<T, N> name(const vec<T, N>& a) { \
    vec<T, N> out;                                                           \
    for (int i = 0; i < N; i++) out.v[i] = metal::name((T)a.v[i]);           \
    return out;                                                              \
  }
#define METAL_HOST_BINARY(name, expression)                                  \
  template <class T, METAL_HOST_IF(metal_host::is_float<T>)>                 \
  METAL_HOST_INLINE T name(T a, T b) {                                       \
    float x = (float)a;                                                      \
    float y = (float)b;                                                      \
    return (T)(expression);                                                  \
  }                                                                          \
  template <class T, int N>                                                  \
  METAL_HOST_INLINE vec<T, N> name(const vec<T, N>& a, const vec<T, N>& b) { \
    vec<T, N> out;                                                           \
    for (int i = 0; i < N; i++) out.v[i] = metal::name((T)a.v[i], (T)b.v[i]); \
    return out;                                                              \
  }

METAL_HOST_UNARY(exp, metal_host_exp(x))
METAL_HOST_UNARY(exp2, metal_host_exp2(x))
METAL_HOST_UNARY(exp10, metal_host_exp10(x))
METAL_HOST_UNARY(log, metal_host_log(x))
METAL_HOST_UNARY(log2, metal_host_log2(x))
METAL_HOST_UNARY(log10, metal_host_log10(x))
METAL_HOST_UNARY(sin, metal_host_sin(x))
METAL_HOST_UNARY(cos, metal_host_cos(x))
METAL_HOST_UNARY(tan, metal_host_tan(x))
METAL_HOST_UNARY(asin, metal_host_asin(x))
METAL_HOST_UNARY(acos, metal_host_acos(x))
METAL_HOST_UNARY(atan, metal_host_atan(x))
METAL_HOST_UNARY(sinh, metal_host_sinh(x))
METAL_HOST_UNARY(cosh, metal_host_cosh(x))
METAL_HOST_UNARY(tanh, metal_host_tanh(x))
METAL_HOST_UNARY(sqrt, __builtin_sqrtf(x))
METAL_HOST_UNARY(rsqrt, 1.0f / __builtin_sqrtf(x))
METAL_HOST_UNARY(fabs, __builtin_fabsf(x))
METAL_HOST_UNARY(floor, __builtin_floorf(x))
METAL_HOST_UNARY(ceil, __builtin_ceilf(x))
METAL_HOST_UNARY(trunc, __builtin_truncf(x))
METAL_HOST_UNARY(rint, __builtin_nearbyintf(x))
METAL_HOST_UNARY(round, __builtin_roundf(x))
METAL_HOST_UNARY(fract, __builtin_fminf(x - __builtin_floorf(x), 0.99999994f))
METAL_HOST_BINARY(pow, metal_host_pow(x, y))
METAL_HOST_BINARY(powr, metal_host_pow(x, y))
METAL_HOST_BINARY(atan2, metal_host_atan2(x, y))
METAL_HOST_BINARY(fmod, metal_host_fmod(x, y))
METAL_HOST_BINARY(divide, x / y)
METAL_HOST_BINARY(copysign, __builtin_copysignf(x, y))
METAL_HOST_BINARY(fmax, __builtin_fmaxf(x, y))
METAL_HOST_BINARY(fmin, __builtin_fminf(x, y))

template <class T, METAL_HOST_IF(metal_host::is_float<T>)> METAL_HOST_INLINE T ldexp(T a, int exponent) {
  return (T)metal_host_ldexp((float)a, exponent);
}
template <class T, METAL_HOST_IF(metal_host::is_float<T>)> METAL_HOST_INLINE T fma(T a, T b, T c) {
  return (T)__builtin_fmaf((float)a, (float)b, (float)c);
}
template <class T, int N>
METAL_HOST_INLINE vec<T, N> fma(const vec<T, N>& a, const vec<T, N>& b, const vec<T, N>& c) {
  vec<T, N> out;
  for (int i = 0; i < N; i++) out.v[i] = metal::fma((T)a.v[i], (T)b.v[i], (T)c.v[i]);
  return out;
}

// max and min of floats lose a NaN, as fmax and fmin do.
template <class T, METAL_HOST_IF(metal_host::is_scalar<T>)> METAL_HOST_INLINE T max(T a, T b) {
  if constexpr (metal_host::is_float<T>) {
    return metal::fmax(a, b);
  } else {
    return a > b ? a : b;
  }
}
template <class T, METAL_HOST_IF(metal_host::is_scalar<T>)> METAL_HOST_INLINE T min(T a, T b) {
  if constexpr (metal_host::is_float<T>) {
    return metal::fmin(a, b);
  } else {
    return a < b ? a : b;
  }
}
#define METAL_HOST_EXTREME(name)                                                           \
  template <class T, int N>                                                                \
  METAL_HOST_INLINE vec<T, N> name(const vec<T, N>& a, const vec<T, N>& b) {               \
    vec<T, N> out;                                                                         \
    for (int i = 0; i < N; i++) out.v[i] = metal::name((T)a.v[i], (T)b.v[i]);              \
    return out;                                                                            \
  }                                                                                        \
  template <class T, int N> METAL_HOST_INLINE vec<T, N> name(const vec<T, N>& a, T b) {    \
    return metal::name(a, vec<T, N>(b));                                                   \
  }                                                                                        \
  template <class T, METAL_HOST_IF(metal_host::is_scalar<T>)>                              \
  METAL_HOST_INLINE T name##3(T a, T b, T c) {                                             \
    return metal::name(metal::name(a, b), c);                                              \
  }
METAL_HOST_EXTREME(max)
METAL_HOST_EXTREME(min)

template <class T, METAL_HOST_IF(metal_host::is_scalar<T>)> METAL_HOST_INLINE T clamp(T x, T low, T high) {
  return metal::min(metal::max(x, low), high);
}
template <class T, int N>
METAL_HOST_INLINE vec<T, N> clamp(const vec<T, N>& x, const vec<T, N>& low, const vec<T, N>& high) {
  return metal::min(metal::max(x, low), high);
}
template <class T, int N> METAL_HOST_INLINE vec<T, N> clamp(const vec<T, N>& x, T low, T high) {
  return metal::min(metal::max(x, low), high);
}
template <class T, METAL_HOST_IF(metal_host::is_float<T>)> METAL_HOST_INLINE T saturate(T x) {
  return metal::clamp(x, (T)0, (T)1);
}
template <class T, METAL_HOST_IF(metal_host::is_float<T>)> METAL_HOST_INLINE T mix(T a, T b, T t) {
  return a + (b - a) * t;
}
template <class T, METAL_HOST_IF(metal_host::is_float<T>)> METAL_HOST_INLINE T step(T edge, T x) {
  return x < edge ? (T)0 : (T)1;
}
template <class T, METAL_HOST_IF(metal_host::is_float<T>)> METAL_HOST_INLINE T sign(T x) {
  return x > (T)0 ? (T)1 : (x < (T)0 ? (T)-1 : (T)0);
}
template <class T, METAL_HOST_IF(metal_host::is_scalar<T>)> METAL_HOST_INLINE T abs(T a) {
  if constexpr (metal_host::is_float<T>) {
    return metal::fabs(a);
  } else {
    return a < 0 ? -a : a;
  }
}
template <class T, int N> METAL_HOST_INLINE vec<T, N> abs(const vec<T, N>& a) {
  vec<T, N> out;
  for (int i = 0; i < N; i++) out.v[i] = metal::abs((T)a.v[i]);
  return out;
}

template <class T, METAL_HOST_IF(metal_host::is_scalar<T>)> METAL_HOST_INLINE T select(T a, T b, bool take_b) {
  return take_b ? b : a;
}
template <class T, int N>
METAL_HOST_INLINE vec<T, N> select(const vec<T, N>& a, const vec<T, N>& b, const vec<bool, N>& take_b) {
  vec<T, N> out;
  for (int i = 0; i < N; i++) out.v[i] = take_b.v[i] ? b.v[i] : a.v[i];
  return out;
}

#define METAL_HOST_CLASSIFY(name)                            \
  template <class T, METAL_HOST_IF(metal_host::is_float<T>)> \
  METAL_HOST_INLINE bool name(T x) {                         \
    return __builtin_##name((float)x);                       \
  }
METAL_HOST_CLASSIFY(isnan)
METAL_HOST_CLASSIFY(isinf)
METAL_HOST_CLASSIFY(isfinite)
METAL_HOST_CLASSIFY(signbit)

template <class T, int N> METAL_HOST_INLINE T dot(const vec<T, N>& a, const vec<T, N>& b) {
  T sum = a.v[0] * b.v[0];
  for (int i = 1; i < N; i++) sum += a.v[i] * b.v[i];
  return sum;
}
template <class T, int N> METAL_HOST_INLINE T length_squared(const vec<T, N>& a) {
  return metal::dot(a, a);
}
template <class T, int N> METAL_HOST_INLINE T length(const vec<T, N>& a) {
  return metal::sqrt(metal::dot(a, a));
}
template <class T, int N> METAL_HOST_INLINE vec<T, N> normalize(const vec<T, N>& a) {
  return a * metal::rsqrt(metal::dot(a, a));
}

template <class T, METAL_HOST_IF(metal_host::is_integer<T>)> METAL_HOST_INLINE T absdiff(T a, T b) {
  return a > b ? a - b : b - a;
}
template <class T, METAL_HOST_IF(metal_host::is_integer<T>)> METAL_HOST_INLINE T popcount(T x) {
  return (T)__builtin_popcountll((make_unsigned_t<T>)x);
}
template <class T, METAL_HOST_IF(metal_host::is_integer<T>)> METAL_HOST_INLINE T clz(T x) {
  constexpr int bits = sizeof(T) * 8;
  make_unsigned_t<T> u = (make_unsigned_t<T>)x;
  return u ? (T)(__builtin_clzll((ulong)u) - (64 - bits)) : (T)bits;
}
template <class T, METAL_HOST_IF(metal_host::is_integer<T>)> METAL_HOST_INLINE T ctz(T x) {
  make_unsigned_t<T> u = (make_unsigned_t<T>)x;
  return u ? (T)__builtin_ctzll((ulong)u) : (T)(sizeof(T) * 8);
}
METAL_HOST_INLINE uint extract_bits(uint x, uint offset, uint bits) {
  return bits == 0 ? 0u : (x >> offset) & (bits >= 32 ? ~0u : (1u << bits) - 1u);
}
METAL_HOST_INLINE uint reverse_bits(uint x) { return __builtin_bitreverse32(x); }
METAL_HOST_INLINE uint rotate(uint x, uint bits) { return __builtin_rotateleft32(x, bits); }
METAL_HOST_INLINE uint mulhi(uint a, uint b) { return (uint)(((ulong)a * b) >> 32); }
METAL_HOST_INLINE int mulhi(int a, int b) { return (int)(((long)a * b) >> 32); }

// fast:: and precise:: differ in speed and last bits, neither of which is modelled.
#define METAL_HOST_MATH_VARIANTS(F)                                                               \
  F(exp) F(exp2) F(exp10) F(log) F(log2) F(log10) F(sin) F(cos) F(tan) F(asin) F(acos) F(atan)    \
  F(sinh) F(cosh) F(tanh) F(sqrt) F(rsqrt) F(fabs) F(floor) F(ceil) F(trunc) F(rint) F(round)     \
  F(fract) F(pow) F(powr) F(atan2) F(fmod) F(divide) F(copysign) F(fmax) F(fmin) F(fma) F(ldexp)  \
  F(max) F(min) F(clamp) F(abs)
#define METAL_HOST_USING(name) using metal::name;
namespace fast {
METAL_HOST_MATH_VARIANTS(METAL_HOST_USING)
}
namespace precise {
METAL_HOST_MATH_VARIANTS(METAL_HOST_USING)
}

} // namespace metal
