// Decode attention over pages of codes, in integers: for 16-bit dtypes, on machines with
// AVX512-VNNI.
//
// Codes are small integers already. A row of q becomes integers of 24 bits, in three digits, and
// the weights of a chunk of keys integers of 16 bits, by a scale of their own for each group of 64
// channels; products of integers add up exactly, and scales and biases meet the sums, never an
// element.
//   Scores: lanes are keys. The codes of 16 keys are transposed in words of 32 bits.
//   Values: lanes are channels. Two keys are multiplied at a time.
// A chunk is up to 64 keys of one page that every row of the group sees. What is not finite, or
// hidden from some row, is left to the floats (CodedPass in attend_tile.h).
#pragma once

#include "cpu/tile_block.h"

#if defined(__AVX512VNNI__) && !defined(PAGED_MLX_EMULATED_LANES)
#define PAGED_MLX_TILE_INTEGERS 1

namespace paged_mlx::cpu {
namespace {

constexpr int kChunkKeys = 64;
constexpr int kChunkBlocks = kChunkKeys / kBlockKeys;
constexpr int kGroup = 64; // channels
constexpr int kMaxGroups = kMaxHeadDim / kGroup;

constexpr int kDigits = 3;      // of a value of q, in base 256
constexpr int kDigitWords = 16; // of a group of 64

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

// kBits codes of 64 channels are so many words.
constexpr int group_words(int bits) {
  return kGroup * bits / 32;
}

// Rows of q of one KV head as integers.
struct IntegerRows {
  int32_t* words; // [row, group, digit, 16]: four channels each, in the order of the codes
  float* scales;  // [row, group]
  float* sums;    // [row, group]: of q, or for a scale per channel [row]: of q times the minima
};

// A group of 64 floats as integers, digit by digit; its scale. Codes of 4 bits meet the even
// channels of a word and then the odd ones.
template <int kBits>
PAGED_MLX_INLINE float integer_group(const Vec (&q)[4], int32_t* to) {
  const __m512 most =
      _mm512_max_ps(_mm512_max_ps(_mm512_abs_ps((__m512)q[0]), _mm512_abs_ps((__m512)q[1])),
                    _mm512_max_ps(_mm512_abs_ps((__m512)q[2]), _mm512_abs_ps((__m512)q[3])));
  const float top = _mm512_reduce_max_ps(most), largest = 127.0f * 65536.0f;
  const bool tiny = !(top > 0x1p-90f);
  const Vec unit = splat(tiny ? 0.0f : largest / top);
  const __m512i order = _mm512_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
  // The bytes of value + 0x808080 are its digits plus 128. In each four lanes they come together.
  const __m512i offset = _mm512_set1_epi32(0x00808080);
  const __m512i bytes =
      _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  __m512i v[4];
  for (int i = 0; i < 4; i++) {
    v[i] = _mm512_cvtps_epi32((__m512)(q[i] * unit));
    v[i] = kBits == 4 ? _mm512_permutexvar_epi32(order, v[i]) : v[i];
    v[i] = _mm512_shuffle_epi8(_mm512_add_epi32(v[i], offset), bytes);
  }
  const __m512i first = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
  for (int digit = 0; digit < kDigits; digit++) {
    const __m512i of_lane = _mm512_add_epi32(first, _mm512_set1_epi32(digit));
    const __m512i low = _mm512_permutex2var_epi32(v[0], of_lane, v[1]);
    const __m512i high = _mm512_permutex2var_epi32(v[2], of_lane, v[3]);
    const __m512i all = _mm512_mask_blend_epi32(0xff00, low, high);
    _mm512_storeu_si512(to + digit * kDigitWords, _mm512_xor_si512(all, _mm512_set1_epi8(-128)));
  }
  return tiny ? 0.0f : top / largest;
}

// Rows [0, num_rows) of one KV head. `channels`: scales and minima of a page, or null.
template <int kBits>
void make_integer_rows(const TilePass& pass, const float* q, const float* channels,
                       const IntegerRows& to) {
  const int dim = pass.job.head_dim, groups = dim / kGroup;
  for (int r = 0; r < pass.num_rows; r++) {
    Vec minima = {};
    for (int g = 0; g < groups; g++) {
      Vec x[4], total = {};
      for (int i = 0; i < 4; i++) {
        const int d = g * kGroup + i * kLanes;
        x[i] = load(q + int64_t(r) * pass.q_stride + d);
        total += x[i];
        if (channels) {
          minima = fma(x[i], load(channels + padded(dim) + d), minima);
          x[i] = x[i] * load(channels + d);
          minima = fma(x[i], Vec{}, minima); // NaN where a scale is
        }
      }
      to.scales[r * groups + g] =
          integer_group<kBits>(x, to.words + (r * groups + g) * kDigits * kDigitWords);
      to.sums[r * groups + g] = channels ? 0.0f : sum(total);
    }
    if (channels) {
      to.sums[r * groups] = sum(minima);
    }
  }
}

// Eight words of 16 keys, `stride` bytes from key to key, become eight vectors whose lanes are
// the keys.
PAGED_MLX_INLINE void transpose_words(const uint8_t* codes, int64_t stride, __m512i* to) {
  auto two = [&](int key) __attribute__((always_inline)) {
    const auto* const low = reinterpret_cast<const __m256i*>(codes + key * stride);
    const auto* const high = reinterpret_cast<const __m256i*>(codes + (key + 4) * stride);
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256(low)),
                              _mm256_loadu_si256(high), 1);
  };
  __m512i half[2][4];
  for (int h = 0; h < 2; h++) {
    const __m512i a = two(8 * h), b = two(8 * h + 1), c = two(8 * h + 2), d = two(8 * h + 3);
    const __m512i ab0 = _mm512_unpacklo_epi32(a, b), ab1 = _mm512_unpackhi_epi32(a, b);
    const __m512i cd0 = _mm512_unpacklo_epi32(c, d), cd1 = _mm512_unpackhi_epi32(c, d);
    half[h][0] = _mm512_unpacklo_epi64(ab0, cd0);
    half[h][1] = _mm512_unpackhi_epi64(ab0, cd0);
    half[h][2] = _mm512_unpacklo_epi64(ab1, cd1);
    half[h][3] = _mm512_unpackhi_epi64(ab1, cd1);
  }
  for (int i = 0; i < 4; i++) {
    to[i] = _mm512_shuffle_i32x4(half[0][i], half[1][i], 0x88);
    to[i + 4] = _mm512_shuffle_i32x4(half[0][i], half[1][i], 0xdd);
  }
}

