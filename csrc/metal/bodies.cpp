// The choice of a body for a number of rows, from what its state takes of a lane's
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

// What a body depends on beside its rows.
struct Shape {
  int head_dim, v_head_dim;
  bool by_channel; // K's channels have scales: Q waits as floats, and in registers beside that
  int itemsize;    // of Q as it waits for Q K^T

  Shape(int head_dim_, int v_head_dim_, DType dtype, PageFormats formats)
      : head_dim(head_dim_),
        v_head_dim(v_head_dim_),
        by_channel(formats.k == PageFormat::channel4),
        itemsize(dtype == DType::float32 || by_channel ? 4 : 2) {}
};

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
  int words(const Shape& shape) const {
    const int columns = (shape.v_head_dim + 8 * simdgroups - 1) / (8 * simdgroups) * 8;
    const int q = shape.by_channel ? shape.head_dim / (8 * simdgroups) : 0;
    return row_tiles * (columns / 4 + 2 * groups() + 4 + q) +
        (shape.head_dim * shape.itemsize <= 128 ? 38 : 48);
  }

  // Q, weights of a step, maxima.
  int bytes(const Shape& shape) const {
    const int weights = 32 * groups() * simdgroups, maxima = 4 * simdgroups;
    return 8 * row_tiles * (shape.head_dim * shape.itemsize + weights + maxima);
  }
};

// Simdgroups that hold `row_tiles`, the fewest of those that leave room for other
// threadgroups; 0: none do.
int tile_simdgroups(int row_tiles, const Shape& shape) {
  const bool decodes = row_tiles <= 2;
  int widest = 0;
  for (const int simdgroups : {4, 8}) {
    const Tile tile{row_tiles, simdgroups};
    if (tile.words(shape) > kWords || tile.bytes(shape) > kMostBytes) {
      continue;
    }
    if (!decodes || tile.bytes(shape) <= kDecodeBytes * simdgroups / 4) {
      return simdgroups;
    }
    widest = simdgroups;
  }
  return widest;
}

// The body of attend_tile for `rows` rows, or the widest there is.
Body tile_body(int rows, const Shape& shape) {
  Body body{"attend_tile", 8, 8};
  for (const int row_tiles : {1, 2, 4}) {
    const int simdgroups = tile_simdgroups(row_tiles, shape);
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

KindRows kind_rows(int head_dim, int v_head_dim, DType dtype, PageFormats formats) {
  const Shape shape(head_dim, v_head_dim, dtype, formats);
  KindRows most;
  most.vector = vector_fits(2, head_dim, v_head_dim) ? 2 : vector_fits(1, head_dim, v_head_dim);
  most.tile = tile_body(16, shape).rows;
  most.wide = tile_body(32, shape).rows;
  return most;
}

Body choose_body(PlanKind kind, int rows, int head_dim, int v_head_dim, DType dtype,
                 PageFormats formats) {
  kind = std::max(kind, kind_of(rows, kind_rows(head_dim, v_head_dim, dtype, formats)));
  if (kind == kVectorItem) {
    return {"attend_vector", std::max(rows, 1), 4};
  }
  return tile_body(rows, Shape(head_dim, v_head_dim, dtype, formats));
}

} // namespace paged_mlx::metal
