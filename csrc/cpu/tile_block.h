// Decode attention, the inner part: a block of 16 keys against up to four rows
// of one KV head.
//   Phase 1: scores, four keys x four rows at a time, each dot product in an
//            accumulator of its own.
//   Phase 2: online softmax of the block, row by row.
//   Phase 3: values, four rows x four vectors at a time.
// Cache lines of K and V are prefetched between the multiplications of phases 1
// and 3, a line at a time, and each of them twice: far ahead from memory, and into
// L1 in the phase before the one that reads it. Of prefetches that come as fast as
// memory answers the processor drops some (2% to 9%, on Zen 3), and each of those
// would be waited for; the second time finds it.
//
// A row's numbers are the same whichever rows stand beside it: every dot
// product and every accumulator is added up in an order of its own.
#pragma once

#include "cpu/walk.h"

namespace paged_mlx::cpu {
namespace {

constexpr int kRowGroup = 4;
constexpr int kQuad = 4;                             // keys scored together
constexpr int kBlockQuads = kBlockKeys / kQuad;
constexpr int kValuePairs = kManyRegisters ? 2 : 1;  // vector pairs of V at a time

// A number known when this is compiled.
template <int kCount>
struct Count {
  static constexpr int count = kCount;
};

// Keys [low, high) of one block, and the pool rows that hold them.
struct Block {
  int position; // of key 0
  int low;
  int high;
  bool seen_by_all; // all 16 keys, by every row of the group
  int64_t rows[kBlockKeys]; // those outside [low, high) repeat the nearest inside
  // What to prefetch meanwhile, a row per quad of keys: from memory, and of the next block.
  int64_t far[kBlockQuads];
  int64_t next[kBlockQuads];
};

// What phase 1, and then phases 2 and 3, prefetch from memory while they work on a block:
// the rows of a pool, K or V, of some KV head in a block that comes later.
struct Ahead {
  int span;
  int first; // key of the span
  const void* pool[2];
  int64_t head_row[2];
  int64_t next_head_row; // of the block that comes next
};

// Four rows of what comes later, and four of what comes next.
struct Lines {
  const char* far;
  const char* near;
};

// The softmax state of the rows of one KV head.
struct State {
  void* q;     // [rows, q_stride], of DotProduct::Query
  float* acc;  // [rows, acc_stride]
  float* most; // [rows]
  float* sums; // [rows, kLanes]: partial sums, one per lane
};

struct TilePass {
  const Job& job;
  const PlanItem& item;
  const Row* rows; // of KV head 0
  int num_rows;
  int q_stride;
  int acc_stride;
};

PAGED_MLX_INLINE void prefetch_line(Lines lines, int offset) {
  prefetch_far(lines.far + offset);
  prefetch_near(lines.near + offset);
}

// Prefetches the lines that begin in [offset, offset + kBytes).
template <int kBytes>
PAGED_MLX_INLINE void prefetch_part(Lines lines, int offset) {
  if constexpr (kBytes >= 64) {
    for (int b = 0; b < kBytes; b += 64) {
      prefetch_line(lines, offset + b);
    }
  } else if ((offset & 63) == 0) {
    prefetch_line(lines, offset);
  }
}

PAGED_MLX_INLINE void prefetch_range(Lines lines, int begin, int end) {
  for (int b = begin; b < end; b += 64) {
    prefetch_line(lines, b);
  }
}

// Of the `dim` elements of each key that is ahead, those prefetched between the
// multiplications of phase 1; the rest follow while the sums are folded, so that
// memory is asked at an even pace.
PAGED_MLX_INLINE int ahead_in_step(int dim) {
  return dim / kPair * 3 / 4 * kPair;
}

// Dot products of kKeys keys with kRows rows.
template <typename X, int kRows, int kKeys, bool kAhead>
PAGED_MLX_INLINE void dot_products(
    const typename DotProduct<X>::Query* q,
    int q_stride,
    const typename X::T* const* keys,
    Lines lines,
    int offset,
    int dim,
    Vec (&dots)[kRows][kKeys]) {
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
  auto whole = [](const typename X::T* p) __attribute__((always_inline)) {
    return Dot::load_key(p);
  };
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
PAGED_MLX_INLINE void score_quad(
    const TilePass& pass,
    const typename DotProduct<X>::Query* q,
    const typename X::T* const* keys,
    Lines lines,
    float* scores) {
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
      dot_products<X, kRows, 2, kAhead>(
          q,
          pass.q_stride,
          keys + 2 * half,
          lines,
          half * ahead_in_step(dim) * kBytes / 2,
          dim,
          dots);
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
    const VecI seen = (key >= begin) & (key < end);
    store(scores + j, select(seen, s, splat(kNegInf)));
  }
}

// New maxima, where there are: what was added up so far shrinks.
__attribute__((noinline)) void raise_maxima(
    float unit,
    int rows,
    const float* scores,
    float* most,
    float* sums,
    float* acc,
    int acc_stride) {
  for (int r = 0; r < rows; r++) {
    Vec top = load(scores + r * kBlockKeys);
    for (int j = kLanes; j < kBlockKeys; j += kLanes) {
      top = max(load(scores + r * kBlockKeys + j), top);
    }
    const float next = max_lane(top);
    if (!(next > most[r])) {
      continue;
    }
    const Vec shrink = exp2(splat((most[r] - next) * unit));
    most[r] = next;
    store(sums + r * kLanes, load(sums + r * kLanes) * shrink);
    for (int d = 0; d < acc_stride; d += kLanes) {
      float* const at = acc + r * acc_stride + d;
      store(at, load(at) * shrink);
    }
  }
}

// Phase 2: scores of the block become weights.
template <int kRows, typename PrefetchRow>
PAGED_MLX_INLINE void soften(
    float unit,
    float* scores,
    float* most,
    float* sums,
    float* acc,
    int acc_stride,
    PrefetchRow prefetch_row) {
  bool higher = false;
  for (int r = 0; r < kRows; r++) {
    Vec top = load(scores + r * kBlockKeys);
    for (int j = kLanes; j < kBlockKeys; j += kLanes) {
      top = max(load(scores + r * kBlockKeys + j), top);
    }
    higher |= any_greater(top, splat(most[r]));
  }
  if (higher) {
    raise_maxima(unit, kRows, scores, most, sums, acc, acc_stride);
  }
  for (int r = 0; r < kRows; r++) {
    const Vec base = splat(most[r] == kNegInf ? 0.0f : most[r]);
    Vec total = load(sums + r * kLanes);
    for (int j = 0; j < kBlockKeys; j += kLanes) {
      float* const at = scores + r * kBlockKeys + j;
      const Vec weight = exp2((load(at) - base) * splat(unit));
      total += weight;
      store(at, weight);
    }
    store(sums + r * kLanes, total);
    for (int i = r; i < kQuad; i += kRows) {
      prefetch_row(i);
    }
  }
}

template <typename T>
PAGED_MLX_INLINE const char* pool_row(const void* pool, int64_t row, int dim) {
  return static_cast<const char*>(pool) + row * dim * int64_t(sizeof(T));
}

// Where phase 3 finds V of the keys of a block, and what it prefetches meanwhile: beside
// each quad of keys but the first, whose lines phase 2 has prefetched.
template <typename T>
struct Values {
  const T* keys[kBlockKeys];
  Lines lines[kBlockQuads];
};

template <typename T>
PAGED_MLX_INLINE Values<T> find_values(
    const Job& job, const Block& block, int64_t head_row, const Ahead& ahead) {
  const int64_t dim = job.v_head_dim;
  const T* const pages = static_cast<const T*>(job.v_pages) + head_row * dim;
  Values<T> values;
  for (int j = 0; j < kBlockKeys; j++) {
    values.keys[j] = pages + block.rows[j] * dim;
  }
  for (int i = 0; i < kBlockQuads; i++) {
    values.lines[i] = {
        pool_row<T>(ahead.pool[1], block.far[i] + ahead.head_row[1], job.v_head_dim),
        pool_row<T>(job.k_pages, block.next[i] + ahead.next_head_row, job.head_dim)};
  }
  return values;
}

// Phase 3 for kPairs vector pairs of V, from element d on.
template <typename X, int kRows, int kPairs, bool kAhead, typename Load>
PAGED_MLX_INLINE void add_columns(
    const Values<typename X::T>& values,
    int low,
    int high,
    const float* weights,
    float* acc,
    int acc_stride,
    int d,
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
      prefetch_part<kPairs * kPair * sizeof(T)>(
          values.lines[quad], (d * kQuad + i * kPairs * kPair) * sizeof(T));
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
PAGED_MLX_INLINE void add_values(
    const Values<typename X::T>& values,
    const Block& block,
    int dim,
    const float* weights,
    float* acc,
    int acc_stride) {
  using T = typename X::T;
  auto columns = [&](int d, auto pairs, auto load_value) __attribute__((always_inline)) {
    add_columns<X, kRows, decltype(pairs)::count, kAhead>(
        values, block.low, block.high, weights, acc, acc_stride, d, load_value);
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
    columns(d, Count<1>{}, [left](const T* p) __attribute__((always_inline)) {
      return load2_part<X>(p, left);
    });
  }
}

// A block of keys against kRows rows of one KV head.
template <typename X, int kRows, bool kAhead>
__attribute__((noinline)) void attend_block(
    const TilePass& pass,
    const Block& block,
    const State& state,
    int first_row,
    int kv_head,
    int64_t head_row,
    const Ahead& ahead) {
  using T = typename X::T;
  const Job& job = pass.job;
  const T* const k_pages = static_cast<const T*>(job.k_pages);
  const auto* const q = static_cast<const typename DotProduct<X>::Query*>(state.q) +
      int64_t(first_row) * pass.q_stride;
  float* const acc = state.acc + int64_t(first_row) * pass.acc_stride;
  alignas(64) float scores[kRows * kBlockKeys] = {};
  for (int j = block.low / kQuad * kQuad; j < block.high; j += kQuad) {
    const T* keys[kQuad];
    for (int i = 0; i < kQuad; i++) {
      keys[i] = k_pages + (block.rows[j + i] + head_row) * job.head_dim;
    }
    const Lines lines = {
        pool_row<T>(ahead.pool[0], block.far[j / kQuad] + ahead.head_row[0], job.head_dim),
        pool_row<T>(job.v_pages, block.rows[j] + head_row, job.v_head_dim)};
    score_quad<X, kRows, kAhead>(pass, q, keys, lines, scores + j);
  }
  if (!(job.plain && block.seen_by_all)) {
    for (int r = 0; r < kRows; r++) {
      Row row = pass.rows[first_row + r];
      row.head += kv_head * job.gqa_factor;
      finish_scores(pass, block, row, scores + r * kBlockKeys);
    }
  }
  const Values<T> values = find_values<T>(job, block, head_row, ahead);
  soften<kRows>(
      exponent_unit(job),
      scores,
      state.most + first_row,
      state.sums + first_row * kLanes,
      acc,
      pass.acc_stride,
      [&](int i) __attribute__((always_inline)) {
        if constexpr (kAhead) {
          const int bytes = job.v_head_dim * sizeof(T);
          prefetch_range(values.lines[0], i * bytes, (i + 1) * bytes);
        }
      });
  add_values<X, kRows, kAhead>(
      values, block, job.v_head_dim, scores, acc, pass.acc_stride);
}

template <typename X, bool kAhead>
void attend_group(
    const TilePass& pass,
    const Block& block,
    const State& state,
    int first_row,
    int kv_head,
    int64_t head_row,
    const Ahead& ahead) {
  switch (min_int(kRowGroup, pass.num_rows - first_row)) {
    case 1:
      return attend_block<X, 1, kAhead>(
          pass, block, state, first_row, kv_head, head_row, ahead);
    case 2:
      return attend_block<X, 2, kAhead>(
          pass, block, state, first_row, kv_head, head_row, ahead);
    case 3:
      return attend_block<X, 3, kAhead>(
          pass, block, state, first_row, kv_head, head_row, ahead);
    default:
      return attend_block<X, 4, kAhead>(
          pass, block, state, first_row, kv_head, head_row, ahead);
  }
}

} // namespace
} // namespace paged_mlx::cpu
