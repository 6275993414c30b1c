// Decode attention over pages of codes, in integers: for 16-bit dtypes, on machines with
// AVX512-VNNI.
//
// Codes are small integers already. A row of q becomes integers of 24 bits, in three digits, in
// units of a power of 2: few words of a bfloat16 q have a lowest digit, and those alone are
// multiplied by it. The weights of a chunk of keys become integers of 16 bits, by a scale of their
// own for each group of 64 channels. Products of integers add up exactly, and scales and biases
// meet the sums, never an element.
//   Scores: lanes are keys. The codes of 16 keys are transposed in words of 32 bits.
//   Values: lanes are channels. Two keys are multiplied at a time.
// A chunk is up to 64 keys of one page that every row of the group sees. What is not finite, or
// hidden from some row, is left to the floats (CodedPass in attend_tile.h).
#pragma once

#include "cpu/tile_block.h"

// gcc assembles what it is told; clang only what its flags name.
#if defined(__AVX512BW__) && (defined(__AVX512VNNI__) || !defined(__clang__)) && \
    !defined(PAGED_MLX_EMULATED_LANES)
#define PAGED_MLX_TILE_INTEGERS 1

namespace paged_mlx::cpu {
namespace {

constexpr int kChunkKeys = 64;
constexpr int kChunkBlocks = kChunkKeys / kBlockKeys;
constexpr int kGroup = 64; // channels
constexpr int kMaxGroups = kMaxHeadDim / kGroup;

constexpr int kDigits = 4;      // of a value of q, in base 256; the last is 0
constexpr int kQueryWords = 16; // of a group of 64

PAGED_MLX_INLINE __m512i splat_word_at(const int32_t* p) {
  return _mm512_set1_epi32(*p);
}

// Products of four codes with four digits, and of two codes with two weights, added to sums. In
// assembly, for from the intrinsics gcc 12 makes copies of the sums.
PAGED_MLX_INLINE void add_fours(__m512i& sum, __m512i codes, __m512i digits) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(digits));
}
PAGED_MLX_INLINE void add_twos(__m512i& sum, __m512i codes, __m512i weights) {
  __asm__("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(weights));
}

// In each quarter: the sums, or the largest, of the lanes of four vectors.
template <typename Join>
PAGED_MLX_INLINE Vec across(const Vec (&v)[4], Join join) {
  auto halves = [&](Vec a, Vec b) __attribute__((always_inline)) {
    return join((Vec)_mm512_unpacklo_ps((__m512)a, (__m512)b),
                (Vec)_mm512_unpackhi_ps((__m512)a, (__m512)b));
  };
  const __m512d ab = (__m512d)halves(v[0], v[1]), cd = (__m512d)halves(v[2], v[3]);
  const Vec all = join((Vec)_mm512_unpacklo_pd(ab, cd), (Vec)_mm512_unpackhi_pd(ab, cd));
  const Vec two = join(all, (Vec)_mm512_shuffle_f32x4((__m512)all, (__m512)all, 0x4e));
  return join(two, (Vec)_mm512_shuffle_f32x4((__m512)two, (__m512)two, 0xb1));
}
PAGED_MLX_INLINE Vec sums_of(const Vec (&v)[4]) {
  return across(v, [](Vec a, Vec b) __attribute__((always_inline)) { return a + b; });
}
PAGED_MLX_INLINE Vec largest_of(const Vec (&v)[4]) {
  return across(v, [](Vec a, Vec b) __attribute__((always_inline)) { return max(a, b); });
}
PAGED_MLX_INLINE Vec size_of(Vec v) {
  return (Vec)_mm512_abs_ps((__m512)v);
}
// a / b, and 0 where b is not above `least`.
PAGED_MLX_INLINE Vec divide_above(float least, float a, Vec b) {
  const __mmask16 above = _mm512_cmp_ps_mask((__m512)b, _mm512_set1_ps(least), _CMP_GT_OQ);
  return (Vec)_mm512_maskz_div_ps(above, _mm512_set1_ps(a), (__m512)b);
}

// kBits codes of 64 channels are so many words.
constexpr int group_words(int bits) {
  return kGroup * bits / 32;
}

// Rows of q of one KV head as integers.
struct IntegerRows {
  int32_t* words;   // [row, group, word, kDigits]: four channels each, in the order of the codes
  float* scales;    // [row, group]
  float* sums;      // [row, group]: of q, or for a scale per channel [row]: of q times the minima
  uint32_t* lowest; // [row / kRowGroup, group], a bit a word of codes: those where the lowest digit
                    // of some row is not 0
};

// A group of 64 floats, each times `unit`, as integers. Returns a bit for each word whose lowest
// digit is not 0. Codes of 4 bits meet the even channels of a word and then the odd ones; few of
// their words can do without.
template <int kBits>
PAGED_MLX_INLINE uint32_t write_digits(const Vec (&q)[4], Vec unit, int32_t* to) {
  const __m512i order = _mm512_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
  // The bytes of value + 0x808080 are its digits plus 128. In each four lanes they come together.
  const __m512i offset = _mm512_set1_epi32(0x00808080);
  const __m512i bytes =
      _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  uint32_t lowest = 0;
  for (int i = 0; i < 4; i++) {
    __m512i v = _mm512_cvtps_epi32((__m512)(q[i] * unit));
    v = kBits == 4 ? _mm512_permutexvar_epi32(order, v) : v;
    v = _mm512_shuffle_epi8(_mm512_add_epi32(v, offset), bytes);
    v = _mm512_xor_si512(v, _mm512_set1_epi8(-128));
    _mm512_storeu_si512(to + i * 4 * kDigits, v);
    if constexpr (kBits == 8) {
      lowest |= _pext_u32(_mm512_test_epi32_mask(v, v), 0x1111) << 4 * i;
    }
  }
  return kBits == 8 ? lowest : (1u << group_words(4)) - 1;
}

// Rows [0, num_rows) of one KV head, four at a time. `channels`: scales and minima of a page, or
// null. Units are powers of 2, so that what has few bits has few digits.
template <int kBits>
void make_integer_rows(const TilePass& pass, const float* q, const float* channels,
                       const IntegerRows& to) {
  const int dim = pass.job.head_dim, groups = dim / kGroup;
  Vec odd = {}; // NaN where a scale is not finite
  for (int d = 0; channels && d < dim; d += kLanes) {
    odd = fma(load(channels + d), Vec{}, odd);
  }
  for (int first = 0; first < pass.num_rows; first += kRowGroup) {
    auto row = [&](int r) { return min_int(first + r, pass.num_rows - 1); };
    Vec minima[kRowGroup] = {odd, odd, odd, odd}, beyond = {};
    for (int g = 0; g < groups; g++) {
      Vec x[kRowGroup][4], most[kRowGroup] = {}, total[kRowGroup] = {};
      for (int r = 0; r < kRowGroup; r++) {
        for (int i = 0; i < 4; i++) {
          const int d = g * kGroup + i * kLanes;
          x[r][i] = load(q + int64_t(row(r)) * pass.q_stride + d);
          if (channels) {
            minima[r] = fma(x[r][i], load(channels + padded(dim) + d), minima[r]);
            x[r][i] = x[r][i] * load(channels + d);
          } else {
            total[r] += x[r][i];
          }
          most[r] = max(most[r], size_of(x[r][i]));
        }
      }
      alignas(64) float units[kLanes], sums[kLanes];
      const Vec largest = largest_of(most);
      beyond = fma(largest, Vec{}, beyond); // NaN where a product is beyond the largest float
      store(units, (Vec)((VecU)divide_above(0x1p-90f, float(0x7f7f7f), largest) & 0xff800000u));
      store(sums, sums_of(total));
      uint32_t lowest = 0;
      for (int r = 0; r < kRowGroup; r++) {
        const int at = row(r) * groups + g;
        lowest |= write_digits<kBits>(x[r], splat(units[r]), to.words + at * kQueryWords * kDigits);
        to.scales[at] = units[r] > 0.0f ? 1.0f / units[r] : 0.0f;
        to.sums[at] = sums[r];
      }
      to.lowest[first / kRowGroup * groups + g] = lowest;
    }
    const Vec sums = sums_of(minima) + beyond;
    for (int r = 0; channels && r < kRowGroup; r++) {
      to.sums[row(r) * groups] = sums[r];
    }
  }
}

// Four words of 16 keys, `stride` bytes from key to key, become four vectors whose lanes are the
// keys.
PAGED_MLX_INLINE void transpose_words(const uint8_t* codes, int64_t stride, __m512i* to) {
  // Keys i, i + 4, i + 8 and i + 12. Shuffles that cross quarters would wait for the ports that
  // multiply.
  auto four = [&](int i) __attribute__((always_inline)) {
    auto quarter = [&](int key) __attribute__((always_inline)) {
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + key * stride));
    };
    __m512i v = _mm512_castsi128_si512(quarter(i));
    v = _mm512_mask_broadcast_i32x4(v, 0x00f0, quarter(i + 4));
    v = _mm512_mask_broadcast_i32x4(v, 0x0f00, quarter(i + 8));
    return _mm512_mask_broadcast_i32x4(v, 0xf000, quarter(i + 12));
  };
  const __m512i a = four(0), b = four(1), c = four(2), d = four(3);
  const __m512i ab0 = _mm512_unpacklo_epi32(a, b), ab1 = _mm512_unpackhi_epi32(a, b);
  const __m512i cd0 = _mm512_unpacklo_epi32(c, d), cd1 = _mm512_unpackhi_epi32(c, d);
  to[0] = _mm512_unpacklo_epi64(ab0, cd0);
  to[1] = _mm512_unpackhi_epi64(ab0, cd0);
  to[2] = _mm512_unpacklo_epi64(ab1, cd1);
  to[3] = _mm512_unpackhi_epi64(ab1, cd1);
}

