// The rows of a work item and what a row makes of the dot product with a key.
#ifndef PAGED_MLX_SCORES_H
#define PAGED_MLX_SCORES_H

#include "arguments.h"
#include "numbers.h"

namespace paged_mlx {

constant bool kHasWindow [[function_constant(PAGED_MLX_CONSTANT_WINDOW)]];
constant bool kHasSoftcap [[function_constant(PAGED_MLX_CONSTANT_SOFTCAP)]];
constant bool kHasAlibi [[function_constant(PAGED_MLX_CONSTANT_ALIBI)]];
constant bool kHasSinks [[function_constant(PAGED_MLX_CONSTANT_SINKS)]];
constant bool kHasMask [[function_constant(PAGED_MLX_CONSTANT_MASK)]];
constant bool kMaskAdds [[function_constant(PAGED_MLX_CONSTANT_MASK_ADDS)]];

// Scores are in base-2 units, exponents of 2. With an additive mask they are in natural
// ones: its values may be as low as a float can be, and stay scores.
inline float natural_to_score(float x) {
  return kMaskAdds ? x : x * kLog2E;
}

inline float score_to_natural(float x) {
  return kMaskAdds ? x : x * kLn2;
}

// The weight of a score whose distance from the maximum is `difference`.
inline float weight_at(float difference) {
  return fast::exp2(kMaskAdds ? difference * kLog2E : difference);
}

// One query head of one query token. Sees the keys [low, high).
struct QueryRow {
  int token, head;
  int low, high;
  int position;
  float slope; // ALiBi, in units of scores
  long mask;   // element of key position 0
};

// What all rows of an item have in common.
struct RowReader {
  const device int* plan;
  constant AttendArguments& arguments;
  const device float* alibi_slopes;
  int row_begin, num_rows;
  int key_begin, key_end;
  int kv_head;

  RowReader(const device int* plan_, const device PlanItem& item,
            constant AttendArguments& arguments_, const device float* alibi_slopes_, int kv_head_)
      : plan(plan_),
        arguments(arguments_),
        alibi_slopes(alibi_slopes_),
        row_begin(item.row_begin),
        num_rows(item.row_count * arguments_.gqa_factor),
        key_begin(item.key_begin),
        key_end(item.key_end),
        kv_head(kv_head_) {}

  int head(int row) const {
    return kv_head * arguments.gqa_factor + row % arguments.gqa_factor;
  }

  int token(int row) const {
    return plan[arguments.row_tokens + row_begin + row / arguments.gqa_factor];
  }

  // A row past the last repeats the last; its result is not written.
  QueryRow read(int index) const {
    const int row = min(index, num_rows - 1);
    QueryRow r;
    r.token = token(row);
    r.head = head(row);
    r.position = plan[arguments.positions + r.token];
    r.low = kHasWindow ? max(key_begin, r.position - arguments.sliding_window + 1) : key_begin;
    r.high = min(key_end, plan[arguments.row_ends + r.token]);
    r.slope = kHasAlibi ? natural_to_score(alibi_slopes[r.head]) : 0;
    r.mask = r.head * arguments.mask_head_stride + r.token * arguments.mask_token_stride;
    return r;
  }
};

// The keys that all of N rows of each lane see: [x, y).
template <int N>
inline int2 seen_by_all(thread const QueryRow (&rows)[N]) {
  int low = rows[0].low, high = rows[0].high;
#pragma clang loop unroll(full)
  for (int i = 1; i < N; i++) {
    low = max(low, rows[i].low);
    high = min(high, rows[i].high);
  }
  return int2(simd_max(low), simd_min(high));
}

// The keys that any of them sees lie in [x, y).
template <int N>
inline int2 seen_by_any(thread const QueryRow (&rows)[N]) {
  int low = rows[0].low, high = rows[0].high;
#pragma clang loop unroll(full)
  for (int i = 1; i < N; i++) {
    low = min(low, rows[i].low);
    high = max(high, rows[i].high);
  }
  return int2(simd_min(low), simd_max(high));
}

struct Scoring {
  constant AttendArguments& arguments;
  const device void* mask;

  Scoring(constant AttendArguments& arguments_, const device void* mask_)
      : arguments(arguments_), mask(mask_) {}

  // The score of the key at `position`. EDGE: the key may lie
  // outside what the row sees.
  template <bool EDGE>
  float of(float dot, thread const QueryRow& row, int position) const {
    if (EDGE && !(position >= row.low && position < row.high)) {
      return kHidden;
    }
    float score = dot * arguments.scale;
    if (kHasSoftcap) {
      score = arguments.softcap * precise::tanh(score);
    }
    if (kHasAlibi) {
      score += row.slope * float(position - row.position);
    }
    if (kHasMask && !kMaskAdds) {
      const bool visible = reinterpret_cast<const device uchar*>(mask)[row.mask + position] != 0;
      return visible ? score : kHidden;
    }
    if (kHasMask && kMaskAdds) {
      const float bias = reinterpret_cast<const device float*>(mask)[row.mask + position];
      return is_minus_infinity(bias) ? kHidden : score + bias;
    }
    return score;
  }
};

} // namespace paged_mlx

#endif
