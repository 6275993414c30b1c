// Rows of pages of any format: read as floats, and written from floats, in memory order. What
// mx.quantize gives for a row of tokens is what is written, bit for bit.
#pragma once

#include "cpu/job.h"
#include "cpu/simd.h"

namespace paged_mlx::cpu {
namespace {

// Whether the bodies of an element type attend pages of codes too, those of calls of any dtype.
template <typename X>
constexpr bool kAttendsCodes = false;
template <>
constexpr bool kAttendsCodes<Float32> = true;

// Zeros behind n elements, up to padded(n).
PAGED_MLX_INLINE void pad(float* row, int n) {
  memset(row + n, 0, (padded(n) - n) * sizeof(float));
}

PAGED_MLX_INLINE float half_to_float(uint16_t half) {
  const uint32_t size = half & 0x7fffu;
  const uint32_t special = size >= 0x7c00u ? 0x7f800000u : 0u;
  const uint32_t moved = size << 13;
  float scaled;
  memcpy(&scaled, &moved, sizeof(scaled));
  scaled *= 0x1p112f;
  uint32_t bits;
  memcpy(&bits, &scaled, sizeof(bits));
  bits |= special | (uint32_t(half & 0x8000u) << 16);
  memcpy(&scaled, &bits, sizeof(scaled));
  return scaled;
}

PAGED_MLX_INLINE float bfloat_to_float(uint16_t half) {
  const uint32_t bits = uint32_t(half) << 16;
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

PAGED_MLX_INLINE float element(DType dtype, const void* data, int64_t i) {
  if (dtype == DType::float32) {
    return static_cast<const float*>(data)[i];
  }
  const uint16_t half = static_cast<const uint16_t*>(data)[i];
  return dtype == DType::float16 ? half_to_float(half) : bfloat_to_float(half);
}

PAGED_MLX_INLINE int64_t itemsize(DType dtype) {
  return dtype == DType::float32 ? 4 : 2;
}

PAGED_MLX_INLINE char* at_element(DType dtype, void* data, int64_t i) {
  return static_cast<char*>(data) + i * itemsize(dtype);
}
PAGED_MLX_INLINE const char* at_element(DType dtype, const void* data, int64_t i) {
  return static_cast<const char*>(data) + i * itemsize(dtype);
}

// n elements in memory order; a vector pair of bfloat16 is in lane order, see simd.h.
template <typename X>
void to_memory_order(const float* from, int n, float* to) {
  memcpy(to, from, n * sizeof(float));
}
template <>
void to_memory_order<BFloat16>(const float* from, int n, float* to) {
  for (int d = 0; d < n; d++) {
    to[d] = from[d / kPair * kPair + (d % kPair) / 2 + d % 2 * kLanes];
  }
}
// `to` is padded with zeros.
template <typename X>
void to_lane_order(const float* from, int n, float* to) {
  memcpy(to, from, n * sizeof(float));
  pad(to, n);
}
template <>
void to_lane_order<BFloat16>(const float* from, int n, float* to) {
  for (int d = 0; d < padded(n); d++) {
    const int source = d / kPair * kPair + d % kPair % kLanes * 2 + d % kPair / kLanes;
    to[d] = source < n ? from[source] : 0.0f;
  }
}

template <typename X>
void widen(const void* from, int n, float* to) {
  alignas(64) float lanes[padded(kMaxHeadDim)];
  widen_row<X>(static_cast<const typename X::T*>(from), n, lanes);
  to_memory_order<X>(lanes, n, to);
}
template <>
void widen<Float32>(const void* from, int n, float* to) {
  memcpy(to, from, n * sizeof(float));
}
template <>
void widen<BFloat16>(const void* from, int n, float* to) {
  for (int d = 0; d < n; d++) {
    to[d] = bfloat_to_float(static_cast<const uint16_t*>(from)[d]);
  }
}

void widen(DType dtype, const void* from, int n, float* to) {
  switch (dtype) {
    case DType::float32:
      return widen<Float32>(from, n, to);
    case DType::float16:
      return widen<Float16>(from, n, to);
    default:
      return widen<BFloat16>(from, n, to);
  }
}

template <typename X>
void narrow(const float* from, int n, void* to) {
  alignas(64) float lanes[padded(kMaxHeadDim)];
  to_lane_order<X>(from, n, lanes);
  auto* const out = static_cast<typename X::T*>(to);
  for (int d = 0; d < n; d += kPair) {
    const Pair v = {load(lanes + d), load(lanes + d + kLanes)};
    if (d + kPair <= n) {
      X::store2(out + d, v);
    } else {
      store2_part<X>(out + d, n - d, v);
    }
  }
}

void narrow(DType dtype, const float* from, int n, void* to) {
  switch (dtype) {
    case DType::float32:
      memcpy(to, from, n * sizeof(float));
      return;
    case DType::float16:
      return narrow<Float16>(from, n, to);
    default:
      return narrow<BFloat16>(from, n, to);
  }
}

// The Walsh-Hadamard transform of each `size` of n elements, which is its own inverse. Sizes are
// multiples of 4.
void rotate(float* row, int n, int size) {
  const Vec4 odd = {1, -1, 1, -1}, high = {1, 1, -1, -1};
  for (int i = 0; i < n; i += 4) { // pairs one apart, then two apart
    Vec4 x = load4(row + i);
    x = x * odd + __builtin_shufflevector(x, x, 1, 0, 3, 2);
    store4(row + i, x * high + __builtin_shufflevector(x, x, 2, 3, 0, 1));
  }
  for (int h = 4; h < size; h *= 2) {
    for (int i = 0; i < n; i += 2 * h) {
      for (int j = i; j < i + h; j += 4) {
        const Vec4 a = load4(row + j), b = load4(row + j + h);
        store4(row + j, a + b);
        store4(row + j + h, a - b);
      }
    }
  }
  const float scale = float(1.0 / __builtin_sqrt(double(size)));
  for (int i = 0; i < n; i++) {
    row[i] *= scale;
  }
}

// kLanes codes of kBits bits as floats.
template <int kBits>
PAGED_MLX_INLINE Vec load_codes(const uint8_t* p) {
  VecI codes;
  if constexpr (kBits == 8) {
#if defined(__AVX512F__) && !defined(PAGED_MLX_EMULATED_LANES)
    codes = (VecI)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__AVX2__) && !defined(PAGED_MLX_EMULATED_LANES)
    codes = (VecI)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
    for (int i = 0; i < kLanes; i++) {
      codes[i] = p[i];
    }
#endif
  } else {
    VecU words, shifts;
    for (int i = 0; i < kLanes; i++) {
      shifts[i] = 4 * (i % 8);
    }
    uint32_t word[2] = {};
    memcpy(word, p, kLanes / 2);
#if defined(__AVX512F__) && !defined(PAGED_MLX_EMULATED_LANES)
    words = (VecU)_mm512_mask_set1_epi32(_mm512_set1_epi32(word[0]), 0xff00, word[1]);
#else
    words = word[0] - VecU{};
    for (int i = 8; i < kLanes; i++) {
      words[i] = word[1];
    }
#endif
    codes = (VecI)((words >> shifts) & 15u);
  }
  return __builtin_convertvector(codes, Vec);
}

PAGED_MLX_INLINE float code_at(int bits, const uint8_t* codes, int i) {
  return bits == 8 ? codes[i] : (codes[i / 2] >> 4 * (i % 2)) & 15;
}

// `count` codes times `scale`, plus `bias`.
template <int kBits>
PAGED_MLX_INLINE void decode_group(const uint8_t* codes, int count, float scale, float bias,
                                   float* to) {
  for (int d = 0; d < count; d += kLanes) { // groups are multiples of 32
    store(to + d, fma(load_codes<kBits>(codes + d * kBits / 8), splat(scale), splat(bias)));
  }
}

// Rows of one side in rising order of tokens, as floats.
class RowReader {
 public:
  explicit RowReader(const PageSide* side) : side_(side) {}

