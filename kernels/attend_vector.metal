// Attention of 1 or 2 rows against a run of pages: decode without a head group.
//
// Buffers and macros as in attend_tile.metal; ROWS is 1 or 2.
//
// Grid: one threadgroup per (KV head, item). Each simdgroup owns a run of the
// item's keys and reads each of their K and V rows once; after a barrier the
// simdgroups' states are merged.
//
// kLanes lanes share a key, the fewer the shorter its row. A step is four loads of
// the simdgroup. The partial dot products of a key are summed over its lanes so that
// each lane of a quad gets the score of one of the four loads.

#include "attend_parameters.h"
#include "merge_simdgroups.h"
#include "page_walk.h"
#include "scores.h"
#include "softmax.h"

namespace paged_mlx {

// The part that a lane has of every row that it reads: the elements [BEGIN, N) in
// runs of LANES x kWidth, kept from BEGIN / LANES on.
template <typename T, int N, int LANES, int BEGIN = 0, bool MORE = (BEGIN < N)>
struct LaneRuns {
  enum { kWidth = run_width<T>(N - BEGIN, LANES), kNext = BEGIN + LANES * kWidth };
  enum { kAt = BEGIN / LANES };
  typedef LaneRuns<T, N, LANES, kNext> Rest;

  static void load(const device T* row, short part, thread T* to) {
    Run<T, kWidth> run;
    run.load(row + BEGIN + kWidth * part);
#pragma clang loop unroll(full)
    for (int i = 0; i < kWidth; i++) {
      to[kAt + i] = run.v[i];
    }
    Rest::load(row, part, to);
  }

  // sums[r] += q[r] . key
  template <int ROWS>
  static void dot(const device T* key, short part, thread const T (&q)[ROWS][N / LANES],
                  thread float (&sums)[ROWS]) {
    Run<T, kWidth> run;
    run.load(key + BEGIN + kWidth * part);
#pragma clang loop unroll(full)
    for (int i = 0; i < kWidth; i++) {
#pragma clang loop unroll(full)
      for (int r = 0; r < ROWS; r++) {
        sums[r] += float(q[r][kAt + i]) * float(run.v[i]);
      }
    }
    Rest::template dot<ROWS>(key, part, q, sums);
  }

  // out[r] += weights[r] * value, for the rows that see the key. EDGE as in Scoring.
  template <bool EDGE, int ROWS>
  static void add(const device T* value, short part, thread const float (&weights)[ROWS],
                  thread float (&out)[ROWS][N / LANES]) {
    Run<T, kWidth> run;
    run.load(value + BEGIN + kWidth * part);
#pragma clang loop unroll(full)
    for (int i = 0; i < kWidth; i++) {
#pragma clang loop unroll(full)
      for (int r = 0; r < ROWS; r++) {
        const bool hidden = EDGE && is_no_weight(weights[r]);
        out[r][kAt + i] += weights[r] * (hidden ? 0.0f : float(run.v[i]));
      }
    }
    Rest::template add<EDGE, ROWS>(value, part, weights, out);
  }

  // Stores the lane's elements that lie in [begin, begin + columns).
  static void put(thread const float* from, short part, int begin, int columns,
                  threadgroup float* window) {
    const int first = BEGIN + kWidth * part;
    if (first >= begin && first < begin + columns) {
#pragma clang loop unroll(full)
      for (int i = 0; i < kWidth; i++) {
        window[first - begin + i] = from[kAt + i];
      }
    }
    Rest::put(from, part, begin, columns, window);
  }
};

template <typename T, int N, int LANES, int BEGIN>
struct LaneRuns<T, N, LANES, BEGIN, false> {
  static void load(const device T*, short, thread T*) {}

  template <int ROWS>
  static void dot(const device T*, short, thread const T (&)[ROWS][N / LANES],
                  thread float (&)[ROWS]) {}

  template <bool EDGE, int ROWS>
  static void add(const device T*, short, thread const float (&)[ROWS],
                  thread float (&)[ROWS][N / LANES]) {}