// Sums of the products of two blocks of 16 keys with kRows rows, by digit: members, for an array
// would live in memory.
template <int kRows>
struct DigitSums {
  __m512i a0 = _mm512_setzero_si512(), a1 = a0, a2 = a0, b0 = a0, b1 = a0, b2 = a0;
  DigitSums<kRows - 1> rest;

  // `q`: a word of the first row's first digit.
  template <bool kBoth>
  PAGED_MLX_INLINE void add(const int32_t* q, int q_stride, __m512i a, __m512i b) {
    const __m512i q0 = splat_word_at(q), q1 = splat_word_at(q + kDigitWords);
    const __m512i q2 = splat_word_at(q + 2 * kDigitWords);
    add_fours(a0, a, q0);
    add_fours(a1, a, q1);
    add_fours(a2, a, q2);
    if constexpr (kBoth) {
      add_fours(b0, b, q0);
      add_fours(b1, b, q1);
      add_fours(b2, b, q2);
    }
    rest.template add<kBoth>(q + q_stride, q_stride, a, b);
  }

  PAGED_MLX_INLINE void finish(Vec* a, Vec* b) const {
    *a = whole(a0, a1, a2);
    *b = whole(b0, b1, b2);
    rest.finish(a + 1, b + 1);
  }

 private:
  static PAGED_MLX_INLINE Vec whole(__m512i digit0, __m512i digit1, __m512i digit2) {
    const __m512i low = _mm512_add_epi32(digit0, _mm512_slli_epi32(digit1, 8));
    return fma((Vec)_mm512_cvtepi32_ps(digit2), splat(65536.0f), (Vec)_mm512_cvtepi32_ps(low));
  }
};
template <>
struct DigitSums<0> {
  template <bool kBoth>
  PAGED_MLX_INLINE void add(const int32_t*, int, __m512i, __m512i) {}
  PAGED_MLX_INLINE void finish(Vec*, Vec*) const {}
};

