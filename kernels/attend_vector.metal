// Attention of 1 or 2 rows against a run of pages: decode without a head group.
//
// Buffers, grid and macros as in attend_tile.metal; ROWS is 1 or 2. Eight lanes
// share a key, so a load of the simdgroup covers 16 bytes x 8 lanes of four keys;
// a step is 32 keys, of which a lane reads its part of eight. The eight partial
// dot products are summed over the lanes by a transposing butterfly that leaves
// each lane the score of one key.

#include "attend_parameters.h"
#include "merge_simdgroups.h"
#include "page_walk.h"
#include "scores.h"
#include "softmax.h"

namespace paged_mlx {

// Where a lane stands: its part of a row, and its key among four.
struct KeyLane {
  short part, key;

  explicit KeyLane(short lane) : part(lane & 7), key(lane >> 3) {}
};

// sums[t] of the eight lanes of a key, for eight t: lane `part` gets the total
// of t = part.
inline float transposed_sum(thread const float (&sums)[8], short part) {
  float four[4], two[2];
#pragma clang loop unroll(full)
  for (int i = 0; i < 4; i++) {
    const bool upper = part & 4;
    const float low = sums[i], high = sums[i + 4];
    four[i] = (upper ? high : low) + simd_shuffle_xor(upper ? low : high, 4);
  }
#pragma clang loop unroll(full)
  for (int i = 0; i < 2; i++) {
    const bool upper = part & 2;
    const float low = four[i], high = four[i + 2];
    two[i] = (upper ? high : low) + simd_shuffle_xor(upper ? low : high, 2);
  }
  const bool upper = part & 1;
  const float low = two[0], high = two[1];
  return (upper ? high : low) + simd_shuffle_xor(upper ? low : high, 1);
}

// The elements [BEGIN, N) of a row, in runs of 8 lanes x kWidth. A lane keeps
// its elements of run after run in an array, from BEGIN / 8 on.
template <typename T, int N, int BEGIN = 0, bool MORE = (BEGIN < N)>
struct LaneRuns {
  enum { kWidth = run_width<T>(N - BEGIN, 8), kNext = BEGIN + 8 * kWidth };
  typedef LaneRuns<T, N, kNext> Rest;

  static void load(const device T* row, short part, thread float* to) {
    Run<T, kWidth> run;
    run.load(row + BEGIN + kWidth * part);
#pragma clang loop unroll(full)
    for (int i = 0; i < kWidth; i++) {
      to[BEGIN / 8 + i] = float(run.v[i]);
    }
    Rest::load(row, part, to);
  }

  // sums[r] += q[r] . key
  template <int ROWS>
  static void dot(
      const device T* key,
      short part,
      thread const float (&q)[ROWS][N / 8],
      thread float (&sums)[ROWS]) {
    Run<T, kWidth> run;
    run.load(key + BEGIN + kWidth * part);
#pragma clang loop unroll(full)
    for (int i = 0; i < kWidth; i++) {
#pragma clang loop unroll(full)
      for (int r = 0; r < ROWS; r++) {
        sums[r] += q[r][BEGIN / 8 + i] * float(run.v[i]);
      }
    }
    Rest::template dot<ROWS>(key, part, q, sums);
  }

  // out[r] += weights[r] * value, for the rows that see the key. EDGE as in Scoring.
  template <bool EDGE, int ROWS>
  static void add(
      const device T* value,
      short part,
      thread const float (&weights)[ROWS],
      thread float (&out)[ROWS][N / 8]) {
    Run<T, kWidth> run;
    run.load(value + BEGIN + kWidth * part);
#pragma clang loop unroll(full)
    for (int i = 0; i < kWidth; i++) {
#pragma clang loop unroll(full)
      for (int r = 0; r < ROWS; r++) {
        const bool hidden = (EDGE || kHasMask) && is_no_weight(weights[r]);
        out[r][BEGIN / 8 + i] += weights[r] * (hidden ? 0.0f : float(run.v[i]));
      }
    }
    Rest::template add<EDGE, ROWS>(value, part, weights, out);
  }

