// <metal_type_traits>, <metal_limits> and <metal_array>.
#pragma once
#include "dialect.h"

namespace metal {

template <class T, T v>
struct integral_constant {
  static constexpr T value = v;
  typedef T value_type;
  typedef integral_constant type;
  constexpr operator T() const { return v; }
  constexpr T operator()() const { return v; }
};
typedef integral_constant<bool, true> true_type;
typedef integral_constant<bool, false> false_type;
template <bool B> using bool_constant = integral_constant<bool, B>;

template <bool B, class T = void> struct enable_if {};
template <class T> struct enable_if<true, T> { typedef T type; };
template <bool B, class T = void> using enable_if_t = typename enable_if<B, T>::type;

template <bool B, class T, class F> struct conditional { typedef T type; };
template <class T, class F> struct conditional<false, T, F> { typedef F type; };
template <bool B, class T, class F> using conditional_t = typename conditional<B, T, F>::type;

#define METAL_HOST_TRANSFORM(name, result)              \
  template <class T> struct name { typedef result type; }; \
  template <class T> using name##_t = result;
METAL_HOST_TRANSFORM(remove_cv, __remove_cv(T))
METAL_HOST_TRANSFORM(remove_const, __remove_const(T))
METAL_HOST_TRANSFORM(remove_reference, __remove_reference_t(T))
METAL_HOST_TRANSFORM(remove_pointer, __remove_pointer(T))
METAL_HOST_TRANSFORM(remove_cvref, __remove_cvref(T))
METAL_HOST_TRANSFORM(decay, __decay(T))
METAL_HOST_TRANSFORM(make_unsigned, __make_unsigned(T))
METAL_HOST_TRANSFORM(make_signed, __make_signed(T))

#define METAL_HOST_PREDICATE(name, test)                            \
  template <class T> inline constexpr bool name##_v = test;            \
  template <class T> struct name : bool_constant<test> {};
METAL_HOST_PREDICATE(is_integral, __is_integral(T))
METAL_HOST_PREDICATE(is_floating_point, __is_floating_point(T))
METAL_HOST_PREDICATE(is_arithmetic, __is_arithmetic(T))
METAL_HOST_PREDICATE(is_signed, __is_signed(T))
METAL_HOST_PREDICATE(is_unsigned, __is_unsigned(T))
METAL_HOST_PREDICATE(is_pointer, __is_pointer(T))
METAL_HOST_PREDICATE(is_const, __is_const(T))

template <class A, class B> inline constexpr bool is_same_v = __is_same(A, B);
template <class A, class B> struct is_same : bool_constant<__is_same(A, B)> {};
template <class A, class B> inline constexpr bool is_convertible_v = __is_convertible_to(A, B);
template <class A, class B> struct is_convertible : bool_constant<__is_convertible_to(A, B)> {};
template <class T> T&& declval();

#define METAL_HOST_INTEGER_LIMITS(T, low, high)                                \
  template <> struct numeric_limits<T> {                                       \
    static constexpr bool is_specialized = true;                               \
    static constexpr bool is_integer = true;                                   \
    static constexpr bool is_signed = (T)-1 < (T)1;                            \
    static constexpr int digits = sizeof(T) * 8 - is_signed;                   \
    static constexpr T min() { return (T)(low); }                              \
    static constexpr T max() { return (T)(high); }                             \
    static constexpr T lowest() { return (T)(low); }                           \
  };
#define METAL_HOST_FLOAT_LIMITS(T, high, tiny, step, bits)                     \
  template <> struct numeric_limits<T> {                                       \
    static constexpr bool is_specialized = true;                               \
    static constexpr bool is_integer = false;                                  \
    static constexpr bool is_signed = true;                                    \
    static constexpr bool has_infinity = true;                                 \
    static constexpr int digits = bits;                                        \
    static constexpr T min() { return (T)(tiny); }                             \
    static constexpr T max() { return (T)(high); }                             \
    static constexpr T lowest() { return (T)(-(high)); }                       \
    static constexpr T epsilon() { return (T)(step); }                         \
    static constexpr T infinity() { return (T)__builtin_inff(); }              \
    static constexpr T quiet_NaN() { return (T)__builtin_nanf(""); }           \
  };
template <class T> struct numeric_limits {
  static constexpr bool is_specialized = false;
};
METAL_HOST_INTEGER_LIMITS(bool, 0, 1)
METAL_HOST_INTEGER_LIMITS(char, -128, 127)
METAL_HOST_INTEGER_LIMITS(signed char, -128, 127)
METAL_HOST_INTEGER_LIMITS(uchar, 0, 255)
METAL_HOST_INTEGER_LIMITS(short, -32768, 32767)
METAL_HOST_INTEGER_LIMITS(ushort, 0, 65535)
METAL_HOST_INTEGER_LIMITS(int, -2147483647 - 1, 2147483647)
METAL_HOST_INTEGER_LIMITS(uint, 0, 4294967295u)
METAL_HOST_INTEGER_LIMITS(long, -9223372036854775807L - 1, 9223372036854775807L)
METAL_HOST_INTEGER_LIMITS(ulong, 0, 18446744073709551615ul)
METAL_HOST_FLOAT_LIMITS(float, 3.402823466e+38F, 1.175494351e-38F, 1.192092896e-07F, 24)
METAL_HOST_FLOAT_LIMITS(half, 65504.0F, 6.103515625e-5F, 9.765625e-4F, 11)
METAL_HOST_FLOAT_LIMITS(bfloat, 3.38953139e38F, 1.175494351e-38F, 0.0078125F, 8)

template <class T, size_t N> struct array {
  T data[N];
  METAL_HOST_INLINE T& operator[](size_t i) { return data[i]; }
  METAL_HOST_INLINE const T& operator[](size_t i) const { return data[i]; }
  static constexpr size_t size() { return N; }
};

} // namespace metal

namespace metal_host {

template <class T> inline constexpr bool is_scalar = __is_arithmetic(T);
template <class T> inline constexpr bool is_integer = __is_integral(T);
template <class T> inline constexpr bool is_float =
    __is_same(T, float) || __is_same(T, half) || __is_same(T, bfloat);

} // namespace metal_host
