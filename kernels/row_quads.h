// A row of one token and head in a simdgroup: in quads of four elements, of which quad
// lane + 32 i is the lane's i-th. What writes, seals and gathers quantised pages.
#ifndef PAGED_MLX_ROW_QUADS_H
#define PAGED_MLX_ROW_QUADS_H

#include "arguments.h"
#include "numbers.h"
#include "page_formats.h"
#include "rotation.h"

namespace paged_mlx {

template <typename T, int DIM>
struct RowQuads {
  enum { kQuads = DIM / 4, kOwn = (kQuads + 31) / 32 };

  float4 quads[kOwn];
  short lane;

  explicit RowQuads(short lane_) : lane(lane_) {}

  int quad(int i) const {
    return lane + 32 * i;
  }

  bool has(int i) const {
    return quad(i) < kQuads;
  }

  void clear() {
#pragma clang loop unroll(full)
    for (int i = 0; i < kOwn; i++) {
      quads[i] = 0;
    }
  }

  void load(const device T* row) {
#pragma clang loop unroll(full)
    for (int i = 0; i < kOwn; i++) {
      quads[i] = 0;
      if (has(i)) {
        const vec<T, 4> x = reinterpret_cast<const device vec<T, 4>*>(row)[quad(i)];
        quads[i] = float4(float(x.x), float(x.y), float(x.z), float(x.w));
      }
    }
  }

  void store(device T* row) const {
#pragma clang loop unroll(full)
    for (int i = 0; i < kOwn; i++) {
      if (has(i)) {
        const float4 x = quads[i];
        reinterpret_cast<device vec<T, 4>*>(row)[quad(i)] =
            vec<T, 4>(T(x.x), T(x.y), T(x.z), T(x.w));
      }
    }
  }

  // Rotated, in float32.
  void rotate() {
    rotate_quads<DIM>(quads, lane);
  }

  // To what T holds.
  void round() {
#pragma clang loop unroll(full)
    for (int i = 0; i < kOwn; i++) {
      const float4 x = quads[i];
      quads[i] = float4(float(T(x.x)), float(T(x.y)), float(T(x.z)), float(T(x.w)));
    }
  }
};

// The four codes of a quad.
template <int BITS>
struct QuadOfCodes;
template <>
struct QuadOfCodes<8> {
  typedef uint type;
};
template <>
struct QuadOfCodes<4> {
  typedef ushort type;
};

// The edges of what shares a scale, and whether all of it is finite.
struct Edges {
  float low, high;
  bool finite;

  void join(float x) {
    low = min(low, x);
    high = max(high, x);
    finite = finite && !is_not_finite(x);
  }

  void join_lane(ushort distance) {
    low = min(low, simd_shuffle_xor(low, distance));
    high = max(high, simd_shuffle_xor(high, distance));
    finite = simd_shuffle_xor(int(finite), distance) != 0 && finite;
  }
};

// The row in a format of tokens: codes, and a scale and a bias for each group, as
// mx.quantize has them: of the edges the one that is farther from 0 is met exactly. A group
// with a value that is not finite has a scale of NaN.
template <int FORMAT, typename T, int DIM>
inline void store_codes(thread const RowQuads<T, DIM>& row, device uchar* codes, device T* scales,
                        device T* biases) {
  constexpr int kBits = FORMAT == PAGED_MLX_TOKEN8 ? 8 : 4, kLanes = group_size(DIM) / 4;
  constexpr float kMost = kBits == 8 ? 255 : 15;
  typedef typename QuadOfCodes<kBits>::type Word;
#pragma clang loop unroll(full)
  for (int i = 0; i < RowQuads<T, DIM>::kOwn; i++) {
    const float4 x = row.quads[i];
    Edges edges = {INFINITY, -INFINITY, true};
#pragma clang loop unroll(full)
    for (int j = 0; j < 4; j++) {
      edges.join(x[j]);
    }
#pragma clang loop unroll(full)
    for (int distance = 1; distance < kLanes; distance *= 2) {
      edges.join_lane(distance);
    }
    const bool from_low = fabs(edges.low) > fabs(edges.high);
    const float span = max((edges.high - edges.low) / kMost, 1e-7f);
    const float edge = from_low ? edges.low : edges.high;
    float scale = from_low ? span : -span, bias = 0;
    const float steps = rint(edge / scale);
    if (steps != 0) {
      scale = edge / steps;
      bias = edge;
    }
    uint word = 0;
#pragma clang loop unroll(full)
    for (int j = 0; j < 4; j++) {
      word |= uint(min(max(rint((x[j] - bias) / scale), 0.0f), kMost)) << (kBits * j);
    }
    if (row.has(i)) {
      reinterpret_cast<device Word*>(codes)[row.quad(i)] = Word(word);
      if (row.quad(i) % kLanes == 0) {
        scales[row.quad(i) / kLanes] = T(edges.finite ? scale : NAN);
        biases[row.quad(i) / kLanes] = T(bias);
      }
    }
  }
}

// scale * code + bias; scales and biases are those of the token's groups or of the page's
// channels.
template <int FORMAT, typename T, int DIM>
inline void load_codes(const device uchar* codes, PageScales<T> side,
                       thread RowQuads<T, DIM>& row) {
  constexpr int kBits = FORMAT == PAGED_MLX_TOKEN8 ? 8 : 4;
  constexpr int kShare = FORMAT == PAGED_MLX_CHANNEL4 ? 1 : group_size(DIM);
  typedef typename QuadOfCodes<kBits>::type Word;
#pragma clang loop unroll(full)
  for (int i = 0; i < RowQuads<T, DIM>::kOwn; i++) {
    row.quads[i] = 0;
    if (row.has(i)) {
      const uint word = reinterpret_cast<const device Word*>(codes)[row.quad(i)];
#pragma clang loop unroll(full)
      for (int j = 0; j < 4; j++) {
        const int at = (4 * row.quad(i) + j) / kShare;
        const float code = float((word >> (kBits * j)) & ((1u << kBits) - 1));
        row.quads[i][j] = float(side.scales[at]) * code + float(side.biases[at]);
      }
    }
  }
}

} // namespace paged_mlx

#endif