// Sums of the products of two blocks of 16 keys with one digit of kRows rows: members, for an
// array would live in memory.
template <int kRows>
struct DigitSums {
  __m512i a = _mm512_setzero_si512(), b = a;
  DigitSums<kRows - 1> rest;

  // `q`: a word of the first row.
  template <bool kBoth>
  PAGED_MLX_INLINE void add(const int32_t* q, int q_stride, __m512i of_a, __m512i of_b) {
    const __m512i digits = splat_word_at(q);
    add_fours(a, of_a, digits);
    if constexpr (kBoth) {
      add_fours(b, of_b, digits);
    }
    rest.template add<kBoth>(q + q_stride, q_stride, of_a, of_b);
  }
};
template <>
struct DigitSums<0> {
  template <bool kBoth>
  PAGED_MLX_INLINE void add(const int32_t*, int, __m512i, __m512i) {}
};

PAGED_MLX_INLINE Vec join_digits(__m512i digit0, __m512i digit1, __m512i digit2) {
  const __m512i low = _mm512_add_epi32(digit0, _mm512_slli_epi32(digit1, 8));
  return fma((Vec)_mm512_cvtepi32_ps(digit2), splat(65536.0f), (Vec)_mm512_cvtepi32_ps(low));
}
template <int kRows>
PAGED_MLX_INLINE void join_digits(const DigitSums<kRows>& digit0, const DigitSums<kRows>& digit1,
                                  const DigitSums<kRows>& digit2, Vec* a, Vec* b) {
  if constexpr (kRows > 0) {
    *a = join_digits(digit0.a, digit1.a, digit2.a);
    *b = join_digits(digit0.b, digit1.b, digit2.b);
    join_digits<kRows - 1>(digit0.rest, digit1.rest, digit2.rest, a + 1, b + 1);
  }
}