// Products of kBlocks blocks of 16 keys, at most two, with kRows rows, over one group. A line of
// `ahead` is prefetched for each word of codes: as many as the keys have in this group.
template <int kBits, int kRows, int kBlocks>
PAGED_MLX_INLINE void multiply_keys(const uint8_t* codes, int64_t stride, const int32_t* q,
                                    int q_stride, const char* ahead, Vec (&dots)[2][kRows]) {
  constexpr int kWords = group_words(kBits);
  const __m512i mask = _mm512_set1_epi32(0x0f0f0f0f);
  __m512i words[kBlocks][kWords];
  for (int b = 0; b < kBlocks; b++) {
    for (int first = 0; first < kWords; first += 8) {
      transpose_words(codes + b * kBlockKeys * stride + first * 4, stride, words[b] + first);
    }
  }
  DigitSums<kRows> sums;
  for (int w = 0; w < kWords; w++) {
    for (int b = 0; b < kBlocks; b++) {
      prefetch_far(ahead + (w * kBlocks + b) * 64);
    }
    const __m512i a = words[0][w], b = words[kBlocks - 1][w];
    if constexpr (kBits == 8) {
      sums.template add<kBlocks == 2>(q + w, q_stride, a, b);
    } else {
      sums.template add<kBlocks == 2>(q + 2 * w, q_stride, _mm512_and_si512(a, mask),
                                      _mm512_and_si512(b, mask));
      sums.template add<kBlocks == 2>(q + 2 * w + 1, q_stride,
                                      _mm512_and_si512(_mm512_srli_epi32(a, 4), mask),
                                      _mm512_and_si512(_mm512_srli_epi32(b, 4), mask));
    }
  }
  sums.finish(dots[0], dots[1]);
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
    return load_part(side.dtype, side.scales, side.dim, row, keys, scales) &&
        load_part(side.dtype, side.biases, side.dim, row, keys, biases);
  }

 private:
  static bool load_part(DType dtype, const void* data, int dim, int64_t row, int keys, float* to) {
    const int groups = dim / kGroup, count = keys * groups;
    alignas(64) float values[kMaxGroups * kChunkKeys];
    widen(dtype, at_element(dtype, data, row * groups), count, values);
    Vec odd = {};
    for (int i = 0; i < count; i += kLanes) {
      odd += load(values + i) * Vec{};
    }
    if (groups == 1) {
      memcpy(to, values, count * sizeof(float));
    } else if (groups == 2) {
      const __m512i even =
          _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
      const __m512i other = _mm512_add_epi32(even, _mm512_set1_epi32(1));
      for (int j = 0; j < keys; j += kLanes) {
        const __m512 a = (__m512)load(values + 2 * j), b = (__m512)load(values + 2 * j + kLanes);
        store(to + j, (Vec)_mm512_permutex2var_ps(a, even, b));
        store(to + kChunkKeys + j, (Vec)_mm512_permutex2var_ps(a, other, b));
      }
    } else {
      for (int i = 0; i < count; i++) {
        to[i % groups * kChunkKeys + i / groups] = values[i];
      }
    }
    return sum(odd) == 0.0f;
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

// Scores of kBlocks blocks of a chunk, from key j on, with kRows rows: [block, row, 16].
template <int kBits, int kRows, int kBlocks>
PAGED_MLX_INLINE void score_blocks(const TilePass& pass, const Chunk& chunk,
                                   const ChunkScales& scales, const IntegerRows& rows,
                                   int first_row, int j, float* scores) {
  const int groups = pass.job.head_dim / kGroup;
  const int64_t stride = pass.job.head_dim * kBits / 8;
  const bool by_channel = pass.job.k->format == PageFormat::channel4;
  Vec total[kBlocks][kRows];
  for (int b = 0; b < kBlocks; b++) {
    for (int r = 0; r < kRows; r++) {
      total[b][r] = by_channel ? splat(rows.sums[(first_row + r) * groups]) : Vec{};
    }
  }
  for (int g = 0; g < groups; g++) {
    Vec dots[2][kRows];
    const int words = (j / kBlockKeys * groups + g * kBlocks) * group_words(kBits);
    multiply_keys<kBits, kRows, kBlocks>(
        chunk.k + j * stride + g * kGroup * kBits / 8, stride,
        rows.words + (first_row * groups + g) * kDigits * kDigitWords,
        groups * kDigits * kDigitWords, chunk.next_k + int64_t(words) * 64, dots);
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
    }
  }
}

// Scores of a chunk with kRows rows, [block, row, 16], in score_unit.
template <int kBits, int kRows>
__attribute__((noinline)) void score_chunk(const TilePass& pass, const Chunk& chunk,
                                           const ChunkScales& scales, const IntegerRows& rows,
                                           int first_row, float* scores) {
  int j = 0;
  for (; j + 2 * kBlockKeys <= chunk.keys; j += 2 * kBlockKeys) {
    score_blocks<kBits, kRows, 2>(pass, chunk, scales, rows, first_row, j, scores);
  }
  if (j < chunk.keys) {
    score_blocks<kBits, kRows, 1>(pass, chunk, scales, rows, first_row, j, scores);
  }
}

