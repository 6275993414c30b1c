// The rotation of a row: a Walsh-Hadamard transform in natural order, blocks of
// rotation_size elements, times 1 / sqrt(rotation_size). It is its own inverse.
//
// A simdgroup holds the row in quads of four elements: quad lane + 32 i in quads[i].
#ifndef PAGED_MLX_ROTATION_H
#define PAGED_MLX_ROTATION_H

#include "arguments.h"
#include "numbers.h"

namespace paged_mlx {

// 1 / sqrt of a power of two.
constexpr float inverse_root(int size) {
  float root = 1;
  for (; size >= 4; size /= 4) {
    root /= 2;
  }
  return size == 2 ? root * 0.70710678118654752f : root;
}

inline float4 across_lanes(float4 x, ushort distance) {
  return float4(simd_shuffle_xor(x.x, distance), simd_shuffle_xor(x.y, distance),
                simd_shuffle_xor(x.z, distance), simd_shuffle_xor(x.w, distance));
}

// Butterflies at distance 1, 2, 4, ...: in a quad, between lanes, between a lane's quads.
template <int DIM, int QUADS>
inline void rotate_quads(thread float4 (&quads)[QUADS], short lane) {
  constexpr int kSize = rotation_size(DIM);
#pragma clang loop unroll(full)
  for (int i = 0; i < QUADS; i++) {
    const float4 x = quads[i];
    const float4 y = float4(x.x + x.y, x.x - x.y, x.z + x.w, x.z - x.w);
    quads[i] = float4(y.x + y.z, y.y + y.w, y.x - y.z, y.y - y.w);
  }
#pragma clang loop unroll(full)
  for (int distance = 1; 4 * distance < kSize && distance < 32; distance *= 2) {
#pragma clang loop unroll(full)
    for (int i = 0; i < QUADS; i++) {
      const float4 other = across_lanes(quads[i], distance);
      quads[i] = lane & distance ? other - quads[i] : quads[i] + other;
    }
  }
#pragma clang loop unroll(full)
  for (int distance = 1; 128 * distance < kSize; distance *= 2) {
#pragma clang loop unroll(full)
    for (int i = 0; i < QUADS; i++) {
      if ((i & distance) == 0) {
        const float4 low = quads[i], high = quads[i + distance];
        quads[i] = low + high;
        quads[i + distance] = low - high;
      }
    }
  }
#pragma clang loop unroll(full)
  for (int i = 0; i < QUADS; i++) {
    quads[i] *= inverse_root(kSize);
  }
}

} // namespace paged_mlx

#endif
