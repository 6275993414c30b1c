// Which body attends how many rows, from what its state takes of a lane's
// registers and of threadgroup memory.
#include <algorithm>

#include "metal/launch.h"

namespace paged_mlx::metal {

namespace {

constexpr int kSimdgroups = 4;
// Of a lane's registers, left over for keys, values and addresses: 32.
constexpr int kStateWords = 96;
// Leaves room for another threadgroup on the core, or nearly.
constexpr int kThreadgroupBytes = 22 * 1024;

int itemsize(DType dtype) {
  return dtype == DType::float32 ? 4 : 2;
}

// Q and the sums of values, 8 rows over 32 lanes.
int tile_words(int row_tiles, int head_dim, int v_head_dim, int size) {
  return row_tiles * (head_dim * size / 16 + v_head_dim / 4);
}

// Q, the weights of a step and the row maxima; see attend_wide.metal.
int wide_bytes(int row_tiles, int head_dim, int size, int simdgroups) {
  const int rows = 8 * row_tiles;
  return rows * (head_dim * size + 16) + rows * (16 * simdgroups + 4) * 4 + simdgroups * rows * 4;
}

// The sums of values of a simdgroup's columns and its scores.
int wide_words(int row_tiles, int v_head_dim, int simdgroups) {
  const int columns = (v_head_dim + 8 * simdgroups - 1) / (8 * simdgroups) * 8;
  return row_tiles * (columns / 4 + 4);
}

} // namespace

Body choose_body(int rows, int head_dim, int v_head_dim, DType dtype) {
  const int size = itemsize(dtype);
  if (rows <= 2 && rows * std::max(head_dim, v_head_dim) <= 512) {
    return {"attend_vector", std::max(rows, 1), kSimdgroups};
  }
  for (int most : {4, 8, 16}) {
    const int row_tiles = (most + 7) / 8;
    if (rows <= most && tile_words(row_tiles, head_dim, v_head_dim, size) <= kStateWords) {
      return {"attend_tile", most, kSimdgroups};
    }
  }
  int row_tiles = 4;
  while (row_tiles > 1 &&
         (4 * row_tiles >= rows || wide_words(row_tiles, v_head_dim, kSimdgroups) > kStateWords ||
          wide_bytes(row_tiles, head_dim, size, kSimdgroups) > kThreadgroupBytes)) {
    row_tiles /= 2;
  }
  return {"attend_wide", 8 * row_tiles, kSimdgroups};
}

} // namespace paged_mlx::metal