  // Stores the lane's elements that lie in [begin, begin + columns).
  static void put(
      thread const float* from,
      short part,
      int begin,
      int columns,
      threadgroup float* window) {
    const int first = BEGIN + kWidth * part;
    if (first >= begin && first < begin + columns) {
#pragma clang loop unroll(full)
      for (int i = 0; i < kWidth; i++) {
        window[first - begin + i] = from[BEGIN / 8 + i];
      }
    }
    Rest::put(from, part, begin, columns, window);
  }
};

template <typename T, int N, int BEGIN>
struct LaneRuns<T, N, BEGIN, false> {
  static void load(const device T*, short, thread float*) {}

  template <int ROWS>
  static void dot(
      const device T*,
      short,
      thread const float (&)[ROWS][N / 8],
      thread float (&)[ROWS]) {}

  template <bool EDGE, int ROWS>
  static void add(
      const device T*,
      short,
      thread const float (&)[ROWS],
      thread float (&)[ROWS][N / 8]) {}

  static void put(thread const float*, short, int, int, threadgroup float*) {}
};

template <typename T, int D, int DV, int ROWS>
struct VectorAttention {
  thread const PageWalk& walk;
  thread const Scoring& scoring;
  const device T* k_pages;
  const device T* v_pages;
  KeyLane at;
  QueryRow rows[ROWS];
  SoftmaxState states[ROWS];
  float q[ROWS][D / 8];
  float out[ROWS][DV / 8];
  float weights[ROWS]; // scores before; of the lane's key of the step

  VectorAttention(
      thread const PageWalk& walk_,
      thread const Scoring& scoring_,
      const device T* k_pages_,
      const device T* v_pages_,
      short lane)
      : walk(walk_), scoring(scoring_), k_pages(k_pages_), v_pages(v_pages_), at(lane) {}

  void begin(const device T* queries, thread const RowReader& reader) {
#pragma clang loop unroll(full)
    for (int r = 0; r < ROWS; r++) {
      rows[r] = reader.read(r);
      const long row = long(rows[r].token) * reader.arguments.num_q_heads + rows[r].head;
      LaneRuns<T, D>::load(queries + row * D, at.part, q[r]);
#pragma clang loop unroll(full)
      for (int i = 0; i < DV / 8; i++) {
        out[r][i] = 0;
      }
    }
  }

  template <bool EDGE>
  void step(int slot) {
    dot<EDGE>(slot);
    score<EDGE>(slot + 4 * at.part + at.key);
    weigh<EDGE>();
    add_values<EDGE>(slot);
  }

  template <bool EDGE>
  void dot(int slot) {
    GroupWalk slots(walk, slot);
    float sums[ROWS][8];
#pragma clang loop unroll(full)
    for (int t = 0; t < 8; t++) {
      const int i = t % 2 * 4 + at.key;
      if (t % 2 == 0) {
        slots.enter(t / 2);
      }
      float sum[ROWS] = {};
      if (!EDGE || slots.is_live(i)) {
        LaneRuns<T, D>::template dot<ROWS>(k_pages + slots.row(i) * D, at.part, q, sum);
      }
#pragma clang loop unroll(full)
      for (int r = 0; r < ROWS; r++) {
        sums[r][t] = sum[r];
      }
    }
#pragma clang loop unroll(full)
    for (int r = 0; r < ROWS; r++) {
      weights[r] = transposed_sum(sums[r], at.part);
    }
  }

  template <bool EDGE>
  void score(int slot) {
    const int position = walk.position(slot);
    const bool live = !EDGE || walk.is_live(slot);
#pragma clang loop unroll(full)
    for (int r = 0; r < ROWS; r++) {
      weights[r] = live ? scoring.of<EDGE>(weights[r], rows[r], position) : kHidden;
    }
  }