// The codes of a group of kBlocks blocks of 16 keys, at most two, in words whose lanes are the
// keys: four at a time, between the products of others.
template <int kBits, int kBlocks>
struct KeyWords {
  static constexpr int kCount = group_words(kBits);
  static constexpr int kParts = kBlocks * kCount / 4;
  __m512i words[kBlocks][kCount];

  PAGED_MLX_INLINE void load_part(int part, const uint8_t* codes, int64_t stride) {
    const int block = part * 4 / kCount, first = part * 4 % kCount;
    transpose_words(codes + block * kBlockKeys * stride + first * 4, stride, words[block] + first);
  }

  // Calls add(word of q, codes of two blocks that it meets).
  template <typename Add>
  PAGED_MLX_INLINE void each(int w, Add add) const {
    const __m512i a = words[0][w], b = words[kBlocks - 1][w];
    if constexpr (kBits == 8) {
      add(w, a, b);
    } else {
      const __m512i mask = _mm512_set1_epi32(0x0f0f0f0f);
      add(2 * w, _mm512_and_si512(a, mask), _mm512_and_si512(b, mask));
      add(2 * w + 1, _mm512_and_si512(_mm512_srli_epi32(a, 4), mask),
          _mm512_and_si512(_mm512_srli_epi32(b, 4), mask));
    }
  }
};

