// vec<T, N>, its swizzles and operators, the packed vectors and as_type.
#pragma once
#include "swizzles.h"
#include "traits.h"

namespace metal {
template <class T, int N> struct vec;
}

namespace metal_host {

using metal::vec;

// What the components of a vector are stored in.
template <class T, int N> struct storage {
  typedef T type __attribute__((ext_vector_type(N)));
};
template <int N> struct storage<bool, N> {
  struct type {
    bool data[N];
    constexpr bool& operator[](int i) { return data[i]; }
    constexpr bool operator[](int i) const { return data[i]; }
  };
};

// How many components an argument of a vector constructor brings.
template <class T> struct components {
  static constexpr bool is_vector = false;
  static constexpr int count = 1;
  typedef T type;
};
template <class T, int N> struct components<vec<T, N>> {
  static constexpr bool is_vector = true;
  static constexpr int count = N;
  typedef T type;
};
#ifdef METAL_HOST_ADDRESS_SPACES
template <class T> struct components<__private T> : components<T> {};
template <class T> struct components<__generic T> : components<T> {};
template <class T> struct components<__local T> : components<T> {};
template <class T> struct components<__global T> : components<T> {};
template <class T> struct components<__constant T> : components<T> {};
#endif
template <class T> inline constexpr bool is_value = is_scalar<T> || components<T>::is_vector;

// A field of a vector that names components I of it; lives in the vector's union.
template <class T, int N, int... I> struct swizzle {
  typedef vec<T, sizeof...(I)> value_type;
  typename storage<T, N>::type source;
  static constexpr int index[4] = {I...};

  METAL_HOST_INLINE constexpr value_type get() const {
    value_type out;
    for (int k = 0; k < (int)sizeof...(I); k++) out.v[k] = source[index[k]];
    return out;
  }
  METAL_HOST_INLINE constexpr operator value_type() const { return get(); }
  METAL_HOST_INLINE T operator[](int k) const { return source[index[k]]; }

  METAL_HOST_INLINE constexpr swizzle& operator=(const value_type& value) {
    for (int k = 0; k < (int)sizeof...(I); k++) source[index[k]] = value.v[k];
    return *this;
  }
  METAL_HOST_INLINE constexpr swizzle& operator=(const swizzle& other) {
    value_type value = other.get();
    return *this = value;
  }
  METAL_HOST_INLINE constexpr swizzle& operator=(T value) {
    for (int k = 0; k < (int)sizeof...(I); k++) source[index[k]] = value;
    return *this;
  }
};
template <class T, int N, int... I> struct components<swizzle<T, N, I...>> {
  static constexpr bool is_vector = true;
  static constexpr int count = sizeof...(I);
  typedef T type;
};

// Operators of swizzles stand outside the class: a vector has hundreds of these fields.
#define METAL_HOST_SWIZZLE_OPERATOR(op)                                                     \
  template <class T, int N, int... I, class U>                                              \
  METAL_HOST_INLINE auto operator op(const swizzle<T, N, I...>& a, const U& b) {            \
    return a.get() op b;                                                                    \
  }                                                                                         \
  template <class T, int N, int... I, class U>                                              \
  METAL_HOST_INLINE swizzle<T, N, I...>& operator op##=(swizzle<T, N, I...>& a, const U& b) { \
    return a = typename swizzle<T, N, I...>::value_type(a.get() op b);                      \
  }
METAL_HOST_SWIZZLE_OPERATOR(+)
METAL_HOST_SWIZZLE_OPERATOR(-)
METAL_HOST_SWIZZLE_OPERATOR(*)
METAL_HOST_SWIZZLE_OPERATOR(/)

// Writes the components of `value` from component `at` on; returns the next.
template <class V, class U> METAL_HOST_INLINE constexpr int place(V& out, int at, const U& value) {
  if constexpr (components<U>::is_vector) {
    vec<typename components<U>::type, components<U>::count> all = value;
    for (int i = 0; i < components<U>::count; i++) out.v[at + i] = all.v[i];
  } else {
    out.v[at] = (typename components<V>::type)value;
  }
  return at + components<U>::count;
}

} // namespace metal_host