  void read(int64_t row, float* to) {
    const int dim = side_->dim, bits = code_bits(side_->format);
    const auto* const codes = static_cast<const uint8_t*>(side_->pages) + row * dim * bits / 8;
    switch (side_->format) {
      case PageFormat::dense:
        return widen(side_->dtype, at_element(side_->dtype, side_->pages, row * dim), dim, to);
      case PageFormat::channel4:
        return read_channels(codes, row / side_->page_size, to);
      default:
        break;
    }
    const int group = group_size(dim);
    for (int g = 0; g < dim / group; g++) {
      const int64_t at = row * (dim / group) + g;
      const float scale = element(side_->dtype, side_->scales, at);
      const float bias = element(side_->dtype, side_->biases, at);
      if (bits == 8) {
        decode_group<8>(codes + g * group, group, scale, bias, to + g * group);
      } else {
        decode_group<4>(codes + g * group / 2, group, scale, bias, to + g * group);
      }
    }
  }

  // The scales of a page's channels, and behind padded(dim) floats their biases.
  const float* channels(int64_t page) {
    if (page != page_) {
      const int64_t at = page * side_->dim;
      widen(side_->dtype, at_element(side_->dtype, side_->scales, at), side_->dim, channels_);
      widen(side_->dtype, at_element(side_->dtype, side_->biases, at), side_->dim,
            channels_ + padded(side_->dim));
      page_ = page;
    }
    return channels_;
  }