// Products of the keys of `words` with kRows rows, over one group. Meanwhile the words of
// `next_codes` are loaded, if there are any, and a line of `ahead` is prefetched for each word of
// codes: as many as the keys have in this group.
template <int kBits, int kRows, int kBlocks>
PAGED_MLX_INLINE void multiply_keys(const KeyWords<kBits, kBlocks>& keys, const int32_t* q,
                                    int q_stride, uint32_t lowest, const char* ahead,
                                    KeyWords<kBits, kBlocks>& next, const uint8_t* next_codes,
                                    int64_t stride, Vec (&dots)[2][kRows]) {
  using Keys = KeyWords<kBits, kBlocks>;
  constexpr int kStep = Keys::kCount / Keys::kParts;
  DigitSums<kRows> digit0, digit1, digit2;
#pragma GCC unroll 8
  for (int part = 0; part < Keys::kParts; part++) {
    if (next_codes) {
      next.load_part(part, next_codes, stride);
    }
#pragma GCC unroll 4
    for (int i = 0; i < kStep; i++) {
      const int w = part * kStep + i;
      for (int b = 0; b < kBlocks; b++) {
        prefetch_far(ahead + (w * kBlocks + b) * 64);
      }
      keys.each(w, [&](int word, __m512i a, __m512i b) __attribute__((always_inline)) {
        digit1.template add<kBlocks == 2>(q + word * kDigits + 1, q_stride, a, b);
        digit2.template add<kBlocks == 2>(q + word * kDigits + 2, q_stride, a, b);
      });
    }
  }
  for (; lowest; lowest &= lowest - 1) {
    keys.each(__builtin_ctz(lowest),
              [&](int word, __m512i a, __m512i b) __attribute__((always_inline)) {
                digit0.template add<kBlocks == 2>(q + word * kDigits, q_stride, a, b);
              });
  }
  join_digits<kRows>(digit0, digit1, digit2, dots[0], dots[1]);
}

// A side's scales and biases for the keys of a chunk, [group, kChunkKeys] each. False: some are
// not finite. A side with a scale per channel has none here.
struct ChunkScales {
  alignas(64) float scales[kMaxGroups * kChunkKeys];
  alignas(64) float biases[kMaxGroups * kChunkKeys];

  bool load_keys(const PageSide& side, int64_t row, int keys) {
    if (side.format == PageFormat::channel4) {
      return true;
    }
    const int groups = side.dim / kGroup;
    const auto* const s = static_cast<const uint16_t*>(side.scales) + row * groups;
    const auto* const b = static_cast<const uint16_t*>(side.biases) + row * groups;
    return side.dtype == DType::float16 ? load_as<Float16>(s, b, groups, keys)
                                        : load_as<BFloat16>(s, b, groups, keys);
  }

 private:
  // Elements in the low halves of words.
  static PAGED_MLX_INLINE Vec low_halves(Float16, __m512i words) {
    return (Vec)_mm512_cvtph_ps(_mm512_cvtepi32_epi16(words));
  }
  static PAGED_MLX_INLINE Vec low_halves(BFloat16, __m512i words) {
    return (Vec)_mm512_slli_epi32(words, 16);
  }

  template <typename X>
  bool load_as(const uint16_t* from_scales, const uint16_t* from_biases, int groups, int keys) {
    const Vec odd = load_part<X>(from_scales, groups, keys, scales) +
        load_part<X>(from_biases, groups, keys, biases);
    return sum(odd) == 0.0f;
  }

  // Returns zeros, or NaN where some are not finite.
  template <typename X>
  static PAGED_MLX_INLINE Vec load_part(const uint16_t* from, int groups, int keys, float* to) {
    Vec odd = {};
    auto put = [&](int g, int j, __m512i words) __attribute__((always_inline)) {
      const Vec v = low_halves(X{}, words);
      odd = fma(v, Vec{}, odd);
      store(to + g * kChunkKeys + j, v);
    };
    for (int j = 0; j < keys; j += kLanes) {
      if (groups == 2) {
        const __m512i both = _mm512_loadu_si512(from + 2 * j);
        put(0, j, both);
        put(1, j, _mm512_srli_epi32(both, 16));
        continue;
      }
      for (int g = 0; g < groups; g++) {
        VecI words;
        for (int i = 0; i < kLanes; i++) {
          words[i] = from[(j + i) * groups + g];
        }
        put(g, j, (__m512i)words);
      }
    }
    return odd;
  }
};

