// How the elements of a page's rows are stored, and what a format's scales do.
//
// An element of a format is scale * code + bias, its code a whole number of 8 or 4 bits.
// Attention never makes elements of codes: it multiplies codes, which every T holds exactly,
// and brings scales and biases to what is small. With a scale and a bias for each token
// and group of channels, a score is the sum over groups of
// scale * (q . codes) + bias * sum(q), and a weighted sum of values is that of codes with
// weights * scale, plus sum(weights * bias). With a scale and a bias for each channel of a
// page, q . k is (q * scale) . codes + q . bias, of which both parts are made once a page.
#ifndef PAGED_MLX_PAGE_FORMATS_H
#define PAGED_MLX_PAGE_FORMATS_H

#include "arguments.h"
#include "numbers.h"

// Macros of a variant; dense where they are not given.
#ifndef PAGED_MLX_K_FORMAT
#define PAGED_MLX_K_FORMAT PAGED_MLX_DENSE
#endif
#ifndef PAGED_MLX_V_FORMAT
#define PAGED_MLX_V_FORMAT PAGED_MLX_DENSE
#endif

// Parameters of a kernel that reads pages: what k_pages and v_pages point to, and the scales
// and biases of a side that has them.
#if PAGED_MLX_K_FORMAT == PAGED_MLX_DENSE
#define PAGED_MLX_K_STORED PAGED_MLX_T
#define PAGED_MLX_K_SCALE_PARAMETERS
#define PAGED_MLX_K_SCALES {nullptr, nullptr}
#else
#define PAGED_MLX_K_STORED uchar
#define PAGED_MLX_K_SCALE_PARAMETERS                                        \
  const device PAGED_MLX_T *k_scales [[buffer(PAGED_MLX_BUFFER_K_SCALES)]], \
      const device PAGED_MLX_T *k_biases [[buffer(PAGED_MLX_BUFFER_K_BIASES)]],
#define PAGED_MLX_K_SCALES {k_scales, k_biases}
#endif

#if PAGED_MLX_V_FORMAT == PAGED_MLX_DENSE
#define PAGED_MLX_V_STORED PAGED_MLX_T
#define PAGED_MLX_V_SCALE_PARAMETERS
#define PAGED_MLX_V_SCALES {nullptr, nullptr}
#else
#define PAGED_MLX_V_STORED uchar
#define PAGED_MLX_V_SCALE_PARAMETERS                                        \
  const device PAGED_MLX_T *v_scales [[buffer(PAGED_MLX_BUFFER_V_SCALES)]], \
      const device PAGED_MLX_T *v_biases [[buffer(PAGED_MLX_BUFFER_V_BIASES)]],
#define PAGED_MLX_V_SCALES {v_scales, v_biases}
#endif

namespace paged_mlx {

// Codes as numbers of T, which hold them exactly: code = kScale * number + kMiddle. They are
// counted from the middle of the codes, because sums of both signs lose less to rounding.
//
// In half and bfloat a code is put into the first bits behind the point of 1: an integer
// instruction or two make two of them. 1.5 is taken off.
template <typename T, int BITS>
struct CodeNumbers;

// Codes k and k + 16 / BITS of a word, in the mantissas of two numbers from 1 on.
template <int BITS, int MANTISSA>
inline uint put_behind_one(uint word, int k, uint ones) {
  constexpr uint kCode = ((1u << BITS) - 1) << (MANTISSA - BITS);
  const int left = MANTISSA - BITS - BITS * k;
  return ((left >= 0 ? word << left : word >> -left) & (kCode | kCode << 16)) | ones;
}

// Two floats that bfloat holds: their upper halves.
inline bfloat2 upper_halves(float2 two) {
  const uint2 bits = as_type<uint2>(two);
  return as_type<bfloat2>((bits.x >> 16) | (bits.y & 0xffff0000u));
}

template <int BITS>
struct CodeNumbers<half, BITS> {
  enum { kScale = 1 << BITS, kMiddle = 1 << (BITS - 1) };

  static half2 get(uint word, int k) {
    return as_type<half2>(put_behind_one<BITS, 10>(word, k, 0x3c003c00u)) - half(1.5f);
  }
};
template <>
struct CodeNumbers<bfloat, 4> {
  enum { kScale = 16, kMiddle = 8 };

  static bfloat2 get(uint word, int k) {
    const uint two = put_behind_one<4, 7>(word, k, 0x3f803f80u);
    return upper_halves(as_type<float2>(uint2(two << 16, two & 0xffff0000u)) - 1.5f);
  }
};

// 2^23 and more have no bits behind the point.
template <int BITS>
struct CodeNumbers<float, BITS> {
  enum { kScale = 1, kMiddle = 1 << (BITS - 1) };

  static float2 get(uint word, int k) {
    constexpr uint kCode = (1u << BITS) - 1;
    const uint2 codes = uint2(word >> (BITS * k), word >> (BITS * k + 16)) & kCode;
    return as_type<float2>(codes | 0x4b000000u) - float(8388608 + kMiddle);
  }
};
template <>
struct CodeNumbers<bfloat, 8> {
  enum { kScale = 1, kMiddle = 128 };

  static bfloat2 get(uint word, int k) {
    return upper_halves(CodeNumbers<float, 8>::get(word, k));
  }
};

// W codes of BITS by one load, made numbers as they are asked for.
template <typename T, int BITS, int W>
struct CodeRun {
  typedef Words<W * BITS / 8> words;
  typename words::type raw;

  // From element first + part of a row on.
  void load(const device uchar* row, int first, int part) {
    const device uchar* from = row + first * BITS / 8 + part * BITS / 8;
    raw = *reinterpret_cast<const device typename words::type*>(from);
  }

