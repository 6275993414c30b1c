// Decode attention, phase 1: scores of a block of keys with up to four rows.
#pragma once

#include "cpu/tile_pass.h"

namespace paged_mlx::cpu {
namespace {

// Of the `dim` elements of each key that is ahead, those prefetched between the
// multiplications of phase 1; the rest follow while the sums are folded, so that
// memory is asked at an even pace.
PAGED_MLX_INLINE int ahead_in_step(int dim) {
  return dim / kPair * 3 / 4 * kPair;
}

// Dot products of kKeys keys with kRows rows.
template <typename X, int kRows, int kKeys, bool kAhead>
PAGED_MLX_INLINE void dot_products(const typename DotProduct<X>::Query* q, int q_stride,
                                   const typename X::T* const* keys, Lines lines, int offset,
                                   int dim, Vec (&dots)[kRows][kKeys]) {
  using Dot = DotProduct<X>;
  for (int r = 0; r < kRows; r++) {
    for (int j = 0; j < kKeys; j++) {
      dots[r][j] = Vec{};
    }
  }
  auto step = [&](int d, auto load_key) __attribute__((always_inline)) {
    typename Dot::Key k[kKeys];
    for (int j = 0; j < kKeys; j++) {
      k[j] = load_key(keys[j] + d);
    }
    for (int r = 0; r < kRows; r++) {
      Dot::add(q + r * q_stride + d, k, dots[r]);
    }
  };
  auto whole = [](const typename X::T* p)
                   __attribute__((always_inline)) { return Dot::load_key(p); };
  int d = 0;
  if constexpr (kAhead) {
    for (; d < ahead_in_step(dim); d += kPair) {
      constexpr int kBytes = kKeys * sizeof(typename X::T);
      prefetch_part<kPair * kBytes>(lines, offset + d * kBytes);
      step(d, whole);
    }
  }
  for (; d + kPair <= dim; d += kPair) {
    step(d, whole);
  }
  if (d < dim) {
    const int left = dim - d;
    step(d, [left](const typename X::T* p) __attribute__((always_inline)) {
      return Dot::load_key_part(p, left);
    });
  }
}

// Phase 1 for four keys: scores[r * kBlockKeys + 0..3]. All four at once where
// registers allow, but wide elements two by two: fewer lines are asked for in one
// go, so fewer wait. The sums are the same.
template <typename X, int kRows, bool kAhead>
PAGED_MLX_INLINE void score_quad(const TilePass& pass, const typename DotProduct<X>::Query* q,
                                 const typename X::T* const* keys, Lines lines, float* scores) {
  const int dim = pass.job.head_dim;
  constexpr int kBytes = kQuad * sizeof(typename X::T); // of an element of four keys
  if constexpr (kManyRegisters && sizeof(typename X::T) == 2) {
    Vec dots[kRows][4];
    dot_products<X, kRows, 4, kAhead>(q, pass.q_stride, keys, lines, 0, dim, dots);
    for (int r = 0; r < kRows; r++) {
      const Vec4 ab = fold_two(fold(dots[r][0]), fold(dots[r][1]));
      const Vec4 cd = fold_two(fold(dots[r][2]), fold(dots[r][3]));
      store4(scores + r * kBlockKeys, sum_four(ab, cd));
    }
  } else {
    Vec4 halves[2][kRows];
    for (int half = 0; half < 2; half++) {
      Vec dots[kRows][2];
      dot_products<X, kRows, 2, kAhead>(q, pass.q_stride, keys + 2 * half, lines,
                                        half * ahead_in_step(dim) * kBytes / 2, dim, dots);
      for (int r = 0; r < kRows; r++) {
        halves[half][r] = fold_two(fold(dots[r][0]), fold(dots[r][1]));
      }
    }
    for (int r = 0; r < kRows; r++) {
      store4(scores + r * kBlockKeys, sum_four(halves[0][r], halves[1][r]));
    }
  }
  if constexpr (kAhead) {
    prefetch_range(lines, ahead_in_step(dim) * kBytes, dim * kBytes);
  }
}

// Scores of the block; -inf where the row may not see the key.
void finish_scores(const TilePass& pass, const Block& block, const Row& row, float* scores) {
  const Job& job = pass.job;
  float bias[kBlockKeys] = {};
  if (job.mask) {
    const char* const mask = mask_row(job, row);
    for (int j = block.low; j < block.high; j++) {
      bias[j] = mask_bias(job, mask, block.position + j);
    }
  }
  const Vec slope = splat(job.alibi_slopes ? job.alibi_slopes[row.head] : 0.0f);
  const VecI begin = splat_int(max_int(row.begin, block.position + block.low));
  const VecI end = splat_int(min_int(row.end, block.position + block.high));
  for (int j = 0; j < kBlockKeys; j += kLanes) {
    const VecI key = iota() + splat_int(block.position + j);
    const Vec distance = __builtin_convertvector(key - splat_int(row.position), Vec);
    Vec s = load(scores + j);
    if (!job.plain) {
      s = to_score(job, s, slope, distance) + load(bias + j);
    }
    const VecI shown = load(bias + j) != splat(kNegInf);
    const VecI seen = (key >= begin) & (key < end) & shown;
    store(scores + j, select(seen, s, splat(kNegInf)));
  }
}

} // namespace
} // namespace paged_mlx::cpu
