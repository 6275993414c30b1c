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

// BYTES of a load, as words.
template <int BYTES>
struct Words;
template <>
struct Words<1> {
  typedef uchar type;
  static uint get(uchar word, int) {
    return word;
  }
};
template <>
struct Words<2> {
  typedef ushort type;
  static uint get(ushort word, int) {
    return word;
  }
};
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

// Elements 2 i and 2 i + 1 of what a load brought.
template <typename T, int SIZE = sizeof(T)>
struct Pair {
  template <typename W>
  static vec<T, 2> get(typename W::type words, int i) {
    return as_type<vec<T, 2>>(W::get(words, i));
  }
};
template <typename T>
struct Pair<T, 4> {
  template <typename W>
  static vec<T, 2> get(typename W::type words, int i) {
    return vec<T, 2>(as_type<T>(W::get(words, 2 * i)), as_type<T>(W::get(words, 2 * i + 1)));
  }
};

// W elements by one load of at most 16 bytes.
template <typename T, int W>
struct Run {
  typedef Words<W* int(sizeof(T))> words;
  T v[W];

  // From element first + part of a row on; `first` is a constant.
  void load(const device T* row, int first = 0, int part = 0) {
    take(*reinterpret_cast<const device typename words::type*>(row + first + part));
  }

  void load_staged(const threadgroup T* from) {
    take(*reinterpret_cast<const threadgroup typename words::type*>(from));
  }

  void load_if(bool live, const device T* row, int first, int part) {
    if (live) {
      load(row, first, part);
    } else {
      take(typename words::type(0));
    }
  }

  T get(int i) const {
    return v[i];
  }

  void take(typename words::type raw) {
#pragma clang loop unroll(full)
    for (int i = 0; i < W / 2; i++) {
      const vec<T, 2> two = Pair<T>::template get<words>(raw, i);
      v[2 * i] = two.x;
      v[2 * i + 1] = two.y;
    }
  }
};

template <typename T>
struct Run<T, 1> {
  T v[1];

  void load(const device T* row, int first = 0, int part = 0) {
    v[0] = row[first + part];
  }

  void load_if(bool live, const device T* row, int first, int part) {
    v[0] = live ? row[first + part] : T(0.0f);
  }

  T get(int) const {
    return v[0];
  }
};

// W elements, in loads of 16 bytes at the most.
template <int W, typename T>
inline void load_elements(const device T* from, thread T* to) {
  constexpr int kMost = 16 / int(sizeof(T)), kTake = W < kMost ? W : kMost;
#pragma clang loop unroll(full)
  for (int at = 0; at < W; at += kTake) {
    Run<T, kTake> run;
    run.load(from + at);
#pragma clang loop unroll(full)
    for (int i = 0; i < kTake; i++) {
      to[at + i] = run.v[i];
    }
  }
}

// Two elements that another lane holds.
template <typename T>
inline vec<T, 2> from_lane(vec<T, 2> two, ushort lane) {
  return as_type<vec<T, 2>>(simd_shuffle(as_type<uint>(two), lane));
}
template <>
inline float2 from_lane<float>(float2 two, ushort lane) {
  return float2(simd_shuffle(two.x, lane), simd_shuffle(two.y, lane));
}

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