  template <bool EDGE>
  void weigh() {
#pragma clang loop unroll(full)
    for (int r = 0; r < ROWS; r++) {
      const float factor = states[r].raise(max(states[r].most, simd_max(weights[r])));
      weights[r] = states[r].template weight<EDGE>(weights[r]);
      states[r].sum += weights[r];
#pragma clang loop unroll(full)
      for (int i = 0; i < DV / 8; i++) {
        out[r][i] *= factor;
      }
    }
  }

  template <bool EDGE>
  void add_values(int slot) {
    GroupWalk slots(walk, slot);
#pragma clang loop unroll(full)
    for (int t = 0; t < 8; t++) {
      const int i = t % 2 * 4 + at.key;
      if (t % 2 == 0) {
        slots.enter(t / 2);
      }
      float weight[ROWS];
#pragma clang loop unroll(full)
      for (int r = 0; r < ROWS; r++) {
        weight[r] = simd_shuffle(weights[r], 8 * at.key + t);
      }
      if (!EDGE || slots.is_live(i)) {
        const device T* value = v_pages + slots.row(i) * DV;
        LaneRuns<T, DV>::template add<EDGE, ROWS>(value, at.part, weight, out);
      }
    }
  }
};

} // namespace paged_mlx

using namespace paged_mlx;

[[kernel, max_total_threads_per_threadgroup(32 * PAGED_MLX_SIMDGROUPS)]] void attend_vector(
    PAGED_MLX_ATTEND_PARAMETERS,
    ushort num_simdgroups [[simdgroups_per_threadgroup]]) {
  constexpr int D = PAGED_MLX_D, DV = PAGED_MLX_DV, kRows = PAGED_MLX_ROWS;
  typedef PAGED_MLX_T T;
  typedef SimdgroupMerge<PAGED_MLX_SIMDGROUPS, 4, kRows, DV> Merge;
  threadgroup float values[Merge::kValues];
  threadgroup float merge_states[Merge::kStates];

  const device PlanItem& item =
      reinterpret_cast<const device PlanItem*>(plan + arguments.items)[group.y];
  const PageWalk walk(plan, item, arguments, group.x);
  const RowReader rows(plan, item, arguments, alibi_slopes, group.x);
  const Scoring scoring(arguments, mask);
  VectorAttention<T, D, DV, kRows> vector(walk, scoring, k_pages, v_pages, lane);
  vector.begin(q, rows);

  const int2 whole = seen_by_all(vector.rows);
  const int2 steps = walk.steps(item.key_begin, item.key_end, 32);
  const int count = steps.y - steps.x;
  const int end = steps.x + count * (simdgroup + 1) / num_simdgroups;
  for (int s = steps.x + count * simdgroup / num_simdgroups; s < end; s++) {
    const int first = walk.first_position + 32 * s;
    if (walk.all_live(32 * s, 32) && first >= whole.x && first + 32 <= whole.y) {
      vector.step<false>(32 * s);
    } else {
      vector.step<true>(32 * s);
    }
  }

  const Merge merge{values, merge_states, num_simdgroups};
#pragma clang loop unroll(full)
  for (int r = 0; r < kRows; r++) {
    vector.states[r].sum = simd_sum(vector.states[r].sum);
    if (lane == 0) {
      merge.put_state(simdgroup, r, vector.states[r]);
    }
  }
  const ResultWriter<T, DV> writer{
      out, lse, partial_out, partial_state, sinks, arguments.num_q_heads, item.partial};
  for (int begin = 0; begin < DV; begin += Merge::kColumns) {
    if (begin > 0) {
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
#pragma clang loop unroll(full)
    for (int r = 0; r < kRows; r++) {
      threadgroup float* window = merge.value(4 * simdgroup + vector.at.key, r, 0);
      LaneRuns<T, DV>::put(vector.out[r], vector.at.part, begin, Merge::kColumns, window);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    merge.write_window(begin, rows, writer, thread_index, 32 * num_simdgroups);
  }
}
