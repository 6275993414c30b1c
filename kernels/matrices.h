// 8x8 matrices of a simdgroup, fed by wide loads.
//
// A lane holds elements (row, column) and (row, column + 1) of every matrix. In
// Q K^T the order of the dims is free as long as Q and K agree, so a lane takes
// one run of W dims of a key and spreads it over W matrices; in P V the order
// of the columns is free until the result is stored.
#ifndef PAGED_MLX_MATRICES_H
#define PAGED_MLX_MATRICES_H

#include "numbers.h"
#include "scores.h"

namespace paged_mlx {

template <typename T>
using Matrix = simdgroup_matrix<T, 8, 8>;

template <typename T>
inline thread vec<T, 2>& elements(thread Matrix<T>& matrix) {
  return reinterpret_cast<thread vec<T, 2>&>(matrix.thread_elements());
}

// Where a lane's elements lie.
struct LanePlace {
  short lane, row, column;

  explicit LanePlace(short lane_)
      : lane(lane_),
        row((lane_ & 16) / 4 + (lane_ & 6) / 2),
        column((lane_ & 8) / 2 + (lane_ & 1) * 2) {}
};

// Over the four lanes that hold a row of a matrix.
inline float row_max(float x) {
  x = max(x, simd_shuffle_xor(x, 1));
  return max(x, simd_shuffle_xor(x, 8));
}

inline float row_sum(float x) {
  x += simd_shuffle_xor(x, 1);
  return x + simd_shuffle_xor(x, 8);
}

// The two keys of a lane's columns. One that is not live counts as 0, unread.
template <typename T>
struct KeyPair {
  const device T* first;
  const device T* second;
  bool first_live, second_live;
};

// A lane's elements of WIDTH matrices that lie together in threadgroup memory.
template <typename T, int WIDTH>
struct StagedMatrices {
  enum {
    kMost = 16 / int(sizeof(T)),
    kTake = 2 * WIDTH < kMost ? 2 * WIDTH : kMost,
    kLoads = 2 * WIDTH / kTake
  };

  Run<T, kTake> runs[kLoads];

  void load(const threadgroup T* from) {
#pragma clang loop unroll(full)
    for (int l = 0; l < kLoads; l++) {
      runs[l].load_staged(from + l * kTake);
    }
  }

  vec<T, 2> elements_of(int i) const {
    const int l = 2 * i / kTake, at = 2 * i % kTake;
    return vec<T, 2>(runs[l].v[at], runs[l].v[at + 1]);
  }
};

// The dims [BEGIN, D) of Q K^T, in runs of 8 lanes x kWidth dims. Matrix i of a
// run holds the dims BEGIN + kWidth * lane + i. In threadgroup memory the runs of
// Q's matrices follow each other; of a run, the elements of a lane stand together.
template <typename T, int D, int BEGIN = 0, bool MORE = (BEGIN < D)>
struct DimRuns {
  enum { kWidth = run_width<T>(D - BEGIN, 8), kNext = BEGIN + 8 * kWidth };
  typedef DimRuns<T, D, kNext> Rest;

  // The lane's elements of eight rows of Q; `row` is the row of the lane.
  static void stage(const device T* row, LanePlace at, threadgroup T* q) {
    Run<T, kWidth> first, second;
    first.load(row + BEGIN + kWidth * at.column);
    second.load(row + BEGIN + kWidth * (at.column + 1));
    threadgroup vec<T, 2>* to =
        reinterpret_cast<threadgroup vec<T, 2>*>(q + 8 * BEGIN + 2 * kWidth * at.lane);
#pragma clang loop unroll(full)
    for (int i = 0; i < kWidth; i++) {
      to[i] = vec<T, 2>(first.v[i], second.v[i]);
    }
    Rest::stage(row, at, q);
  }

  // scores[m][g] += Q[m] . K[g]^T for GROUPS groups of eight keys; the lane reads the
  // dims of its row for the two keys of its columns.
  template <int ROW_TILES, int GROUPS>
  static void multiply(const threadgroup T* q, thread const KeyPair<T> (&pairs)[GROUPS],
                       LanePlace at, thread Matrix<float> (&scores)[ROW_TILES][GROUPS]) {
    Run<T, kWidth> first[GROUPS], second[GROUPS];
#pragma clang loop unroll(full)
    for (int g = 0; g < GROUPS; g++) {
      first[g].load_if(pairs[g].first_live, pairs[g].first + BEGIN + kWidth * at.row);
      second[g].load_if(pairs[g].second_live, pairs[g].second + BEGIN + kWidth * at.row);
    }
#pragma clang loop unroll(full)
    for (int m = 0; m < ROW_TILES; m++) {
      StagedMatrices<T, kWidth> staged;
      staged.load(q + 8 * (m * D + BEGIN) + 2 * kWidth * at.lane);
#pragma clang loop unroll(full)
      for (int i = 0; i < kWidth; i++) {
        Matrix<T> rows;
        elements(rows) = staged.elements_of(i);
#pragma clang loop unroll(full)
        for (int g = 0; g < GROUPS; g++) {
          Matrix<T> keys;
          elements(keys) = vec<T, 2>(first[g].v[i], second[g].v[i]);
          simdgroup_multiply_accumulate(scores[m][g], rows, keys, scores[m][g]);
        }
      }
    }
    Rest::template multiply<ROW_TILES, GROUPS>(q, pairs, at, scores);
  }
};

template <typename T, int D, int BEGIN>
struct DimRuns<T, D, BEGIN, false> {
  static void stage(const device T*, LanePlace, threadgroup T*) {}