// A chunk of one KV head: where its codes are, and what is read from memory meanwhile.
struct Chunk {
  int position;                // of key 0
  int keys;                    // a multiple of 16
  const uint8_t *k, *v;        // codes of key 0
  const char *next_k, *next_v; // of the chunk that comes next
};

// Scales and biases of the keys from `row` on.
PAGED_MLX_INLINE void prefetch_scales(const PageSide& side, int64_t row, int keys) {
  const bool by_channel = side.format == PageFormat::channel4;
  const int groups = side.dim / kGroup;
  const int64_t at = by_channel ? row / side.page_size * side.dim : row * groups;
  const int bytes = (by_channel ? side.dim : keys * groups) * int(itemsize(side.dtype));
  for (int b = 0; b < bytes; b += 64) {
    prefetch_far(at_element(side.dtype, side.scales, at) + b);
    prefetch_far(at_element(side.dtype, side.biases, at) + b);
  }
}

// Scores of keys [begin, end) of a chunk, kBlocks blocks at a time, with kRows rows: [block, row,
// 16]. Returns zeros, or NaN where some are not finite.
template <int kBits, int kRows, int kBlocks>
PAGED_MLX_INLINE Vec score_keys(const TilePass& pass, const Chunk& chunk, const ChunkScales& scales,
                                const IntegerRows& rows, int first_row, int begin, int end,
                                float* scores) {
  using Keys = KeyWords<kBits, kBlocks>;
  constexpr int kStep = kBlocks * kBlockKeys;
  const int groups = pass.job.head_dim / kGroup;
  const int64_t stride = pass.job.head_dim * kBits / 8;
  const bool by_channel = pass.job.k->format == PageFormat::channel4;
  Vec odd = {};
  Keys words[2], *keys = &words[0], *next = &words[1];
  const uint8_t* codes = chunk.k + begin * stride;
  for (int part = 0; begin < end && part < Keys::kParts; part++) {
    keys->load_part(part, codes, stride);
  }
  for (int j = begin; j < end; j += kStep) {
    Vec total[kBlocks][kRows];
    for (int b = 0; b < kBlocks; b++) {
      for (int r = 0; r < kRows; r++) {
        total[b][r] = by_channel ? splat(rows.sums[(first_row + r) * groups]) : Vec{};
      }
    }
    for (int g = 0; g < groups; g++) {
      Vec dots[2][kRows];
      const int before = (j / kBlockKeys * groups + g * kBlocks) * group_words(kBits);
      codes = g + 1 < groups     ? codes + kGroup * kBits / 8
          : j + 2 * kStep <= end ? chunk.k + (j + kStep) * stride
                                 : nullptr;
      multiply_keys<kBits, kRows, kBlocks>(
          *keys, rows.words + (first_row * groups + g) * kQueryWords * kDigits,
          groups * kQueryWords * kDigits, rows.lowest[first_row / kRowGroup * groups + g],
          chunk.next_k + int64_t(before) * 64, *next, codes, stride, dots);
      Keys* const done = keys;
      keys = next;
      next = done;
      for (int b = 0; b < kBlocks; b++) {
        const int of_keys = g * kChunkKeys + j + b * kBlockKeys;
        for (int r = 0; r < kRows; r++) {
          const int at = (first_row + r) * groups + g;
          const Vec dot = dots[b][r] * splat(rows.scales[at]);
          if (by_channel) {
            total[b][r] += dot;
          } else {
            total[b][r] = fma(dot, load(scales.scales + of_keys), total[b][r]);
            total[b][r] = fma(splat(rows.sums[at]), load(scales.biases + of_keys), total[b][r]);
          }
        }
      }
    }
    for (int b = 0; b < kBlocks; b++) {
      for (int r = 0; r < kRows; r++) {
        store(scores + (j + b * kBlockKeys) * kRows + r * kBlockKeys, total[b][r]);
        odd = fma(total[b][r], Vec{}, odd);
      }
    }
  }
  return odd;
}

