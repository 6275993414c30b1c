// Numbers and wide loads.
#ifndef PAGED_MLX_NUMBERS_H
#define PAGED_MLX_NUMBERS_H

#include <metal_stdlib>

namespace paged_mlx {

using namespace metal;

// The score of a key that a row does not see.
constant constexpr float kHidden = -INFINITY;
// Where a maximum of scores starts. It is finite: no score minus a maximum is the
// difference of two minus infinities, which would be NaN.
constant constexpr float kLowest = -3.40282347e38f;
constant constexpr float kLog2E = 1.44269504088896f;
constant constexpr float kLn2 = 0.693147180559945f;
// The weight of a key that a row does not see, a zero that can be told from a weight
// so small that it is 0.
constant constexpr float kNoWeight = -0.0f;

inline float minus_infinity() {
  return as_type<float>(0xff800000u);
}

inline bool is_minus_infinity(float x) {
  return as_type<uint>(x) == 0xff800000u;
}

inline bool is_no_weight(float x) {
  return as_type<uint>(x) == 0x80000000u;
}

// An infinity or a NaN.
inline bool is_not_finite(float x) {
  return (as_type<uint>(x) & 0x7f800000u) == 0x7f800000u;
}

// W elements by one load of at most 16 bytes.
template <int BYTES>
struct Words;
template <>
struct Words<4> {
  typedef uint type;
  static uint get(uint words, int) {
    return words;
  }
};
template <>
struct Words<8> {
  typedef uint2 type;
  static uint get(uint2 words, int i) {
    return words[i];
  }
};
template <>
struct Words<16> {
  typedef uint4 type;
  static uint get(uint4 words, int i) {
    return words[i];
  }
};

template <typename T, int W, int SIZE = sizeof(T)>
struct Run {
  T v[W];

  void load_if(bool live, const device T* from) {
    if (live) {
      load(from);
    } else {
#pragma clang loop unroll(full)
      for (int i = 0; i < W; i++) {
        v[i] = T(0.0f);
      }
    }
  }

  void load(const device T* from) {
    typedef Words<2 * W> words;
    const typename words::type raw = *reinterpret_cast<const device typename words::type*>(from);
#pragma clang loop unroll(full)
    for (int i = 0; i < W / 2; i++) {
      const vec<T, 2> two = as_type<vec<T, 2>>(words::get(raw, i));
      v[2 * i] = two.x;
      v[2 * i + 1] = two.y;
    }
  }
};

template <typename T, int W>
struct Run<T, W, 4> {
  T v[W];

  void load_if(bool live, const device T* from) {
    if (live) {
      load(from);
    } else {
#pragma clang loop unroll(full)
      for (int i = 0; i < W; i++) {
        v[i] = T(0.0f);
      }
    }
  }

  void load(const device T* from) {
    typedef Words<4 * W> words;
    const typename words::type raw = *reinterpret_cast<const device typename words::type*>(from);
#pragma clang loop unroll(full)
    for (int i = 0; i < W; i++) {
      v[i] = as_type<T>(words::get(raw, i));
    }
  }
};

template <typename T>
struct Run<T, 1, 2> {
  T v[1];

  void load_if(bool live, const device T* from) {
    if (live) {
      load(from);
    } else {
#pragma clang loop unroll(full)
      for (int i = 0; i < 1; i++) {
        v[i] = T(0.0f);
      }
    }
  }

  void load(const device T* from) {
    v[0] = *from;
  }
};

// Elements that each of `lanes` lanes takes from a row of which `left` are left:
// 16 bytes, or less where the row ends sooner.
template <typename T>
constexpr int run_width(int left, int lanes) {
  int width = 16 / int(sizeof(T));
  while (width * lanes > left) {
    width /= 2;
  }
  return width;
}

} // namespace paged_mlx

#endif