namespace metal {

#define METAL_HOST_VECTOR_MEMBERS(N)                                                              \
  typedef T elem;                                                                                 \
  vec() = default;                                                                                \
  METAL_HOST_INLINE constexpr vec(const vec& other) : v(other.v) {}                               \
  METAL_HOST_INLINE constexpr vec& operator=(const vec& other) {                                  \
    v = other.v;                                                                                  \
    return *this;                                                                                 \
  }                                                                                               \
  template <class U, METAL_HOST_IF(metal_host::is_scalar<U>)>                                     \
  METAL_HOST_INLINE constexpr vec(U value) : v{} {                                                \
    for (int i = 0; i < N; i++) v[i] = (T)value;                                                  \
  }                                                                                               \
  template <class U, METAL_HOST_IF(!__is_same(U, T))>                                             \
  METAL_HOST_INLINE constexpr explicit vec(const vec<U, N>& other) : v{} {                        \
    for (int i = 0; i < N; i++) v[i] = (T)other.v[i];                                             \
  }                                                                                               \
  template <class A, class B, class... Rest,                                                      \
            METAL_HOST_IF(metal_host::components<A>::count + metal_host::components<B>::count +   \
                              (0 + ... + metal_host::components<Rest>::count) ==                  \
                          N)>                                                                     \
  METAL_HOST_INLINE constexpr vec(const A& a, const B& b, const Rest&... rest) : v{} {            \
    int at = metal_host::place<vec>(*this, 0, a);                                                 \
    at = metal_host::place<vec>(*this, at, b);                                                    \
    ((at = metal_host::place<vec>(*this, at, rest)), ...);                                        \
  }                                                                                               \
  METAL_HOST_INLINE constexpr T& operator[](int i) { return ((T*)&v)[i]; }                        \
  METAL_HOST_INLINE constexpr const T& operator[](int i) const { return ((const T*)&v)[i]; }

template <class T> struct vec<T, 1> {
  union {
    typename metal_host::storage<T, 1>::type v;
    T x;
  };
  vec() = default;
  METAL_HOST_INLINE constexpr vec(const vec& other) : v(other.v) {}
  METAL_HOST_INLINE constexpr vec& operator=(const vec& other) {
    v = other.v;
    return *this;
  }
  METAL_HOST_INLINE constexpr vec(T value) : v{} { v[0] = value; }
  METAL_HOST_INLINE constexpr T& operator[](int i) { return ((T*)&v)[i]; }
  METAL_HOST_INLINE constexpr const T& operator[](int i) const { return ((const T*)&v)[i]; }
};

template <class T> struct vec<T, 2> {
#define METAL_HOST_SWIZZLE(name, ...) metal_host::swizzle<T, 2, __VA_ARGS__> name;
  union {
    typename metal_host::storage<T, 2>::type v;
    struct { T x, y; };
    METAL_HOST_SWIZZLES(2)
  };
#undef METAL_HOST_SWIZZLE
  METAL_HOST_VECTOR_MEMBERS(2)
};

template <class T> struct vec<T, 3> {
#define METAL_HOST_SWIZZLE(name, ...) metal_host::swizzle<T, 3, __VA_ARGS__> name;
  union {
    typename metal_host::storage<T, 3>::type v;
    struct { T x, y, z; };
    METAL_HOST_SWIZZLES(3)
  };
#undef METAL_HOST_SWIZZLE
  METAL_HOST_VECTOR_MEMBERS(3)
};

template <class T> struct vec<T, 4> {
#define METAL_HOST_SWIZZLE(name, ...) metal_host::swizzle<T, 4, __VA_ARGS__> name;
  union {
    typename metal_host::storage<T, 4>::type v;
    struct { T x, y, z, w; };
    METAL_HOST_SWIZZLES(4)
  };
#undef METAL_HOST_SWIZZLE
  METAL_HOST_VECTOR_MEMBERS(4)
};

// Vector with vector, vector with scalar, scalar with vector, and `op=`.
#define METAL_HOST_ARITHMETIC(op)                                                                 \
  template <class T, int N, METAL_HOST_IF(!__is_same(T, bool))>                                   \
  METAL_HOST_INLINE vec<T, N> operator op(const vec<T, N>& a, const vec<T, N>& b) {               \
    vec<T, N> out;                                                                                \
    out.v = a.v op b.v;                                                                           \
    return out;                                                                                   \
  }                                                                                               \
  template <class T, int N, class U, METAL_HOST_IF(metal_host::is_scalar<U>)>                     \
  METAL_HOST_INLINE vec<T, N> operator op(const vec<T, N>& a, U b) {                              \
    return a op vec<T, N>(b);                                                                     \
  }                                                                                               \
  template <class T, int N, class U, METAL_HOST_IF(metal_host::is_scalar<U>)>                     \
  METAL_HOST_INLINE vec<T, N> operator op(U a, const vec<T, N>& b) {                              \
    return vec<T, N>(a) op b;                                                                     \
  }                                                                                               \
  template <class T, int N, int M, int... I>                                                      \
  METAL_HOST_INLINE vec<T, N> operator op(const vec<T, N>& a,                                     \
                                          const metal_host::swizzle<T, M, I...>& b) {             \
    return a op b.get();                                                                          \
  }                                                                                               \
  template <class T, int N, class U>                                                              \
  METAL_HOST_INLINE vec<T, N>& operator op##=(vec<T, N>& a, const U& b) {                         \
    return a = a op b;                                                                            \
  }