// Scores of a chunk with kRows rows, [block, row, 16], in score_unit. False: some are not finite.
template <int kBits, int kRows>
__attribute__((noinline)) bool score_chunk(const TilePass& pass, const Chunk& chunk,
                                           const ChunkScales& scales, const IntegerRows& rows,
                                           int first_row, float* scores) {
  const int whole = chunk.keys / (2 * kBlockKeys) * (2 * kBlockKeys);
  const Vec odd =
      score_keys<kBits, kRows, 2>(pass, chunk, scales, rows, first_row, 0, whole, scores) +
      score_keys<kBits, kRows, 1>(pass, chunk, scales, rows, first_row, whole, chunk.keys, scores);
  return sum(odd) == 0.0f;
}

// The weights of a chunk times the scales of a group of V, as pairs of integers in units of the
// row's own, and what the biases add.
template <int kRows>
struct IntegerWeights {
  alignas(64) int32_t pairs[kRows][kChunkKeys / 2];
  alignas(64) float units[kLanes], biases[kLanes]; // [row]

  // `weights`: [block, row, 16].
  PAGED_MLX_INLINE void make(const float* weights, const float* scales, const float* of_keys,
                             int keys) {
    Vec most[4] = {}, bias[4] = {};
    for (int j = 0; j < keys; j += kBlockKeys) {
      for (int r = 0; r < kRows; r++) {
        const Vec w = load(weights + j * kRows + r * kBlockKeys);
        most[r] = max(most[r], size_of(w * load(scales + j)));
        bias[r] = fma(w, load(of_keys + j), bias[r]);
      }
    }
    const Vec top = largest_of(most);
    alignas(64) float inverse[kLanes];
    store(inverse, divide_above(0x1p-100f, 32767.0f, top));
    store(units, top * splat(1.0f / 32767.0f));
    store(biases, sums_of(bias));
    for (int j = 0; j < keys; j += kBlockKeys) {
      for (int r = 0; r < kRows; r++) {
        const Vec w = load(weights + j * kRows + r * kBlockKeys) * load(scales + j);
        const __m512i whole = _mm512_cvtps_epi32((__m512)(w * splat(inverse[r])));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(pairs[r] + j / 2),
                            _mm512_cvtepi32_epi16(whole));
      }
    }
  }
};

// The codes of two keys, 64 channels, as pairs: four vectors, in an order that to_channels undoes.
template <int kBits>
PAGED_MLX_INLINE void pair_codes(const uint8_t* a, const uint8_t* b, __m512i (&pairs)[4]) {
  if constexpr (kBits == 8) {
    const __m512i x = _mm512_loadu_si512(a), y = _mm512_loadu_si512(b);
    const __m512i zero = _mm512_setzero_si512();
    const __m512i low = _mm512_unpacklo_epi8(x, y), high = _mm512_unpackhi_epi8(x, y);
    pairs[0] = _mm512_unpacklo_epi8(low, zero);
    pairs[1] = _mm512_unpackhi_epi8(low, zero);
    pairs[2] = _mm512_unpacklo_epi8(high, zero);
    pairs[3] = _mm512_unpackhi_epi8(high, zero);
  } else {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a));
    const __m256i y = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b));
    const __m512i low = _mm512_cvtepu8_epi16(_mm256_unpacklo_epi8(x, y));
    const __m512i high = _mm512_cvtepu8_epi16(_mm256_unpackhi_epi8(x, y));
    const __m512i mask = _mm512_set1_epi32(0x000f000f);
    pairs[0] = _mm512_and_si512(low, mask);
    pairs[1] = _mm512_and_si512(_mm512_srli_epi32(low, 4), mask);
    pairs[2] = _mm512_and_si512(high, mask);
    pairs[3] = _mm512_and_si512(_mm512_srli_epi32(high, 4), mask);
  }
}