// Weights of a chunk times the scales of a group of V, as pairs of integers. Returns their scale.
PAGED_MLX_INLINE float integer_weights(const float* weights, int row_stride, const float* scales,
                                       int keys, int32_t* to) {
  Vec w[kChunkBlocks], most = {};
  for (int b = 0; b < keys / kBlockKeys; b++) {
    w[b] = load(weights + b * row_stride) * load(scales + b * kBlockKeys);
    most = (Vec)_mm512_max_ps((__m512)most, _mm512_abs_ps((__m512)w[b]));
  }
  const float top = _mm512_reduce_max_ps((__m512)most);
  const Vec unit = splat(top > 0x1p-100f ? 32767.0f / top : 0.0f);
  for (int b = 0; b < keys / kBlockKeys; b++) {
    const __m512i whole = _mm512_cvtps_epi32((__m512)(w[b] * unit));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + b * kBlockKeys / 2),
                        _mm512_cvtepi32_epi16(whole));
  }
  return top > 0x1p-100f ? top * (1.0f / 32767.0f) : 0.0f;
}

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
    alignas(64) int32_t pairs[kRows][kChunkKeys / 2];
    float units[kRows], biases[kRows];
    for (int r = 0; r < kRows; r++) {
      const float* const of_row = weights + r * kBlockKeys;
      units[r] = integer_weights(of_row, kRows * kBlockKeys, scales.scales + g * kChunkKeys,
                                 chunk.keys, pairs[r]);
      Vec bias = {};
      for (int j = 0; j < chunk.keys; j += kBlockKeys) {
        bias = fma(load(of_row + j * kRows), load(scales.biases + g * kChunkKeys + j), bias);
      }
      biases[r] = sum(bias);
    }
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
        const __m512i weight = splat_word_at(pairs[r] + j / 2);
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
            fma((Vec)_mm512_cvtepi32_ps(ordered[i]), splat(units[r]), splat(biases[r]));
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
  if (code_bits(job.k->format) == 8) {
    score_chunk<8, kRows>(pass, chunk, k_scales, q, first_row, scores);
  } else {
    score_chunk<4, kRows>(pass, chunk, k_scales, q, first_row, scores);
  }
  Vec odd = {};
  for (int i = 0; i < chunk.keys * kRows; i += kLanes) {
    odd += load(scores + i) * Vec{};
  }
  if (!(sum(odd) == 0.0f)) {
    return false;
  }
  float* const most = state.most + first_row;
  float* const sums = state.sums + first_row * kLanes;
  float* const acc = state.acc + int64_t(first_row) * pass.acc_stride;
  const float unit = exponent_unit(job);
  for (int j = 0; j < chunk.keys; j += kBlockKeys) {
    float* const block = scores + j * kRows;
    for (int r = 0; !job.plain && r < kRows; r++) {
      Row row = pass.rows[first_row + r];
      row.head += kv_head * job.gqa_factor;
      Block all{};
      all.position = chunk.position + j;
      all.high = kBlockKeys;
      finish_scores(pass, all, row, block + r * kBlockKeys);
    }
    bool higher = false;
    for (int r = 0; r < kRows; r++) {
      higher |= any_greater(load(block + r * kBlockKeys), splat(most[r]));
    }
    if (higher) {
      raise_maxima(unit, kRows, block, most, sums, acc, pass.acc_stride);
    }
  }
  for (int j = 0; j < chunk.keys; j += kBlockKeys) {
    soften<kRows>(unit, scores + j * kRows, most, sums, acc, pass.acc_stride, [](int) {});
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
  return job.dtype != DType::float32 && job.k->format != PageFormat::dense &&
      job.v->format != PageFormat::dense && job.head_dim % kGroup == 0 &&
      job.v_head_dim % kGroup == 0 && job.page_size % kBlockKeys == 0 && !job.mask;
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
      heads[h].words = scratch.take<int32_t>(pass.num_rows * groups * kDigits * kDigitWords);
      heads[h].scales = scratch.take<float>(pass.num_rows * groups);
      heads[h].sums = scratch.take<float>(pass.num_rows * groups);
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
  return job.num_kv_heads * (rows * groups * (kDigits * kDigitWords + 2) * sizeof(float) + 4 * 64);
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