METAL_HOST_ARITHMETIC(+)
METAL_HOST_ARITHMETIC(-)
METAL_HOST_ARITHMETIC(*)
METAL_HOST_ARITHMETIC(/)
METAL_HOST_ARITHMETIC(%)
METAL_HOST_ARITHMETIC(&)
METAL_HOST_ARITHMETIC(|)
METAL_HOST_ARITHMETIC(^)
METAL_HOST_ARITHMETIC(<<)
METAL_HOST_ARITHMETIC(>>)

template <class T, int N> METAL_HOST_INLINE vec<T, N> operator+(const vec<T, N>& a) {
  return a;
}
template <class T, int N> METAL_HOST_INLINE vec<T, N> operator-(const vec<T, N>& a) {
  vec<T, N> out;
  out.v = -a.v;
  return out;
}
template <class T, int N> METAL_HOST_INLINE vec<T, N> operator~(const vec<T, N>& a) {
  vec<T, N> out;
  out.v = ~a.v;
  return out;
}
template <int N> METAL_HOST_INLINE vec<bool, N> operator!(const vec<bool, N>& a) {
  vec<bool, N> out;
  for (int i = 0; i < N; i++) out.v[i] = !a.v[i];
  return out;
}

#define METAL_HOST_COMPARISON(op)                                                       \
  template <class T, int N>                                                             \
  METAL_HOST_INLINE vec<bool, N> operator op(const vec<T, N>& a, const vec<T, N>& b) {  \
    vec<bool, N> out;                                                                   \
    for (int i = 0; i < N; i++) out.v[i] = a.v[i] op b.v[i];                            \
    return out;                                                                         \
  }                                                                                     \
  template <class T, int N, class U, METAL_HOST_IF(metal_host::is_scalar<U>)>           \
  METAL_HOST_INLINE vec<bool, N> operator op(const vec<T, N>& a, U b) {                 \
    return a op vec<T, N>(b);                                                           \
  }                                                                                     \
  template <class T, int N, class U, METAL_HOST_IF(metal_host::is_scalar<U>)>           \
  METAL_HOST_INLINE vec<bool, N> operator op(U a, const vec<T, N>& b) {                 \
    return vec<T, N>(a) op b;                                                           \
  }