  static void put(thread const float*, short, int, int, threadgroup float*) {}
};

template <typename T, int D, int DV, int ROWS>
struct VectorAttention {
  enum {
    kLanes = lanes_of_key(ROWS, D, DV),
    kKeys = 32 / kLanes, // of a load
    kStep = 4 * kKeys
  };

  thread const PageWalk& walk;
  thread const Scoring& scoring;
  const device T* k_pages;
  const device T* v_pages;
  short part, key; // of the lane: its part of a row, its key of a load
  QueryRow rows[ROWS];
  SoftmaxState states[ROWS]; // the sum: of this lane's keys
  T q[ROWS][D / kLanes];
  float out[ROWS][DV / kLanes];

  VectorAttention(thread const PageWalk& walk_, thread const Scoring& scoring_,
                  const device T* k_pages_, const device T* v_pages_, short lane)
      : walk(walk_),
        scoring(scoring_),
        k_pages(k_pages_),
        v_pages(v_pages_),
        part(lane % kLanes),
        key(lane / kLanes) {}

  void begin(const device T* queries, thread const RowReader& reader) {
#pragma clang loop unroll(full)
    for (int r = 0; r < ROWS; r++) {
      rows[r] = reader.read(r);
      const long row = long(rows[r].token) * reader.arguments.num_q_heads + rows[r].head;
      LaneRuns<T, D, kLanes>::load(queries + row * D, part, q[r]);
#pragma clang loop unroll(full)
      for (int i = 0; i < DV / kLanes; i++) {
        out[r][i] = 0;
      }
    }
  }

  // Slots [slot, slot + kStep), all of them seen by all rows.
  void whole_step(int slot) {
    RowWalk k_rows(walk, slot), v_rows(walk, slot);
    float sums[4][ROWS] = {}, weights[ROWS];
#pragma clang loop unroll(full)
    for (int t = 0; t < 4; t++) {
      const device T* row = k_pages + (k_rows.row(kKeys * t) + key) * D;
      LaneRuns<T, D, kLanes>::template dot<ROWS>(row, part, q, sums[t]);
    }
#pragma clang loop unroll(full)
    for (int r = 0; r < ROWS; r++) {
      weights[r] = over_key(of_quad(sums[0][r], sums[1][r], sums[2][r], sums[3][r]));
    }
    weigh<false>(slot + kKeys * (part % 4) + key, true, part < 4, weights);
#pragma clang loop unroll(full)
    for (int t = 0; t < 4; t++) {
      float own[ROWS];
#pragma clang loop unroll(full)
      for (int r = 0; r < ROWS; r++) {
        own[r] = quad_broadcast(weights[r], t);
      }
      const device T* row = v_pages + (v_rows.row(kKeys * t) + key) * DV;
      LaneRuns<T, DV, kLanes>::template add<false, ROWS>(row, part, own, out);
    }
  }

  // Slots [slot, slot + kKeys), of which any may be dead or hidden.
  void edge_step(int slot) {
    const int own = slot + key;
    const bool live = walk.is_live(own);
    const long row = walk.row(own);
    float weights[ROWS] = {};
    if (live) {
      LaneRuns<T, D, kLanes>::template dot<ROWS>(k_pages + row * D, part, q, weights);
    }
#pragma clang loop unroll(full)
    for (int r = 0; r < ROWS; r++) {
      weights[r] += simd_shuffle_xor(weights[r], 1);
      weights[r] += simd_shuffle_xor(weights[r], 2);
      weights[r] = over_key(weights[r]);
    }
    weigh<true>(own, live, part == 0, weights);
    if (live) {
      LaneRuns<T, DV, kLanes>::template add<true, ROWS>(v_pages + row * DV, part, weights, out);
    }
  }

  // Of four sums of each lane, lane i of a quad gets the quad's total of the i-th.
  float of_quad(float a, float b, float c, float d) const {
    const bool high = part & 2, odd = part & 1;
    const float even_sum = (high ? c : a) + simd_shuffle_xor(high ? a : c, 2);
    const float odd_sum = (high ? d : b) + simd_shuffle_xor(high ? b : d, 2);
    return (odd ? odd_sum : even_sum) + simd_shuffle_xor(odd ? even_sum : odd_sum, 1);
  }

