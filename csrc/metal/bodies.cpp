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

bool wide_fits(int row_tiles, int head_dim, int v_head_dim, int size) {
  return wide_words(row_tiles, v_head_dim, kSimdgroups) <= kStateWords &&
      wide_bytes(row_tiles, head_dim, size, kSimdgroups) <= kThreadgroupBytes;
}

} // namespace

KindRows kind_rows(int head_dim, int v_head_dim, DType dtype) {
  const int size = itemsize(dtype);
  KindRows most;
  most.vector = 2 * std::max(head_dim, v_head_dim) <= 512 ? 2 : 1;
  most.tile = most.vector;
  for (int rows : {4, 8, 16}) {
    if (tile_words((rows + 7) / 8, head_dim, v_head_dim, size) <= kStateWords) {
      most.tile = rows;
    }
  }
  most.wide = 32;
  while (most.wide > 8 && !wide_fits(most.wide / 8, head_dim, v_head_dim, size)) {
    most.wide /= 2;
  }
  return most;
}

Body choose_body(PlanKind kind, int rows, int head_dim, int v_head_dim, DType dtype) {
  const KindRows most = kind_rows(head_dim, v_head_dim, dtype);
  kind = std::max(kind, kind_of(rows, most));
  if (kind == kVectorItem) {
    return {"attend_vector", std::max(rows, 1), kSimdgroups};
  }
  if (kind == kTileItem) {
    return {"attend_tile", rows <= 4 ? 4 : rows <= 8 ? 8 : 16, kSimdgroups};
  }
  int wide = most.wide;
  while (wide > 8 && wide / 2 >= rows) {
    wide /= 2;
  }
  return {"attend_wide", wide, kSimdgroups};
}

} // namespace paged_mlx::metal