METAL_HOST_COMPARISON(<)
METAL_HOST_COMPARISON(>)
METAL_HOST_COMPARISON(<=)
METAL_HOST_COMPARISON(>=)
METAL_HOST_COMPARISON(==)
METAL_HOST_COMPARISON(!=)
METAL_HOST_COMPARISON(&&)
METAL_HOST_COMPARISON(||)

template <int N> METAL_HOST_INLINE bool all(const vec<bool, N>& a) {
  bool out = true;
  for (int i = 0; i < N; i++) out = out && a.v[i];
  return out;
}
template <int N> METAL_HOST_INLINE bool any(const vec<bool, N>& a) {
  bool out = false;
  for (int i = 0; i < N; i++) out = out || a.v[i];
  return out;
}
METAL_HOST_INLINE bool all(bool a) { return a; }
METAL_HOST_INLINE bool any(bool a) { return a; }

} // namespace metal

namespace metal_host {

// A vector aligned like its element.
template <class T, int N> struct packed {
  T data[N];
  packed() = default;
  METAL_HOST_INLINE packed(const vec<T, N>& value) {
    for (int i = 0; i < N; i++) data[i] = value.v[i];
  }
  METAL_HOST_INLINE operator vec<T, N>() const {
    vec<T, N> out;
    for (int i = 0; i < N; i++) out.v[i] = data[i];
    return out;
  }
  METAL_HOST_INLINE T& operator[](int i) { return data[i]; }
  METAL_HOST_INLINE const T& operator[](int i) const { return data[i]; }
};

} // namespace metal_host

#define METAL_HOST_VECTOR_NAMES(T)              \
  typedef metal::vec<T, 2> T##2;                \
  typedef metal::vec<T, 3> T##3;                \
  typedef metal::vec<T, 4> T##4;                \
  typedef metal_host::packed<T, 2> packed_##T##2; \
  typedef metal_host::packed<T, 3> packed_##T##3; \
  typedef metal_host::packed<T, 4> packed_##T##4; \
  namespace metal {                             \
  using ::T##2;                                 \
  using ::T##3;                                 \
  using ::T##4;                                 \
  }
METAL_HOST_VECTOR_NAMES(bool)
METAL_HOST_VECTOR_NAMES(char)
METAL_HOST_VECTOR_NAMES(uchar)
METAL_HOST_VECTOR_NAMES(short)
METAL_HOST_VECTOR_NAMES(ushort)
METAL_HOST_VECTOR_NAMES(int)
METAL_HOST_VECTOR_NAMES(uint)
METAL_HOST_VECTOR_NAMES(long)
METAL_HOST_VECTOR_NAMES(ulong)
METAL_HOST_VECTOR_NAMES(half)
METAL_HOST_VECTOR_NAMES(float)
METAL_HOST_VECTOR_NAMES(bfloat)

namespace metal {
#ifndef METAL_HOST_ADDRESS_SPACES
using ::half;
#endif
using ::bfloat;
using ::size_t;
using ::uchar;
using ::uint;
using ::ulong;
using ::ushort;
} // namespace metal

template <class To, class From> METAL_HOST_INLINE constexpr To as_type(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "as_type keeps the size");
  constexpr bool to_vector = metal_host::components<To>::is_vector;
  constexpr bool from_vector = metal_host::components<From>::is_vector;
  if constexpr (!to_vector && !from_vector) {
    return __builtin_bit_cast(To, from);
  } else if constexpr (!to_vector) {
    return __builtin_bit_cast(To, from.v);
  } else {
    To out;
    if constexpr (from_vector) {
      out.v = __builtin_bit_cast(decltype(out.v), from.v);
    } else {
      out.v = __builtin_bit_cast(decltype(out.v), from);
    }
    return out;
  }
}
namespace metal {
using ::as_type;
}