  // Over the quads that share a key.
  static float over_key(float sum) {
#pragma clang loop unroll(full)
    for (int distance = 4; distance < kLanes; distance *= 2) {
      sum += simd_shuffle_xor(sum, distance);
    }
    return sum;
  }

  // Scores of the key of `slot` become its weights. counts: no lane before has the
  // same key.
  template <bool EDGE>
  void weigh(int slot, bool live, bool counts, thread float (&scores)[ROWS]) {
    const int position = walk.position(slot);
#pragma clang loop unroll(full)
    for (int r = 0; r < ROWS; r++) {
      const float score = live ? scoring.of<EDGE>(scores[r], rows[r], position) : kHidden;
      const float factor = states[r].raise(max(states[r].most, simd_max(score)));
      scores[r] = states[r].template weight<EDGE>(score);
      states[r].sum += counts ? scores[r] : 0.0f;
#pragma clang loop unroll(full)
      for (int i = 0; i < DV / kLanes; i++) {
        out[r][i] *= factor;
      }
    }
  }

  // Every lane gets the simdgroup's sums.
  void gather() {
#pragma clang loop unroll(full)
    for (int r = 0; r < ROWS; r++) {
      states[r].sum = simd_sum(states[r].sum);
#pragma clang loop unroll(full)
      for (int distance = kLanes; distance < 32; distance *= 2) {
#pragma clang loop unroll(full)
        for (int i = 0; i < DV / kLanes; i++) {
          out[r][i] += simd_shuffle_xor(out[r][i], distance);
        }
      }
    }
  }
};

} // namespace paged_mlx

using namespace paged_mlx;

[[kernel, max_total_threads_per_threadgroup(32 * PAGED_MLX_SIMDGROUPS)]] void attend_vector(
    PAGED_MLX_ATTEND_PARAMETERS, ushort num_simdgroups [[simdgroups_per_threadgroup]]) {
  constexpr int D = PAGED_MLX_D, DV = PAGED_MLX_DV, kRows = PAGED_MLX_ROWS;
  typedef PAGED_MLX_T T;
  typedef VectorAttention<T, D, DV, kRows> Vector;
  typedef SimdgroupMerge<PAGED_MLX_SIMDGROUPS, kRows, DV> Merge;
  threadgroup float values[Merge::kValues];
  threadgroup float merge_states[Merge::kStates];

  const device PlanItem& item =
      reinterpret_cast<const device PlanItem*>(plan + arguments.items)[group.y];
  const PageWalk walk(plan, item, arguments, group.x);
  const RowReader rows(plan, item, arguments, alibi_slopes, group.x);
  const Scoring scoring(arguments, mask);
  Vector vector(walk, scoring, k_pages, v_pages, lane);
  vector.begin(q, rows);

  const int2 seen = seen_by_all(vector.rows);
  const int2 slots = walk.slots(item.key_begin, item.key_end, Vector::kStep);
  const int count = (slots.y - slots.x) / Vector::kStep;
  const int end = slots.x + count * (simdgroup + 1) / num_simdgroups * Vector::kStep;
  for (int slot = slots.x + count * simdgroup / num_simdgroups * Vector::kStep; slot < end;
       slot += Vector::kStep) {
    if (walk.is_whole(slot, Vector::kStep, seen)) {
      vector.whole_step(slot);
    } else {
#pragma clang loop unroll(disable)
      for (int i = 0; i < Vector::kStep; i += Vector::kKeys) {
        vector.edge_step(slot + i);
      }
    }
  }

  vector.gather();
  const Merge merge{values, merge_states, num_simdgroups};
#pragma clang loop unroll(full)
  for (int r = 0; r < kRows; r++) {
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
      if (vector.key == 0) {
        threadgroup float* window = merge.value(simdgroup, r, 0);
        LaneRuns<T, DV, Vector::kLanes>::put(vector.out[r], vector.part, begin, Merge::kColumns,
                                             window);
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    merge.write_window(begin, rows, writer, thread_index, 32 * num_simdgroups);
  }
}