 private:
  void read_channels(const uint8_t* codes, int64_t page, float* to) {
    const float* const scales = channels(page);
    const float* const biases = scales + padded(side_->dim);
    int d = 0;
    for (; d + kLanes <= side_->dim; d += kLanes) {
      store(to + d, fma(load_codes<4>(codes + d / 2), load(scales + d), load(biases + d)));
    }
    for (; d < side_->dim; d++) {
      to[d] = code_at(4, codes, d) * scales[d] + biases[d];
    }
  }

  const PageSide* side_;
  int64_t page_ = -1;
  alignas(64) float channels_[2 * padded(kMaxHeadDim)];
};

// The codes, scale and bias of a group, by MLX's formula. A value that is not finite makes the
// scale NaN.
void encode_group(const float* from, int count, int bits, uint8_t* codes, float& scale,
                  float& bias) {
  const float bins = float((1 << bits) - 1);
  float low = __builtin_inff(), high = -low, odd = 0.0f;
  for (int i = 0; i < count; i++) {
    odd += from[i] * 0.0f; // NaN where a value is not finite
    high = high < from[i] ? from[i] : high;
    low = from[i] < low ? from[i] : low;
  }
  const bool from_low = __builtin_fabsf(low) > __builtin_fabsf(high);
  const float step = (high - low) / bins;
  scale = step < 1e-7f ? 1e-7f : step;
  scale = from_low ? scale : -scale;
  const float edge = from_low ? low : high;
  const float at_edge = __builtin_rintf(edge / scale);
  bias = 0.0f;
  if (at_edge != 0) {
    scale = edge / at_edge;
    bias = edge;
  }
  uint8_t values[64];
  for (int i = 0; i < count; i++) {
    const float code = __builtin_rintf((from[i] - bias) / scale);
    values[i] = !(code > 0.0f) ? 0 : code > bins ? uint8_t(bins) : uint8_t(code);
  }
  scale += odd;
  for (int i = 0; i < count * bits / 8; i++) {
    codes[i] = bits == 8 ? values[i] : values[2 * i] | values[2 * i + 1] << 4;
  }
}

// A row of a token; `from` has the dtype of the side.
void write_row(const PageSide& side, int64_t row, const void* from) {
  const int dim = side.dim;
  if (side.format == PageFormat::dense && !side.rotated) {
    memcpy(at_element(side.dtype, side.pages, row * dim), from, dim * itemsize(side.dtype));
    return;
  }
  alignas(64) float values[padded(kMaxHeadDim)];
  widen(side.dtype, from, dim, values);
  if (side.rotated) {
    uint32_t rounded[kMaxHeadDim];
    rotate(values, dim, rotation_size(dim));
    narrow(side.dtype, values, dim, rounded);
    if (side.format == PageFormat::dense) {
      memcpy(at_element(side.dtype, side.pages, row * dim), rounded, dim * itemsize(side.dtype));
      return;
    }
    widen(side.dtype, rounded, dim, values);
  }
  const int group = group_size(dim), groups = dim / group, bits = code_bits(side.format);
  auto* const codes = static_cast<uint8_t*>(side.pages) + row * dim * bits / 8;
  float scales[kMaxHeadDim / 32], biases[kMaxHeadDim / 32];
  for (int g = 0; g < groups; g++) {
    encode_group(values + g * group, group, bits, codes + g * group * bits / 8, scales[g],
                 biases[g]);
  }
  narrow(side.dtype, scales, groups, at_element(side.dtype, side.scales, row * groups));
  narrow(side.dtype, biases, groups, at_element(side.dtype, side.biases, row * groups));
}

// Row `row`, in the dtype of the side.
void read_row(const PageSide& side, int64_t row, void* to) {
  alignas(64) float values[padded(kMaxHeadDim)];
  if (side.format == PageFormat::dense && !side.rotated) {
    memcpy(to, at_element(side.dtype, side.pages, row * side.dim), side.dim * itemsize(side.dtype));
    return;
  }
  RowReader(&side).read(row, values);
  if (side.rotated) {
    rotate(values, side.dim, rotation_size(side.dim));
  }
  narrow(side.dtype, values, side.dim, to);
}

// Codes, scales and biases of a page of one head, whose first row is `row`, from the rows of
// `tokens` tokens: one scale for each channel.
void seal_channels(const PageSide& side, int64_t row, const void* from, int tokens) {
  const int dim = side.dim, size = side.page_size;
  alignas(64) float low[kMaxHeadDim], high[kMaxHeadDim], odd[kMaxHeadDim] = {};
  alignas(64) float values[padded(kMaxHeadDim)];
  auto load_token = [&](int t) {
    widen(side.dtype, static_cast<const char*>(from) + t * dim * itemsize(side.dtype), dim, values);
  };
  for (int t = 0; t < tokens; t++) {
    load_token(t);
    for (int d = 0; d < dim; d++) {
      low[d] = t == 0 || values[d] < low[d] ? values[d] : low[d];
      high[d] = t == 0 || values[d] > high[d] ? values[d] : high[d];
      odd[d] += values[d] * 0.0f;
    }
  }
  for (int d = 0; d < dim; d++) {
    high[d] = tokens == 0 ? 0.0f : (high[d] - low[d]) / 15.0f + odd[d]; // the scale
    low[d] = tokens == 0 || odd[d] != 0 ? 0.0f : low[d];
  }
  const int64_t at = row / size * dim;
  narrow(side.dtype, high, dim, at_element(side.dtype, side.scales, at));
  narrow(side.dtype, low, dim, at_element(side.dtype, side.biases, at));
  widen(side.dtype, at_element(side.dtype, side.scales, at), dim, high);
  widen(side.dtype, at_element(side.dtype, side.biases, at), dim, low);
  auto* const codes = static_cast<uint8_t*>(side.pages) + row * dim / 2;
  memset(codes, 0, size_t(size) * dim / 2);
  for (int t = 0; t < tokens; t++) {
    load_token(t);
    for (int d = 0; d < dim; d++) {
      const float code = __builtin_rintf((values[d] - low[d]) / high[d]);
      const int value = !(code > 0.0f) || high[d] == 0.0f ? 0 : code > 15.0f ? 15 : int(code);
      codes[(t * dim + d) / 2] |= value << 4 * (d % 2);
    }
  }
}

} // namespace
} // namespace paged_mlx::cpu