  void load_if(bool live, const device uchar* row, int first, int part) {
    if (live) {
      load(row, first, part);
    } else {
      raw = typename words::type(0);
    }
  }

  // The two halves of a word are taken together: a compiler makes them once.
  T get(int i) const {
    constexpr int kWord = 32 / BITS, kHalf = kWord / 2;
    const vec<T, 2> two = CodeNumbers<T, BITS>::get(words::get(raw, i / kWord), i % kHalf);
    return i % kWord < kHalf ? two.x : two.y;
  }
};

template <typename T>
struct CodeRun<T, 4, 1> {
  uint code;

  void load(const device uchar* row, int first, int part) {
    code = (row[(first + part) / 2] >> (4 * ((first + part) & 1))) & 15u;
  }

  void load_if(bool live, const device uchar* row, int first, int part) {
    code = 0;
    if (live) {
      load(row, first, part);
    }
  }

  T get(int) const {
    return CodeNumbers<T, 4>::get(code, 0).x;
  }
};

// Codes that a lane takes at a time of `left` that lanes share: 16 bytes, or fewer where
// the row ends sooner, or where `share` lanes would take more than a group of them.
constexpr int code_width(int bits, int group, int left, int lanes, int share) {
  int width = 128 / bits;
  while (width * lanes > left || (group > 0 && width * share > group)) {
    width /= 2;
  }
  return width;
}

// The rows of pages of one side. GROUP: channels that share a token's scale.
template <typename T, int FORMAT, int GROUP>
struct PageRows {
  enum {
    kBits = FORMAT == PAGED_MLX_TOKEN8 ? 8 : 4,
    kIsCoded = true,
    kHasTokenScales = FORMAT != PAGED_MLX_CHANNEL4,
    kHasChannelScales = FORMAT == PAGED_MLX_CHANNEL4,
    kGroup = kHasTokenScales ? GROUP : 1
  };
  typedef uchar Stored;

  template <int W>
  using Elements = CodeRun<T, kBits, W>;

  // Row `row`, of N elements.
  template <int N>
  static const device uchar* at(const device uchar* rows, long row) {
    return rows + row * (N * kBits / 8);
  }

  // Element `first` of a row, of those that begin a byte.
  static const device uchar* from(const device uchar* row, int first) {
    return row + first * kBits / 8;
  }

  static constexpr int width(int left, int lanes, int share) {
    return code_width(kBits, kHasTokenScales ? GROUP : 0, left, lanes, share);
  }
};

template <typename T, int GROUP>
struct PageRows<T, PAGED_MLX_DENSE, GROUP> {
  enum {
    kBits = 8,
    kIsCoded = false,
    kHasTokenScales = false,
    kHasChannelScales = false,
    kGroup = 1
  };
  typedef T Stored;

  template <int W>
  using Elements = Run<T, W>;

  template <int N>
  static const device T* at(const device T* rows, long row) {
    return rows + row * N;
  }

  static const device T* from(const device T* row, int first) {
    return row + first;
  }

  static constexpr int width(int left, int lanes, int) {
    return run_width<T>(left, lanes);
  }
};

// Scales of a token.
constexpr int groups_of(int dim) {
  return group_size(dim) > 0 ? dim / group_size(dim) : 0;
}

// The scales and biases of a side: [rows, groups] or [num_pages, num_kv_heads, channels].
template <typename T>
struct PageScales {
  const device T* scales;
  const device T* biases;
};

// The scale and the bias of codes as those of CodeNumbers.
template <int BITS, typename T>
inline float2 of_numbers(T scale, T bias) {
  typedef CodeNumbers<T, BITS> Numbers;
  return float2(Numbers::kScale * float(scale), float(bias) + Numbers::kMiddle * float(scale));
}

// The scales and biases of KEYS keys of a simdgroup, GROUPS groups each: a lane loads those
// of key lane % KEYS, of every 32 / KEYS-th group.
template <typename T, int KEYS, int GROUPS>
struct TokenScales {
  enum { kStride = 32 / KEYS, kLoads = (GROUPS + kStride - 1) / kStride };

  vec<T, 2> own[kLoads];

  // `row`: of the lane's key.
  void load(PageScales<T> side, long row, bool live, short lane) {
#pragma clang loop unroll(full)
    for (int i = 0; i < kLoads; i++) {
      const int group = kStride * i + lane / KEYS;
      own[i] = vec<T, 2>(T(0.0f));
      if (live && group < GROUPS) {
        const long at = row * GROUPS + group;
        own[i] = vec<T, 2>(side.scales[at], side.biases[at]);
      }
    }
  }

  // Of a key that differs from lane to lane and a group that does not, see of_numbers.
  template <int BITS>
  float2 of(int key, int group) const {
    vec<T, 2> loaded = own[0];
#pragma clang loop unroll(full)
    for (int i = 1; i < kLoads; i++) {
      loaded = group / kStride == i ? own[i] : loaded;
    }
    const vec<T, 2> two = from_lane(loaded, key + KEYS * (group % kStride));
    return of_numbers<BITS>(two.x, two.y);
  }

  // To [GROUPS, stride] in threadgroup memory, the first key's at `to`.
  void stage(threadgroup vec<T, 2>* to, int stride, short lane) const {
#pragma clang loop unroll(full)
    for (int i = 0; i < kLoads; i++) {
      const int group = kStride * i + lane / KEYS;
      if (group < GROUPS) {
        to[group * stride + lane % KEYS] = own[i];
      }
    }
  }
};

template <typename T, int KEYS>
struct TokenScales<T, KEYS, 0> {
  void load(PageScales<T>, long, bool, short) {}

  template <int BITS>
  float2 of(int, int) const {
    return float2(0);
  }

  void stage(threadgroup vec<T, 2>*, int, short) const {}
};

} // namespace paged_mlx

#endif