// Sums in the order of pair_codes to the order of the channels.
template <int kBits>
PAGED_MLX_INLINE void to_channels(const __m512i (&from)[4], __m512i (&to)[4]) {
  if constexpr (kBits == 8) { // lane 128-bit L of vector k: channels 16 L + 4 k ...
    const __m512i a = _mm512_shuffle_i32x4(from[0], from[1], 0x44);
    const __m512i b = _mm512_shuffle_i32x4(from[0], from[1], 0xee);
    const __m512i c = _mm512_shuffle_i32x4(from[2], from[3], 0x44);
    const __m512i d = _mm512_shuffle_i32x4(from[2], from[3], 0xee);
    to[0] = _mm512_shuffle_i32x4(a, c, 0x88);
    to[1] = _mm512_shuffle_i32x4(a, c, 0xdd);
    to[2] = _mm512_shuffle_i32x4(b, d, 0x88);
    to[3] = _mm512_shuffle_i32x4(b, d, 0xdd);
  } else { // lane 8 L + i of vector 2 h + n: channel 2 (16 L + 8 h + i) + n
    const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    to[0] = _mm512_permutex2var_epi32(from[0], first, from[1]);
    to[1] = _mm512_permutex2var_epi32(from[2], first, from[3]);
    to[2] = _mm512_permutex2var_epi32(from[0], second, from[1]);
    to[3] = _mm512_permutex2var_epi32(from[2], second, from[3]);
  }
}

// Adds a chunk's weighted values to the accumulators of kRows rows.
template <int kBits, int kRows>
__attribute__((noinline)) void add_chunk(const TilePass& pass, const Chunk& chunk,
                                         const ChunkScales& scales, const float* weights,
                                         float* acc) {
  const int groups = pass.job.v_head_dim / kGroup;
  const int64_t stride = pass.job.v_head_dim * kBits / 8;
  for (int g = 0; g < groups; g++) {
    IntegerWeights<kRows> w;
    w.make(weights, scales.scales + g * kChunkKeys, scales.biases + g * kChunkKeys, chunk.keys);
    __m512i sums[kRows][4];
    for (int r = 0; r < kRows; r++) {
      for (int i = 0; i < 4; i++) {
        sums[r][i] = _mm512_setzero_si512();
      }
    }
    const uint8_t* codes = chunk.v + g * kGroup * kBits / 8;
    for (int j = 0; j < chunk.keys; j += 2, codes += 2 * stride) {
      for (int line = 0; line < kBits / 4; line++) {
        prefetch_far(chunk.next_v + ((g * chunk.keys + j) / 2 * (kBits / 4) + line) * 64);
      }
      __m512i of_keys[4];
      pair_codes<kBits>(codes, codes + stride, of_keys);
      for (int r = 0; r < kRows; r++) {
        const __m512i weight = splat_word_at(w.pairs[r] + j / 2);
        for (int i = 0; i < 4; i++) {
          add_twos(sums[r][i], of_keys[i], weight);
        }
      }
    }
    for (int r = 0; r < kRows; r++) {
      __m512i ordered[4];
      to_channels<kBits>(sums[r], ordered);
      for (int i = 0; i < 4; i++) {
        float* const at = acc + r * pass.acc_stride + g * kGroup + i * kLanes;
        const Vec value =
            fma((Vec)_mm512_cvtepi32_ps(ordered[i]), splat(w.units[r]), splat(w.biases[r]));
        store(at, load(at) + value);
      }
    }
  }
}

// kRows rows against a chunk that they all see. False: nothing has happened, for a score is not
// finite.
template <int kRows>
bool attend_chunk(const TilePass& pass, const Chunk& chunk, const ChunkScales& k_scales,
                  const ChunkScales& v_scales, const IntegerRows& q, const State& state,
                  int first_row, int kv_head) {
  const Job& job = pass.job;
  alignas(64) float scores[kChunkKeys * kRows];
  const bool finite = code_bits(job.k->format) == 8
      ? score_chunk<8, kRows>(pass, chunk, k_scales, q, first_row, scores)
      : score_chunk<4, kRows>(pass, chunk, k_scales, q, first_row, scores);
  if (!finite) {
    return false;
  }
  for (int j = 0; !job.plain && j < chunk.keys; j += kBlockKeys) {
    for (int r = 0; r < kRows; r++) {
      Row row = pass.rows[first_row + r];
      row.head += kv_head * job.gqa_factor;
      Block all{};
      all.position = chunk.position + j;
      all.high = kBlockKeys;
      finish_scores(pass, all, row, scores + j * kRows + r * kBlockKeys);
    }
  }
  float* const most = state.most + first_row;
  float* const sums = state.sums + first_row * kLanes;
  float* const acc = state.acc + int64_t(first_row) * pass.acc_stride;
  const float unit = exponent_unit(job);
  alignas(64) float top[kRows * kBlockKeys];
  memcpy(top, scores, sizeof(top));
  for (int i = kRows * kBlockKeys; i < chunk.keys * kRows; i += kLanes) {
    float* const at = top + i % (kRows * kBlockKeys);
    store(at, max(load(at), load(scores + i)));
  }
  raise_if_higher<kRows>(unit, top, most, sums, acc, pass.acc_stride);
  for (int j = 0; j < chunk.keys; j += kBlockKeys) {
    weigh<kRows>(unit, scores + j * kRows, most, sums, [](int) {});
  }
  if (code_bits(job.v->format) == 8) {
    add_chunk<8, kRows>(pass, chunk, v_scales, scores, acc);
  } else {
    add_chunk<4, kRows>(pass, chunk, v_scales, scores, acc);
  }
  return true;
}

