// The online softmax in base 2: a maximum, a sum of weights relative to it, and
// a weighted sum of values that the kernel keeps. Finished once, at the end.
//
// A NaN never looks like "saw nothing": maxima pass it over, weights and sums keep
// it, and only a sum of exactly 0 has seen nothing.
#ifndef PAGED_MLX_SOFTMAX_H
#define PAGED_MLX_SOFTMAX_H

#include "numbers.h"
#include "scores.h"

namespace paged_mlx {

struct SoftmaxState {
  float most = kLowest;
  float sum = 0;

  // Moves to a larger maximum. Returns the factor for what was summed before.
  float raise(float to) {
    const float factor = weight_at(most - to);
    most = to;
    sum *= factor;
    return factor;
  }

  // The weight of a score, kNoWeight when it is kHidden. EDGE as in Scoring.
  template <bool EDGE>
  float weight(float score) const {
    const float weight = weight_at(score - most);
    return EDGE && is_minus_infinity(score) ? kNoWeight : weight;
  }
};

// What turns a row's weighted sum of values into its result.
struct Finish {
  float factor;
  float lse;
};

// Nothing seen: factor 0, lse -inf, whatever the sink.
inline Finish finish(float most, float sum, float sink) {
  Finish f;
  f.factor = 0;
  f.lse = minus_infinity();
  if (sum != 0) {
    float scale = 1;
    if (kHasSinks) {
      const float score = natural_to_score(sink), top = max(most, score);
      scale = weight_at(most - top);
      sum = sum * scale + weight_at(score - top);
      most = top;
    }
    f.factor = scale / sum;
    f.lse = score_to_natural(most) + log2(sum) * kLn2;
  }
  return f;
}

// Where results go. A partial result is the sum of values as it is, float32,
// with its maximum and sum: o [num_partials, num_q_heads, DV], state
// [num_partials, num_q_heads, 2].
template <typename T, int DV>
struct ResultWriter {
  device T* out;
  device float* lse;
  device float* partial_out;
  device float* partial_state;
  const device float* sinks;
  int num_q_heads;
  int partial; // first slot of the item, -1: results are final

  float sink(int head) const {
    return kHasSinks ? sinks[head] : 0.0f;
  }

  long element(int token, int head) const {
    return long(token) * num_q_heads + head;
  }

  // `slot`: index of the token in the item.
  void write_state(int token, int head, int slot, float most, float sum) const {
    if (partial < 0) {
      lse[element(token, head)] = finish(most, sum, sink(head)).lse;
      return;
    }
    const long at = element(partial + slot, head);
    partial_state[2 * at] = most;
    partial_state[2 * at + 1] = sum;
  }

  template <typename U, int N>
  static void store(device U* to, thread const float (&values)[N], float factor) {
    constexpr int kWide = N % 4 == 0 ? 4 : 2;
#pragma clang loop unroll(full)
    for (int i = 0; i < N; i += kWide) {
      vec<U, kWide> wide;
#pragma clang loop unroll(full)
      for (int j = 0; j < kWide; j++) {
        wide[j] = U(values[i + j] * factor);
      }
      *reinterpret_cast<device vec<U, kWide>*>(to + i) = wide;
    }
  }

  // N values from `column` on.
  template <int N>
  void write_values(int token, int head, int slot, int column, float factor,
                    thread const float (&values)[N]) const {
    if (partial < 0) {
      store(out + element(token, head) * DV + column, values, factor);
    } else {
      store(partial_out + element(partial + slot, head) * DV + column, values, 1.0f);
    }
  }
};

} // namespace paged_mlx

#endif
