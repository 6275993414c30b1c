// Decode attention, the inner part: a block of 16 keys against up to four rows
// of one KV head.
//   Phase 1: scores, four keys x four rows at a time, each dot product in an
//            accumulator of its own.
//   Phase 2: online softmax of the block, row by row.
//   Phase 3: values, four rows x four vectors at a time.
// Cache lines that are wanted later are prefetched between the multiplications of phases
// 1 and 3, a line at a time.
//
// A row's numbers are the same whichever rows stand beside it: every dot
// product and every accumulator is added up in an order of its own.
#pragma once

#include "cpu/tile_scores.h"
#include "cpu/tile_values.h"

namespace paged_mlx::cpu {
namespace {

// The softmax state of the rows of one KV head.
struct State {
  void* q;     // [rows, q_stride], of DotProduct::Query
  float* acc;  // [rows, acc_stride]
  float* most; // [rows]
  float* sums; // [rows, kLanes]: partial sums, one per lane
};

// New maxima, where there are: what was added up so far shrinks.
__attribute__((noinline)) void raise_maxima(float unit, int rows, const float* scores, float* most,
                                            float* sums, float* acc, int acc_stride) {
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

// The same for kRows rows, if any has a score above its maximum.
template <int kRows>
PAGED_MLX_INLINE void raise_if_higher(float unit, const float* scores, float* most, float* sums,
                                      float* acc, int acc_stride) {
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
}

// Phase 2: scores of the block, none of them above its row's maximum, become weights.
template <int kRows, typename PrefetchRow>
PAGED_MLX_INLINE void weigh(float unit, float* scores, const float* most, float* sums,
                            PrefetchRow prefetch_row) {
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

// Phase 3 where some row does not see some key: of its values nothing reaches the row,
// were they NaN. `seen`: per row, a bit a key.
template <typename X, int kRows>
__attribute__((noinline)) void add_seen_values(Values<typename X::T> values, const Block& block,
                                               int dim, const uint32_t* seen, const float* weights,
                                               float* acc, int acc_stride) {
  using T = typename X::T;
  alignas(64) static const T zeros[kMaxHeadDim] = {};
  bool apart = false;
  for (int j = block.low; j < block.high; j++) {
    int rows = 0;
    for (int r = 0; r < kRows; r++) {
      rows += seen[r] >> j & 1;
    }
    if (rows == 0) {
      values.keys[j] = zeros;
    }
    apart |= rows > 0 && rows < kRows && !all_finite<X>(values.keys[j], dim);
  }
  if (!apart) {
    add_values<X, kRows, false>(values, block, dim, weights, acc, acc_stride);
    return;
  }
  for (int r = 0; r < kRows; r++) {
    Values<T> own = values;
    for (int j = block.low; j < block.high; j++) {
      own.keys[j] = seen[r] >> j & 1 ? own.keys[j] : zeros;
    }
    add_values<X, 1, false>(own, block, dim, weights + r * kBlockKeys, acc + r * acc_stride,
                            acc_stride);
  }
}

// A block of keys against kRows rows of one KV head.
template <typename X, int kRows, bool kAhead>
__attribute__((noinline)) void attend_block(const TilePass& pass, const Block& block,
                                            const State& state, int first_row, int kv_head,
                                            int64_t head_row, const Ahead& ahead) {
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
  const bool hides = job.mask || !block.seen_alike;
  uint32_t seen[kRows] = {};
  for (int r = 0; hides && r < kRows; r++) {
    for (int j = block.low; j < block.high; j++) {
      seen[r] |= uint32_t(scores[r * kBlockKeys + j] != kNegInf) << j;
    }
  }
  const Values<T> values = find_values<T>(job, block, head_row, ahead);
  const float unit = exponent_unit(job);
  float* const most = state.most + first_row;
  float* const sums = state.sums + first_row * kLanes;
  raise_if_higher<kRows>(unit, scores, most, sums, acc, pass.acc_stride);
  weigh<kRows>(unit, scores, most, sums, [&](int i) __attribute__((always_inline)) {
    if constexpr (kAhead) {
      const int bytes = job.v_head_dim * sizeof(T);
      prefetch_range(values.lines[0], i * bytes, (i + 1) * bytes);
    }
  });
  if (hides) {
    add_seen_values<X, kRows>(values, block, job.v_head_dim, seen, scores, acc, pass.acc_stride);
  } else {
    add_values<X, kRows, kAhead>(values, block, job.v_head_dim, scores, acc, pass.acc_stride);
  }
}

template <typename X, bool kAhead>
void attend_group(const TilePass& pass, const Block& block, const State& state, int first_row,
                  int kv_head, int64_t head_row, const Ahead& ahead) {
  switch (min_int(kRowGroup, pass.num_rows - first_row)) {
    case 1:
      return attend_block<X, 1, kAhead>(pass, block, state, first_row, kv_head, head_row, ahead);
    case 2:
      return attend_block<X, 2, kAhead>(pass, block, state, first_row, kv_head, head_row, ahead);
    case 3:
      return attend_block<X, 3, kAhead>(pass, block, state, first_row, kv_head, head_row, ahead);
    default:
      return attend_block<X, 4, kAhead>(pass, block, state, first_row, kv_head, head_row, ahead);
  }
}

} // namespace
} // namespace paged_mlx::cpu
