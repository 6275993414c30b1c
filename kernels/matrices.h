// 8x8 matrices of a simdgroup, fed by wide loads.
//
// A lane holds elements (row, column) and (row, column + 1) of every matrix. In
// Q K^T the order of the dims is free as long as Q and K agree, so a lane takes
// one run of W dims of a key and spreads it over W matrices; in P V the order
// of the columns is free until the result is stored.
#ifndef PAGED_MLX_MATRICES_H
#define PAGED_MLX_MATRICES_H

#include "numbers.h"
#include "page_formats.h"
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
template <typename Stored>
struct KeyPair {
  const device Stored* first;
  const device Stored* second;
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

// Whether Q K^T is a loop over runs of one width. Long rows of codes, unrolled, would not stay
// in the instruction cache.
template <typename Rows, int D>
constexpr bool rolls_dims() {
  return Rows::kHasTokenScales ? D > 128 : Rows::kHasChannelScales && D > 256 && D % 128 == 0;
}

// Dims that a lane takes of a run of Q K^T that begins at dim `begin`.
template <typename Rows, int D>
constexpr int dims_of_lane(int begin) {
  return Rows::width(rolls_dims<Rows, D>() && D % 128 == 0 ? 128 : D - begin, 8, 8);
}

// The dims [BEGIN, D) of Q K^T, in runs of 8 lanes x kWidth dims. Matrix i of a
// run holds the dims BEGIN + kWidth * lane + i. In threadgroup memory the runs of
// Q's matrices follow each other; of a run, the elements of a lane stand together.
template <typename Rows, typename T, int D, int BEGIN = 0, bool MORE = (BEGIN < D)>
struct DimRuns {
  enum {
    kWidth = dims_of_lane<Rows, D>(BEGIN),
    kNext = BEGIN + 8 * kWidth,
    kStaged = Rows::kIsCoded && kWidth > 4 ? 4 : kWidth,       // matrices of Q at a time
    kGroup = Rows::kHasTokenScales ? BEGIN / Rows::kGroup : 0, // of the run
    kAtATime = D == 256 ? 2 : 1                                // runs of a loop
  };
  typedef DimRuns<Rows, T, D, kNext> Rest;
  typedef typename Rows::Stored Stored;
  typedef typename Rows::template Elements<kWidth> Elements;

  // The lane's elements of eight rows of Q; `row` is the row of the lane. sums: of the
  // elements of each group of channels, kRows apart.
  template <int ROWS>
  static void stage(const device T* row, LanePlace at, threadgroup T* q, threadgroup float* sums) {
    T first[kWidth], second[kWidth];
    load_elements<kWidth>(row + BEGIN + kWidth * at.column, first);
    load_elements<kWidth>(row + BEGIN + kWidth * (at.column + 1), second);
    threadgroup vec<T, 2>* to =
        reinterpret_cast<threadgroup vec<T, 2>*>(q + 8 * BEGIN + 2 * kWidth * at.lane);
#pragma clang loop unroll(full)
    for (int i = 0; i < kWidth; i++) {
      to[i] = vec<T, 2>(first[i], second[i]);
    }
    if (Rows::kHasTokenScales) {
      float sum = 0;
#pragma clang loop unroll(full)
      for (int i = 0; i < kWidth; i++) {
        sum += float(first[i]) + float(second[i]);
      }
      sum = row_sum(sum);
      if (at.column == 0) {
        sums[ROWS * kGroup + at.row] = sum;
      }
    }
    Rest::template stage<ROWS>(row, at, q, sums);
  }

  // scores[m][g] += Q[m] . K[g]^T for GROUPS groups of eight keys; the lane reads the
  // dims of its row for the two keys of its columns. q_sums: see stage, at the lane's row.
  template <int ROW_TILES, int GROUPS, typename Q, typename Scales>
  static void multiply(const threadgroup Q* q, const threadgroup float* q_sums,
                       thread const KeyPair<Stored> (&pairs)[GROUPS], LanePlace at,
                       thread const Scales& scales,
                       thread Matrix<float> (&scores)[ROW_TILES][GROUPS]) {
    if (rolls_dims<Rows, D>()) {
#pragma clang loop unroll(disable)
      for (int begin = 0; begin < D; begin += kAtATime * 8 * kWidth) {
#pragma clang loop unroll(full)
        for (int i = 0; i < kAtATime; i++) {
          multiply_run(begin + i * 8 * kWidth, q, q_sums, pairs, at, scales, scores);
        }
      }
    } else {
      multiply_run(BEGIN, q, q_sums, pairs, at, scales, scores);
      Rest::multiply(q, q_sums, pairs, at, scales, scores);
    }
  }

  // Of the run that begins at dim `begin`.
  template <int ROW_TILES, int GROUPS, typename Q, typename Scales>
  static void multiply_run(int begin, const threadgroup Q* q, const threadgroup float* q_sums,
                           thread const KeyPair<Stored> (&pairs)[GROUPS], LanePlace at,
                           thread const Scales& scales,
                           thread Matrix<float> (&scores)[ROW_TILES][GROUPS]) {
    Elements first[GROUPS], second[GROUPS];
#pragma clang loop unroll(full)
    for (int g = 0; g < GROUPS; g++) {
      first[g].load_if(pairs[g].first_live, pairs[g].first, begin, kWidth * at.row);
      second[g].load_if(pairs[g].second_live, pairs[g].second, begin, kWidth * at.row);
    }
    if (Rows::kHasTokenScales) {
      Matrix<float> sums[ROW_TILES][GROUPS];
#pragma clang loop unroll(full)
      for (int m = 0; m < ROW_TILES; m++) {
#pragma clang loop unroll(full)
        for (int g = 0; g < GROUPS; g++) {
          sums[m][g] = Matrix<float>(0);
        }
      }
      accumulate(begin, q, first, second, at, sums);
      scale(begin / Rows::kGroup, q_sums, at, scales, sums, scores);
    } else {
      accumulate(begin, q, first, second, at, scores);
    }
  }