bool attend_chunk_rows(int rows, const TilePass& pass, const Chunk& chunk,
                       const ChunkScales& k_scales, const ChunkScales& v_scales,
                       const IntegerRows& q, const State& state, int first_row, int kv_head) {
  switch (rows) {
    case 1:
      return attend_chunk<1>(pass, chunk, k_scales, v_scales, q, state, first_row, kv_head);
    case 2:
      return attend_chunk<2>(pass, chunk, k_scales, v_scales, q, state, first_row, kv_head);
    case 3:
      return attend_chunk<3>(pass, chunk, k_scales, v_scales, q, state, first_row, kv_head);
    default:
      return attend_chunk<4>(pass, chunk, k_scales, v_scales, q, state, first_row, kv_head);
  }
}

// Whether chunks of this call are attended in integers.
bool takes_integers(const Job& job) {
  return job.multiplies_codes && job.dtype != DType::float32 &&
      job.k->format != PageFormat::dense && job.v->format != PageFormat::dense &&
      job.head_dim % kGroup == 0 && job.v_head_dim % kGroup == 0 &&
      job.page_size % kBlockKeys == 0 && !job.mask;
}

// What the passes over an item's chunks keep: rows of q as integers.
struct IntegerState {
  IntegerRows* heads; // of each KV head; with a scale per channel of K, one that is made anew
  int64_t made;       // row of the page and head that it was made for

  IntegerState(const TilePass& pass, const State* states, Scratch& scratch) : made(-1) {
    const Job& job = pass.job;
    const size_t groups = job.head_dim / kGroup;
    const int count = by_channel(job) ? 1 : job.num_kv_heads;
    heads = scratch.take<IntegerRows>(count);
    for (int h = 0; h < count; h++) {
      heads[h].words = scratch.take<int32_t>(pass.num_rows * groups * kQueryWords * kDigits);
      heads[h].scales = scratch.take<float>(pass.num_rows * groups);
      heads[h].sums = scratch.take<float>(pass.num_rows * groups);
      heads[h].lowest = scratch.take<uint32_t>(pass.num_rows * groups);
      if (!by_channel(job)) {
        make_integer_rows<8>(pass, static_cast<const float*>(states[h].q), nullptr, heads[h]);
      }
    }
  }

  static bool by_channel(const Job& job) {
    return job.k->format == PageFormat::channel4;
  }

  // For a chunk whose first key stands in row `row`.
  const IntegerRows& rows(const TilePass& pass, const State& state, RowReader& k, int head,
                          int64_t row) {
    if (!by_channel(pass.job)) {
      return heads[head];
    }
    const int64_t page = row / pass.job.page_size;
    if (made != page) {
      made = page;
      make_integer_rows<4>(pass, static_cast<const float*>(state.q), k.channels(page), heads[0]);
    }
    return heads[0];
  }
};

size_t integer_scratch_bytes(const Job& job, int rows) {
  const size_t groups = job.head_dim / kGroup + 1;
  return job.num_kv_heads * (rows * groups * (kQueryWords * kDigits + 3) * sizeof(float) + 4 * 64);
}

} // namespace
} // namespace paged_mlx::cpu
#else

namespace paged_mlx::cpu {
namespace {

size_t integer_scratch_bytes(const Job&, int) {
  return 0;
}

} // namespace
} // namespace paged_mlx::cpu
#endif
