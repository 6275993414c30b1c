// Decode attention, phase 3: V of a block of keys, weighted, for up to four rows.
#pragma once

#include "cpu/tile_pass.h"

namespace paged_mlx::cpu {
namespace {

constexpr int kValuePairs = kManyRegisters ? 2 : 1; // vector pairs of V at a time

// A number known when this is compiled.
template <int kCount>
struct Count {
  static constexpr int count = kCount;
};

// Where phase 3 finds V of the keys of a block, and what it prefetches meanwhile: beside
// each quad of keys but the first, whose lines phase 2 has prefetched.
template <typename T>
struct Values {
  const T* keys[kBlockKeys];
  Lines lines[kBlockQuads];
};

template <typename T>
PAGED_MLX_INLINE Values<T> find_values(const Job& job, const Block& block, int64_t head_row,
                                       const Ahead& ahead) {
  const int64_t dim = job.v_head_dim;
  const T* const pages = static_cast<const T*>(job.v_pages) + head_row * dim;
  Values<T> values;
  for (int j = 0; j < kBlockKeys; j++) {
    values.keys[j] = pages + block.rows[j] * dim;
  }
  for (int i = 0; i < kBlockQuads; i++) {
    values.lines[i] = {pool_row<T>(ahead.pool[1], block.far[i] + ahead.head_row[1], job.v_head_dim),
                       pool_row<T>(job.k_pages, block.next[i] + ahead.next_head_row, job.head_dim)};
  }
  return values;
}

// Phase 3 for kPairs vector pairs of V, from element d on.
template <typename X, int kRows, int kPairs, bool kAhead, typename Load>
PAGED_MLX_INLINE void add_columns(const Values<typename X::T>& values, int low, int high,
                                  const float* weights, float* acc, int acc_stride, int d,
                                  Load load_value) {
  using T = typename X::T;
  Vec sum[kRows][2 * kPairs];
  for (int r = 0; r < kRows; r++) {
    for (int i = 0; i < 2 * kPairs; i++) {
      sum[r][i] = Vec{};
    }
  }
  auto add = [&](int j) __attribute__((always_inline)) {
    const T* const value = values.keys[j] + d;
    Pair v[kPairs];
    for (int i = 0; i < kPairs; i++) {
      v[i] = load_value(value + i * kPair);
    }
    for (int r = 0; r < kRows; r++) {
      const Vec weight = splat(weights[r * kBlockKeys + j]);
      for (int i = 0; i < kPairs; i++) {
        sum[r][2 * i] = fma(weight, v[i].a, sum[r][2 * i]);
        sum[r][2 * i + 1] = fma(weight, v[i].b, sum[r][2 * i + 1]);
      }
    }
  };
  auto prefetch_beside = [&](int quad, int i) __attribute__((always_inline)) {
    if (kAhead && quad > 0) {
      prefetch_part<kPairs * kPair * sizeof(T)>(values.lines[quad],
                                                (d * kQuad + i * kPairs * kPair) * sizeof(T));
    }
  };
  if (low == 0 && high == kBlockKeys) {
    for (int quad = 0; quad < kBlockQuads; quad++) {
      for (int i = 0; i < kQuad; i++) {
        prefetch_beside(quad, i);
        add(quad * kQuad + i);
      }
    }
  } else {
    for (int j = low; j < high; j++) {
      prefetch_beside(j / kQuad, j % kQuad);
      add(j);
    }
  }
  for (int r = 0; r < kRows; r++) {
    for (int i = 0; i < 2 * kPairs; i++) {
      float* const at = acc + r * acc_stride + d + i * kLanes;
      store(at, load(at) + sum[r][i]);
    }
  }
}

template <typename X, int kRows, bool kAhead>
PAGED_MLX_INLINE void add_values(const Values<typename X::T>& values, const Block& block, int dim,
                                 const float* weights, float* acc, int acc_stride) {
  using T = typename X::T;
  auto columns = [&](int d, auto pairs, auto load_value) __attribute__((always_inline)) {
    add_columns<X, kRows, decltype(pairs)::count, kAhead>(values, block.low, block.high, weights,
                                                          acc, acc_stride, d, load_value);
  };
  auto whole = [](const T* p) __attribute__((always_inline)) { return X::load2(p); };
  int d = 0;
  for (; d + kValuePairs * kPair <= dim; d += kValuePairs * kPair) {
    columns(d, Count<kValuePairs>{}, whole);
  }
  for (; d + kPair <= dim; d += kPair) {
    columns(d, Count<1>{}, whole);
  }
  if (d < dim) {
    const int left = dim - d;
    columns(d, Count<1>{},
            [left](const T* p) __attribute__((always_inline)) { return load2_part<X>(p, left); });
  }
}

} // namespace
} // namespace paged_mlx::cpu
