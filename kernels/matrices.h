// 8x8 matrices of a simdgroup, fed by wide loads.
//
// A lane holds elements (row, column) and (row, column + 1) of every matrix. In
// Q K^T the order of the dims is free as long as Q and K agree, so a lane takes
// one run of W dims of a key and spreads it over W matrices; in P V the order
// of the columns is free until the result is stored.
#ifndef PAGED_MLX_MATRICES_H
#define PAGED_MLX_MATRICES_H

#include "numbers.h"

namespace paged_mlx {

template <typename T>
using Matrix = simdgroup_matrix<T, 8, 8>;

template <typename T>
inline thread vec<T, 2>& elements(thread Matrix<T>& matrix) {
  return reinterpret_cast<thread vec<T, 2>&>(matrix.thread_elements());
}

// Where a lane's elements lie.
struct LanePlace {
  short row, column;

  explicit LanePlace(short lane)
      : row((lane & 16) / 4 + (lane & 6) / 2), column((lane & 8) / 2 + (lane & 1) * 2) {}
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

// The dims [BEGIN, D) of Q K^T, in runs of 8 lanes x kWidth dims. Matrix i of a
// run holds the dims BEGIN + kWidth * lane + i.
template <typename T, int D, int BEGIN = 0, bool MORE = (BEGIN < D)>
struct DimRuns {
  enum { kWidth = run_width<T>(D - BEGIN, 8), kNext = BEGIN + 8 * kWidth };
  typedef DimRuns<T, D, kNext> Rest;

  // The lane's part of a row of Q, as the matrices q[BEGIN / 8 ...].
  static void load_query(const device T* row, LanePlace at, thread Matrix<T>* q) {
    Run<T, kWidth> first, second;
    first.load(row + BEGIN + kWidth * at.column);
    second.load(row + BEGIN + kWidth * (at.column + 1));
#pragma clang loop unroll(full)
    for (int i = 0; i < kWidth; i++) {
      elements(q[BEGIN / 8 + i]) = vec<T, 2>(first.v[i], second.v[i]);
    }
    Rest::load_query(row, at, q);
  }

  // scores[m] += Q[m] . K^T for 8 keys; the lane reads the dims of its row for
  // the two keys of its columns. A key that is not live counts as 0, unread.
  template <int ROW_TILES, typename Queries>
  static void multiply(
      thread const Queries& queries,
      const device T* first_key,
      const device T* second_key,
      bool first_live,
      bool second_live,
      LanePlace at,
      thread Matrix<float>* scores) {
    Run<T, kWidth> first, second;
    load(first, first_key, first_live, at);
    load(second, second_key, second_live, at);
    typename Queries::template Part<kWidth, BEGIN> part(queries);
#pragma clang loop unroll(full)
    for (int i = 0; i < kWidth; i++) {
      Matrix<T> keys;
      elements(keys) = vec<T, 2>(first.v[i], second.v[i]);
#pragma clang loop unroll(full)
      for (int m = 0; m < ROW_TILES; m++) {
        simdgroup_multiply_accumulate(scores[m], part.matrix(m, i), keys, scores[m]);
      }
    }
    Rest::template multiply<ROW_TILES>(
        queries, first_key, second_key, first_live, second_live, at, scores);
  }

  static void load(thread Run<T, kWidth>& run, const device T* key, bool live, LanePlace at) {
    if (live) {
      run.load(key + BEGIN + kWidth * at.row);
    } else {
      run.clear();
    }
  }
};

template <typename T, int D, int BEGIN>
struct DimRuns<T, D, BEGIN, false> {
  static void load_query(const device T*, LanePlace, thread Matrix<T>*) {}

  template <int ROW_TILES, typename Queries>
  static void multiply(
      thread const Queries&,
      const device T*,
      const device T*,
      bool,
      bool,
      LanePlace,
      thread Matrix<float>*) {}
};

// The columns [BEGIN, DV) of P V, in runs of 4 lanes x kWidth columns. Matrix i
// of a run holds a lane's columns BEGIN + kWidth * (at.column / 2) + 2 i, + 1.
template <typename T, int DV, int BEGIN = 0, bool MORE = (BEGIN < DV)>
struct ColumnRuns {
  enum { kWidth = run_width<T>(DV - BEGIN, 4), kNext = BEGIN + 4 * kWidth };
  typedef ColumnRuns<T, DV, kNext> Rest;

  // out[m, columns] += weights[m] . V for 8 keys; the lane reads the row of its
  // key. STRIDE: matrices from one m to the next, in weights and in out.
  template <int ROW_TILES, int WEIGHTS_STRIDE, int OUT_STRIDE>
  static void multiply(
      thread Matrix<float>* weights,
      const device T* key,
      bool live,
      LanePlace at,
      thread Matrix<float>* out) {
    Run<T, kWidth> run;
    if (live) {
      run.load(key + BEGIN + kWidth * (at.column / 2));
    } else {
      run.clear();
    }
#pragma clang loop unroll(full)
    for (int i = 0; i < kWidth / 2; i++) {
      Matrix<T> values;
      elements(values) = vec<T, 2>(run.v[2 * i], run.v[2 * i + 1]);
#pragma clang loop unroll(full)
      for (int m = 0; m < ROW_TILES; m++) {
        thread Matrix<float>& sum = out[m * OUT_STRIDE + BEGIN / 8 + i];
        simdgroup_multiply_accumulate(sum, weights[m * WEIGHTS_STRIDE], values, sum);
      }
    }
    Rest::template multiply<ROW_TILES, WEIGHTS_STRIDE, OUT_STRIDE>(weights, key, live, at, out);
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
  template <int ROW_TILES, int WEIGHTS_STRIDE, int OUT_STRIDE>
  static void multiply(
      thread Matrix<float>*,
      const device T*,
      bool,
      LanePlace,
      thread Matrix<float>*) {}

  template <typename Take>
  static void each(thread Matrix<float>*, LanePlace, thread const Take&) {}
};

} // namespace paged_mlx

#endif
