// Which body attends how many rows, from what its state takes of a lane's
// registers and of threadgroup memory.
#include <algorithm>

#include "arguments.h"
#include "metal/launch.h"

namespace paged_mlx::metal {

namespace {

// Words of a lane's registers that a body may use of 128. What a compiler counts for each
// body is in docs/metal.md.
constexpr int kWords = 78;
// Threadgroup memory of four simdgroups that decode, so that several threadgroups share a
// core, and of any threadgroup.
constexpr int kDecodeBytes = 8 * 1024;
constexpr int kMostBytes = 22 * 1024;

int itemsize(DType dtype) {
  return dtype == DType::float32 ? 4 : 2;
}

bool vector_fits(int rows, int head_dim, int v_head_dim) {
  const int lanes = lanes_of_key(rows, head_dim, v_head_dim);
  return rows * std::max(head_dim, v_head_dim) <= 16 * lanes;
}

// attend_tile with this many rows in a threadgroup of this many simdgroups.
struct Tile {
  int row_tiles, simdgroups;

  // Groups of eight keys that a simdgroup scores in a step.
  int groups() const {
    return row_tiles == 1 && simdgroups <= 4 ? 2 : 1;
  }

  // Sums of values, scores, row bounds, maximum and sum; then what a step passes through.
  int words(int head_dim, int v_head_dim, int size) const {
    const int columns = (v_head_dim + 8 * simdgroups - 1) / (8 * simdgroups) * 8;
    return row_tiles * (columns / 4 + 2 * groups() + 4) + (head_dim * size <= 128 ? 38 : 48);
  }

  // Q, weights of a step, maxima.
  int bytes(int head_dim, int size) const {
    return 8 * row_tiles * (head_dim * size + 32 * groups() * simdgroups + 4 * simdgroups);
  }
};

// Simdgroups that hold `row_tiles`, the fewest of those that leave room for other
// threadgroups; 0: none do.
int tile_simdgroups(int row_tiles, int head_dim, int v_head_dim, int size) {
  const bool decodes = row_tiles <= 2;
  int widest = 0;
  for (const int simdgroups : {4, 8}) {
    const Tile tile{row_tiles, simdgroups};
    if (tile.words(head_dim, v_head_dim, size) > kWords ||
        tile.bytes(head_dim, size) > kMostBytes) {
      continue;
    }
    if (!decodes || tile.bytes(head_dim, size) <= kDecodeBytes * simdgroups / 4) {
      return simdgroups;
    }
    widest = simdgroups;
  }
  return widest;
}

// The body of attend_tile for `rows` rows, or the widest there is.
Body tile_body(int rows, int head_dim, int v_head_dim, int size) {
  Body body{"attend_tile", 8, 8};
  for (const int row_tiles : {1, 2, 4}) {
    const int simdgroups = tile_simdgroups(row_tiles, head_dim, v_head_dim, size);
    if (simdgroups > 0) {
      body = {"attend_tile", 8 * row_tiles, simdgroups};
    }
    if (body.rows >= rows) {
      break;
    }
  }
  return body;
}

} // namespace

KindRows kind_rows(int head_dim, int v_head_dim, DType dtype) {
  const int size = itemsize(dtype);
  KindRows most;
  most.vector = vector_fits(2, head_dim, v_head_dim) ? 2 : vector_fits(1, head_dim, v_head_dim);
  most.tile = tile_body(16, head_dim, v_head_dim, size).rows;
  most.wide = tile_body(32, head_dim, v_head_dim, size).rows;
  return most;
}

Body choose_body(PlanKind kind, int rows, int head_dim, int v_head_dim, DType dtype) {
  kind = std::max(kind, kind_of(rows, kind_rows(head_dim, v_head_dim, dtype)));
  if (kind == kVectorItem) {
    return {"attend_vector", std::max(rows, 1), 4};
  }
  return tile_body(rows, head_dim, v_head_dim, itemsize(dtype));
}

} // namespace paged_mlx::metal