  template <int ROW_TILES, int GROUPS>
  static void multiply(const threadgroup T*, thread const KeyPair<T> (&)[GROUPS], LanePlace,
                       thread Matrix<float> (&)[ROW_TILES][GROUPS]) {}
};

// Values of a key that are infinite or NaN, apart from those that are finite: 0 times
// them is NaN, so a matrix product would bring them to rows that do not see the key. What
// each is, as a number: 1 infinity, 64 minus infinity, 65 NaN; sums over 8 keys are exact.
inline float code_of(float x) {
  return !is_not_finite(x)     ? 0.0f
      : x == -minus_infinity() ? 1.0f
      : is_minus_infinity(x)   ? 64.0f
                               : 65.0f;
}

// What a sum of codes of keys that a row sees adds to its sum of values.
inline float decoded(float codes) {
  const float minus = codes >= 64 ? minus_infinity() : 0.0f;
  return minus + (fmod(codes, 64.0f) > 0 ? -minus_infinity() : 0.0f);
}

// The columns [BEGIN, DV) of P V, in runs of 4 lanes x kWidth columns. Matrix i
// of a run holds a lane's columns BEGIN + kWidth * (at.column / 2) + 2 i, + 1.
template <typename T, int DV, int BEGIN = 0, bool MORE = (BEGIN < DV)>
struct ColumnRuns {
  enum { kWidth = run_width<T>(DV - BEGIN, 4), kNext = BEGIN + 4 * kWidth };
  typedef ColumnRuns<T, DV, kNext> Rest;

  // out[m * STRIDE, columns] += weights[m] . V for 8 keys; the lane reads the row of
  // its key. EDGE as in Scoring.
  template <bool EDGE, int ROW_TILES, int STRIDE>
  static void multiply(thread Matrix<float> (&weights)[ROW_TILES], const device T* key, bool live,
                       LanePlace at, thread Matrix<float>* out) {
    Run<T, kWidth> run;
    run.load_if(live, key + BEGIN + kWidth * (at.column / 2));
    if (EDGE) {
      split_off<ROW_TILES, STRIDE>(weights, run, out);
    }
#pragma clang loop unroll(full)
    for (int m = 0; m < ROW_TILES; m++) {
#pragma clang loop unroll(full)
      for (int i = 0; i < kWidth / 2; i++) {
        Matrix<T> values;
        elements(values) = vec<T, 2>(run.v[2 * i], run.v[2 * i + 1]);
        thread Matrix<float>& sum = out[m * STRIDE + BEGIN / 8 + i];
        simdgroup_multiply_accumulate(sum, weights[m], values, sum);
      }
    }
    Rest::template multiply<EDGE, ROW_TILES, STRIDE>(weights, key, live, at, out);
  }

  // Values that are not finite go to the rows that see their key, and are 0 from now on.
  template <int ROW_TILES, int STRIDE>
  static void split_off(thread Matrix<float> (&weights)[ROW_TILES], thread Run<T, kWidth>& run,
                        thread Matrix<float>* out) {
    bool found = false;
#pragma clang loop unroll(full)
    for (int i = 0; i < kWidth; i++) {
      found = found || is_not_finite(float(run.v[i]));
    }
    if (!simd_any(found)) {
      return;
    }
#pragma clang loop unroll(full)
    for (int i = 0; i < kWidth / 2; i++) {
      const float2 two = float2(float(run.v[2 * i]), float(run.v[2 * i + 1]));
      Matrix<float> codes;
      elements(codes) = float2(code_of(two.x), code_of(two.y));
      run.v[2 * i] = is_not_finite(two.x) ? T(0.0f) : run.v[2 * i];
      run.v[2 * i + 1] = is_not_finite(two.y) ? T(0.0f) : run.v[2 * i + 1];
#pragma clang loop unroll(full)
      for (int m = 0; m < ROW_TILES; m++) {
        const float2 weight = elements(weights[m]);
        Matrix<float> sees, sum(0);
        elements(sees) = float2(!is_no_weight(weight.x), !is_no_weight(weight.y));
        simdgroup_multiply_accumulate(sum, sees, codes, sum);
        const float2 seen = elements(sum);
        elements(out[m * STRIDE + BEGIN / 8 + i]) += float2(decoded(seen.x), decoded(seen.y));
      }
    }
  }

  // take(column, values): the lane's kWidth columns of each run of one row.
  template <typename Take>
  static void each(thread Matrix<float>* row, LanePlace at, thread const Take& take) {
    float values[kWidth];
#pragma clang loop unroll(full)
    for (int i = 0; i < kWidth / 2; i++) {
      const float2 two = elements(row[BEGIN / 8 + i]);
      values[2 * i] = two.x;
      values[2 * i + 1] = two.y;
    }
    take(BEGIN + kWidth * (at.column / 2), values);
    Rest::each(row, at, take);
  }
};

template <typename T, int DV, int BEGIN>
struct ColumnRuns<T, DV, BEGIN, false> {
  template <bool EDGE, int ROW_TILES, int STRIDE>
  static void multiply(thread Matrix<float> (&)[ROW_TILES], const device T*, bool, LanePlace,
                       thread Matrix<float>*) {}

  template <typename Take>
  static void each(thread Matrix<float>*, LanePlace, thread const Take&) {}
};

} // namespace paged_mlx

#endif