  // Codes become numbers as they are multiplied, once for all row tiles.
  template <int ROW_TILES, int GROUPS, typename Q>
  static void accumulate(int begin, const threadgroup Q* q, thread const Elements (&first)[GROUPS],
                         thread const Elements (&second)[GROUPS], LanePlace at,
                         thread Matrix<float> (&sums)[ROW_TILES][GROUPS]) {
    constexpr int kTiles = Rows::kIsCoded ? ROW_TILES : 1; // at a time
#pragma clang loop unroll(full)
    for (int m = 0; m < ROW_TILES; m += kTiles) {
#pragma clang loop unroll(full)
      for (int part = 0; part < kWidth; part += kStaged) {
        StagedMatrices<Q, kStaged> staged[kTiles];
#pragma clang loop unroll(full)
        for (int t = 0; t < kTiles; t++) {
          staged[t].load(q + 8 * ((m + t) * D + begin) + 2 * (kWidth * at.lane + part));
        }
#pragma clang loop unroll(full)
        for (int i = 0; i < kStaged; i++) {
#pragma clang loop unroll(full)
          for (int g = 0; g < GROUPS; g++) {
            Matrix<T> keys;
            elements(keys) = vec<T, 2>(first[g].get(part + i), second[g].get(part + i));
#pragma clang loop unroll(full)
            for (int t = 0; t < kTiles; t++) {
              Matrix<Q> rows;
              elements(rows) = staged[t].elements_of(i);
              simdgroup_multiply_accumulate(sums[m + t][g], rows, keys, sums[m + t][g]);
            }
          }
        }
      }
    }
  }

  // From dot products with codes of one group of channels to what they add to the scores.
  template <int ROW_TILES, int GROUPS, typename Scales>
  static void scale(int group, const threadgroup float* q_sums, LanePlace at,
                    thread const Scales& scales, thread Matrix<float> (&sums)[ROW_TILES][GROUPS],
                    thread Matrix<float> (&scores)[ROW_TILES][GROUPS]) {
#pragma clang loop unroll(full)
    for (int g = 0; g < GROUPS; g++) {
      const float2 first = scales.template of<Rows::kBits>(8 * g + at.column, group);
      const float2 second = scales.template of<Rows::kBits>(8 * g + at.column + 1, group);
#pragma clang loop unroll(full)
      for (int m = 0; m < ROW_TILES; m++) {
        const float q_sum = q_sums[8 * (group * ROW_TILES + m)];
        const float2 two = elements(sums[m][g]);
        elements(scores[m][g]) +=
            float2(first.x * two.x + first.y * q_sum, second.x * two.y + second.y * q_sum);
      }
    }
  }
};

template <typename Rows, typename T, int D, int BEGIN>
struct DimRuns<Rows, T, D, BEGIN, false> {
  typedef typename Rows::Stored Stored;

  template <int ROWS>
  static void stage(const device T*, LanePlace, threadgroup T*, threadgroup float*) {}

  template <int ROW_TILES, int GROUPS, typename Q, typename Scales>
  static void multiply(const threadgroup Q*, const threadgroup float*,
                       thread const KeyPair<Stored> (&)[GROUPS], LanePlace, thread const Scales&,
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
template <typename Rows, typename T, int DV, int BEGIN = 0, bool MORE = (BEGIN < DV)>
struct ColumnRuns {
  enum { kWidth = Rows::width(DV - BEGIN, 4, 4), kNext = BEGIN + 4 * kWidth };
  typedef ColumnRuns<Rows, T, DV, kNext> Rest;
  typedef typename Rows::Stored Stored;
  typedef typename Rows::template Elements<kWidth> Elements;

  // out[m * STRIDE, columns] += weights[m] . V for 8 keys; the lane reads the row of
  // its key, from the first of the columns on. EDGE as in Scoring; codes are finite.
  template <bool EDGE, int ROW_TILES, int STRIDE>
  static void multiply(thread Matrix<float> (&weights)[ROW_TILES], const device Stored* key,
                       bool live, LanePlace at, thread Matrix<float>* out) {
    Elements run;
    run.load_if(live, key, BEGIN, kWidth * (at.column / 2));
    if (EDGE) {
      split_off<ROW_TILES, STRIDE>(weights, run, out);
    }
#pragma clang loop unroll(full)
    for (int m = 0; m < ROW_TILES; m++) {
#pragma clang loop unroll(full)
      for (int i = 0; i < kWidth / 2; i++) {
        Matrix<T> values;
        elements(values) = vec<T, 2>(run.get(2 * i), run.get(2 * i + 1));
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

  template <int ROW_TILES, int STRIDE, int BITS>
  static void split_off(thread Matrix<float> (&)[ROW_TILES], thread CodeRun<T, BITS, kWidth>&,
                        thread Matrix<float>*) {}

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

template <typename Rows, typename T, int DV, int BEGIN>
struct ColumnRuns<Rows, T, DV, BEGIN, false> {
  template <bool EDGE, int ROW_TILES, int STRIDE>
  static void multiply(thread Matrix<float> (&)[ROW_TILES], const device typename Rows::Stored*,
                       bool, LanePlace, thread Matrix<float>*) {}

  template <typename Take>
  static void each(thread Matrix<float>*, LanePlace, thread const Take&) {}
};

} // namespace paged_mlx

#endif
