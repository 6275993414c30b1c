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
#include "page_formats.h"
#include "page_walk.h"
#include "scores.h"
#include "softmax.h"

namespace paged_mlx {

inline float over_quad(float sum) {
  sum += simd_shuffle_xor(sum, 1);
  return sum + simd_shuffle_xor(sum, 2);
}

// Of four sums of each lane, lane i of a quad gets the quad's total of the i-th.
inline float of_quad(short part, float a, float b, float c, float d) {
  const bool high = part & 2, odd = part & 1;
  const float even_sum = (high ? c : a) + simd_shuffle_xor(high ? a : c, 2);
  const float odd_sum = (high ? d : b) + simd_shuffle_xor(high ? b : d, 2);
  return (odd ? odd_sum : even_sum) + simd_shuffle_xor(odd ? even_sum : odd_sum, 1);
}

// The part that a lane has of every row that it reads: the elements [BEGIN, N) in
// runs of LANES x kWidth, kept from BEGIN / LANES on. A quad's part of a run lies in one
// group of channels. RUN: the runs before this one.
template <typename Rows, typename T, int N, int LANES, int BEGIN = 0, int RUN = 0,
          bool MORE = (BEGIN < N)>
struct LaneRuns {
  enum { kWidth = Rows::width(N - BEGIN, LANES, 4), kNext = BEGIN + LANES * kWidth };
  enum { kAt = BEGIN / LANES };
  typedef LaneRuns<Rows, T, N, LANES, kNext, RUN + 1> Rest;
  enum { kRuns = Rest::kRuns };
  typedef typename Rows::Stored Stored;
  typedef typename Rows::template Elements<kWidth> Elements;

  static void load(const device T* row, short part, thread T* to) {
    load_elements<kWidth>(row + BEGIN + kWidth * part, to + kAt);
    Rest::load(row, part, to);
  }

  // The sums of a row's elements that the quad has of each run.
  static void sum_up(thread const T* row, thread float* sums) {
    float sum = 0;
#pragma clang loop unroll(full)
    for (int i = 0; i < kWidth; i++) {
      sum += float(row[kAt + i]);
    }
    sums[RUN] = over_quad(sum);
    Rest::sum_up(row, sums);
  }

  // sums[r] += q[r] . key
  template <int ROWS, typename Q>
  static void dot(const device Stored* key, short part, thread const Q (&q)[ROWS][N / LANES],
                  thread float (&sums)[ROWS]) {
    dot_run(key, part, q, sums);
    Rest::dot(key, part, q, sums);
  }

  template <int ROWS, typename Q>
  static void dot_run(const device Stored* key, short part, thread const Q (&q)[ROWS][N / LANES],
                      thread float (&sums)[ROWS]) {
    Elements run;
    run.load(key, BEGIN, kWidth * part);
#pragma clang loop unroll(full)
    for (int i = 0; i < kWidth; i++) {
#pragma clang loop unroll(full)
      for (int r = 0; r < ROWS; r++) {
        sums[r] += float(q[r][kAt + i]) * float(run.get(i));
      }
    }
  }

  // The group of channels that the quad's part of this run lies in.
  static int group(short part) {
    return (BEGIN + 4 * kWidth * (part / 4)) / Rows::kGroup;
  }

  // The quad's part of the scores of four keys, where a token's channels have scales: lane
  // i of a quad gets that of the i-th key, whose scales are at `scales`. q_sums: see sum_up.
  template <int ROWS>
  static void score(thread const long (&keys)[4], const device Stored* pages, long scales,
                    PageScales<T> side, short part, thread const T (&q)[ROWS][N / LANES],
                    thread const float (&q_sums)[ROWS][kRuns], thread float (&scores)[ROWS]) {
    float sums[4][ROWS] = {};
#pragma clang loop unroll(full)
    for (int t = 0; t < 4; t++) {
      dot_run(Rows::template at<N>(pages, keys[t]), part, q, sums[t]);
    }
    const long at = scales + group(part);
    const float2 scale = of_numbers<Rows::kBits>(side.scales[at], side.biases[at]);
#pragma clang loop unroll(full)
    for (int r = 0; r < ROWS; r++) {
      const float sum = of_quad(part, sums[0][r], sums[1][r], sums[2][r], sums[3][r]);
      scores[r] += scale.x * sum + scale.y * q_sums[r][RUN];
    }
    Rest::score(keys, pages, scales, side, part, q, q_sums, scores);
  }

  // The same of one key, for all lanes of the quad.
  template <int ROWS>
  static void score_one(bool live, const device Stored* key, long scales, PageScales<T> side,
                        short part, thread const T (&q)[ROWS][N / LANES],
                        thread const float (&q_sums)[ROWS][kRuns], thread float (&scores)[ROWS]) {
    float sums[ROWS] = {};
    float2 scale = 0;
    if (live) {
      dot_run(key, part, q, sums);
      const long at = scales + group(part);
      scale = of_numbers<Rows::kBits>(side.scales[at], side.biases[at]);
    }
#pragma clang loop unroll(full)
    for (int r = 0; r < ROWS; r++) {
      scores[r] += scale.x * over_quad(sums[r]) + scale.y * q_sums[r][RUN];
    }
    Rest::score_one(live, key, scales, side, part, q, q_sums, scores);
  }

  // to = q * scale of each channel; biases[r] += q[r] . bias.
  template <int ROWS>
  static void scale_by_channel(PageScales<T> channels, short part,
                               thread const T (&q)[ROWS][N / LANES],
                               thread float (&to)[ROWS][N / LANES], thread float (&biases)[ROWS]) {
    T scales[kWidth], channel_biases[kWidth];
    load_elements<kWidth>(channels.scales + BEGIN + kWidth * part, scales);
    load_elements<kWidth>(channels.biases + BEGIN + kWidth * part, channel_biases);
#pragma clang loop unroll(full)
    for (int r = 0; r < ROWS; r++) {
#pragma clang loop unroll(full)
      for (int i = 0; i < kWidth; i++) {
        const float2 scale = of_numbers<Rows::kBits>(scales[i], channel_biases[i]);
        to[r][kAt + i] = float(q[r][kAt + i]) * scale.x;
        biases[r] += float(q[r][kAt + i]) * scale.y;
      }
    }
    Rest::scale_by_channel(channels, part, q, to, biases);
  }

  // out[r] += weights[r] * value, for the rows that see the key. EDGE as in Scoring.
  template <bool EDGE, int ROWS>
  static void add(const device Stored* value, short part, thread const float (&weights)[ROWS],
                  thread float (&out)[ROWS][N / LANES]) {
    add_run<EDGE>(value, part, weights, out);
    Rest::template add<EDGE>(value, part, weights, out);
  }

  template <bool EDGE, int ROWS>
  static void add_run(const device Stored* value, short part, thread const float (&weights)[ROWS],
                      thread float (&out)[ROWS][N / LANES]) {
    Elements run;
    run.load(value, BEGIN, kWidth * part);
#pragma clang loop unroll(full)
    for (int i = 0; i < kWidth; i++) {
#pragma clang loop unroll(full)
      for (int r = 0; r < ROWS; r++) {
        const bool hidden = EDGE && !Rows::kIsCoded && is_no_weight(weights[r]);
        out[r][kAt + i] += weights[r] * (hidden ? 0.0f : float(run.get(i)));
      }
    }
  }

  // The same of four keys, where a token's channels have scales: lane i of a quad has the
  // weights of the i-th key, whose scales are at `scales`. biases[r] += weight * bias.
  template <int ROWS>
  static void add_scaled(thread const long (&values)[4], const device Stored* pages, long scales,
                         PageScales<T> side, short part, thread const float (&weights)[ROWS],
                         thread float (&biases)[ROWS][kRuns],
                         thread float (&out)[ROWS][N / LANES]) {
    const long at = scales + group(part);
    const float2 scale = of_numbers<Rows::kBits>(side.scales[at], side.biases[at]);
#pragma clang loop unroll(full)
    for (int t = 0; t < 4; t++) {
      float own[ROWS];
#pragma clang loop unroll(full)
      for (int r = 0; r < ROWS; r++) {
        own[r] = quad_broadcast(weights[r] * scale.x, t);
      }
      add_run<false>(Rows::template at<N>(pages, values[t]), part, own, out);
    }
#pragma clang loop unroll(full)
    for (int r = 0; r < ROWS; r++) {
      biases[r][RUN] += weights[r] * scale.y;
    }
    Rest::add_scaled(values, pages, scales, side, part, weights, biases, out);
  }

  // Of one live key, whose weights all lanes of the quad have; the first counts its bias.
  template <int ROWS>
  static void add_scaled_one(const device Stored* value, long scales, PageScales<T> side,
                             short part, thread const float (&weights)[ROWS],
                             thread float (&biases)[ROWS][kRuns],
                             thread float (&out)[ROWS][N / LANES]) {
    const long at = scales + group(part);
    const float2 scale = of_numbers<Rows::kBits>(side.scales[at], side.biases[at]);
    float own[ROWS];
#pragma clang loop unroll(full)
    for (int r = 0; r < ROWS; r++) {
      const bool hidden = is_no_weight(weights[r]);
      own[r] = hidden ? 0.0f : weights[r] * scale.x;
      biases[r][RUN] += hidden || part % 4 != 0 ? 0.0f : weights[r] * scale.y;
    }
    add_run<false>(value, part, own, out);
    Rest::add_scaled_one(value, scales, side, part, weights, biases, out);
  }

  // The quad's sums of weight * bias join the sums of values.
  static void add_biases(thread const float* biases, thread float* out) {
    const float bias = over_quad(biases[RUN]);
#pragma clang loop unroll(full)
    for (int i = 0; i < kWidth; i++) {
      out[kAt + i] += bias;
    }
    Rest::add_biases(biases, out);
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

template <typename Rows, typename T, int N, int LANES, int BEGIN, int RUN>
struct LaneRuns<Rows, T, N, LANES, BEGIN, RUN, false> {
  enum { kRuns = RUN };
  typedef typename Rows::Stored Stored;

  static void load(const device T*, short, thread T*) {}
  static void sum_up(thread const T*, thread float*) {}

  template <int ROWS, typename Q>
  static void dot(const device Stored*, short, thread const Q (&)[ROWS][N / LANES],
                  thread float (&)[ROWS]) {}

  template <int ROWS>
  static void score(thread const long (&)[4], const device Stored*, long, PageScales<T>, short,
                    thread const T (&)[ROWS][N / LANES], thread const float (&)[ROWS][RUN],
                    thread float (&)[ROWS]) {}

  template <int ROWS>
  static void score_one(bool, const device Stored*, long, PageScales<T>, short,
                        thread const T (&)[ROWS][N / LANES], thread const float (&)[ROWS][RUN],
                        thread float (&)[ROWS]) {}

  template <int ROWS>
  static void scale_by_channel(PageScales<T>, short, thread const T (&)[ROWS][N / LANES],
                               thread float (&)[ROWS][N / LANES], thread float (&)[ROWS]) {}

  template <bool EDGE, int ROWS>
  static void add(const device Stored*, short, thread const float (&)[ROWS],
                  thread float (&)[ROWS][N / LANES]) {}

  template <int ROWS>
  static void add_scaled(thread const long (&)[4], const device Stored*, long, PageScales<T>, short,
                         thread const float (&)[ROWS], thread float (&)[ROWS][RUN],
                         thread float (&)[ROWS][N / LANES]) {}

  template <int ROWS>
  static void add_scaled_one(const device Stored*, long, PageScales<T>, short,
                             thread const float (&)[ROWS], thread float (&)[ROWS][RUN],
                             thread float (&)[ROWS][N / LANES]) {}

  static void add_biases(thread const float*, thread float*) {}
  static void put(thread const float*, short, int, int, threadgroup float*) {}
};

template <typename T, int D, int DV, int ROWS>
struct VectorAttention {
  enum {
    kLanes = lanes_of_key(ROWS, D, DV),
    kKeys = 32 / kLanes, // of a load
    kStep = 4 * kKeys
  };
  typedef PageRows<T, PAGED_MLX_K_FORMAT, group_size(D)> KRows;
  typedef PageRows<T, PAGED_MLX_V_FORMAT, group_size(DV)> VRows;
  typedef LaneRuns<KRows, T, D, kLanes> KRuns;
  typedef LaneRuns<VRows, T, DV, kLanes> VRuns;
  enum {
    kPageStep = KRows::kHasChannelScales ? int(kStep) : 1, // may not cross pages
    kKGroups = D / KRows::kGroup,                          // of a token's channels
    kVGroups = DV / VRows::kGroup
  };
  typedef PageWalk<kPageStep> Walk;

  thread const Walk& walk;
  thread const Scoring& scoring;
  const device typename KRows::Stored* k_pages;
  const device typename VRows::Stored* v_pages;
  PageScales<T> k_scales, v_scales;
  short part, key; // of the lane: its part of a row, its key of a load
  QueryRow rows[ROWS];
  SoftmaxState states[ROWS]; // the sum: of this lane's keys
  T q[ROWS][D / kLanes];
  float out[ROWS][DV / kLanes];
  float q_sums[ROWS][KRuns::kRuns];     // where a token's channels have scales
  float out_biases[ROWS][VRuns::kRuns]; // sums of weight * bias, of this lane's keys
  int page;                             // whose scales are in scaled_q
  float scaled_q[ROWS][D / kLanes];     // q times the scales of the page's channels
  float q_biases[ROWS];                 // the lane's part of q . bias

  VectorAttention(thread const Walk& walk_, thread const Scoring& scoring_,
                  const device typename KRows::Stored* k_pages_,
                  const device typename VRows::Stored* v_pages_, PageScales<T> k_scales_,
                  PageScales<T> v_scales_, short lane)
      : walk(walk_),
        scoring(scoring_),
        k_pages(k_pages_),
        v_pages(v_pages_),
        k_scales(k_scales_),
        v_scales(v_scales_),
        part(lane % kLanes),
        key(lane / kLanes),
        page(-1) {}

  void begin(const device T* queries, thread const RowReader& reader) {
#pragma clang loop unroll(full)
    for (int r = 0; r < ROWS; r++) {
      rows[r] = reader.read(r);
      const long row = long(rows[r].token) * reader.arguments.num_q_heads + rows[r].head;
      KRuns::load(queries + row * D, part, q[r]);
      if (KRows::kHasTokenScales) {
        KRuns::sum_up(q[r], q_sums[r]);
      }
#pragma clang loop unroll(full)
      for (int i = 0; i < DV / kLanes; i++) {
        out[r][i] = 0;
      }
#pragma clang loop unroll(full)
      for (int i = 0; i < VRuns::kRuns; i++) {
        out_biases[r][i] = 0;
      }
    }
  }

  // To be called with every slot before its step.
  void enter_page(int slot) {
    if (!KRows::kHasChannelScales || walk.page_of(slot) == page) {
      return;
    }
    page = walk.page_of(slot);
    const long channels = walk.page_head(page) * D;
#pragma clang loop unroll(full)
    for (int r = 0; r < ROWS; r++) {
      q_biases[r] = 0;
    }
    KRuns::scale_by_channel(PageScales<T>{k_scales.scales + channels, k_scales.biases + channels},
                            part, q, scaled_q, q_biases);
  }

  // sums[r] += the lane's part of q[r] . key, the biases of channels included.
  void dot(const device typename KRows::Stored* row, thread float (&sums)[ROWS]) const {
    if (KRows::kHasChannelScales) {
#pragma clang loop unroll(full)
      for (int r = 0; r < ROWS; r++) {
        sums[r] += q_biases[r];
      }
      KRuns::dot(row, part, scaled_q, sums);
    } else {
      KRuns::dot(row, part, q, sums);
    }
  }

  // Slots [slot, slot + kStep), all of them seen by all rows.
  void whole_step(int slot) {
    RowWalk<kPageStep> k_rows(walk, slot), v_rows(walk, slot);
    // Of the key whose score and weight the lane gets.
    const int own = kKeys * (part % 4) + key;
    float weights[ROWS] = {};
    if (KRows::kHasTokenScales) {
      long keys[4];
#pragma clang loop unroll(full)
      for (int t = 0; t < 4; t++) {
        keys[t] = k_rows.row(kKeys * t) + key;
      }
      KRuns::score(keys, k_pages, row_of(keys[0], slot, own) * kKGroups, k_scales, part, q, q_sums,
                   weights);
    } else {
      float sums[4][ROWS] = {};
#pragma clang loop unroll(full)
      for (int t = 0; t < 4; t++) {
        dot(KRows::template at<D>(k_pages, k_rows.row(kKeys * t) + key), sums[t]);
      }
#pragma clang loop unroll(full)
      for (int r = 0; r < ROWS; r++) {
        weights[r] = of_quad(part, sums[0][r], sums[1][r], sums[2][r], sums[3][r]);
      }
    }
#pragma clang loop unroll(full)
    for (int r = 0; r < ROWS; r++) {
      weights[r] = over_key(weights[r]);
    }
    weigh<false>(slot + own, true, part < 4, weights);
    if (VRows::kHasTokenScales) {
      long values[4];
#pragma clang loop unroll(full)
      for (int t = 0; t < 4; t++) {
        values[t] = v_rows.row(kKeys * t) + key;
      }
      VRuns::add_scaled(values, v_pages, row_of(values[0], slot, own) * kVGroups, v_scales, part,
                        weights, out_biases, out);
      return;
    }
#pragma clang loop unroll(full)
    for (int t = 0; t < 4; t++) {
      float of_load[ROWS];
#pragma clang loop unroll(full)
      for (int r = 0; r < ROWS; r++) {
        of_load[r] = quad_broadcast(weights[r], t);
      }
      VRuns::template add<false>(VRows::template at<DV>(v_pages, v_rows.row(kKeys * t) + key), part,
                                 of_load, out);
    }
  }

  // The row of slot `slot` + own, `own` from lane to lane; `first`: of the lane's first key.
  long row_of(long first, int slot, int own) const {
    return kPageSize % kStep == 0 ? first - key + own : walk.row(slot + own);
  }

  // Slots [slot, slot + kKeys), of which any may be dead or hidden.
  void edge_step(int slot) {
    const int own = slot + key;
    const bool live = walk.is_live(own);
    const long row = walk.row(own);
    float weights[ROWS] = {};
    if (KRows::kHasTokenScales) {
      KRuns::score_one(live, KRows::template at<D>(k_pages, row), row * kKGroups, k_scales, part, q,
                       q_sums, weights);
    } else {
      if (live) {
        dot(KRows::template at<D>(k_pages, row), weights);
      }
#pragma clang loop unroll(full)
      for (int r = 0; r < ROWS; r++) {
        weights[r] = over_quad(weights[r]);
      }
    }
#pragma clang loop unroll(full)
    for (int r = 0; r < ROWS; r++) {
      weights[r] = over_key(weights[r]);
    }
    weigh<true>(own, live, part == 0, weights);
    if (live && VRows::kHasTokenScales) {
      VRuns::add_scaled_one(VRows::template at<DV>(v_pages, row), row * kVGroups, v_scales, part,
                            weights, out_biases, out);
    } else if (live) {
      VRuns::template add<true>(VRows::template at<DV>(v_pages, row), part, weights, out);
    }
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
#pragma clang loop unroll(full)
      for (int i = 0; i < VRuns::kRuns; i++) {
        out_biases[r][i] *= factor;
      }
    }
  }

  // Every lane gets the simdgroup's sums.
  void gather() {
#pragma clang loop unroll(full)
    for (int r = 0; r < ROWS; r++) {
      states[r].sum = simd_sum(states[r].sum);
      if (VRows::kHasTokenScales) {
        VRuns::add_biases(out_biases[r], out[r]);
      }
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
  const typename Vector::Walk walk(plan, item, arguments, group.x);
  const RowReader rows(plan, item, arguments, alibi_slopes, group.x);
  const Scoring scoring(arguments, mask);
  Vector vector(walk, scoring, k_pages, v_pages, PageScales<T> PAGED_MLX_K_SCALES,
                PageScales<T> PAGED_MLX_V_SCALES, lane);
  vector.begin(q, rows);

  const int2 seen = seen_by_all(vector.rows);
  const int2 slots = walk.slots(item.key_begin, item.key_end, Vector::kStep);
  const int count = (slots.y - slots.x) / Vector::kStep;
  const int end = slots.x + count * (simdgroup + 1) / num_simdgroups * Vector::kStep;
  for (int slot = slots.x + count * simdgroup / num_simdgroups * Vector::kStep; slot < end;
       slot += Vector::kStep) {
    vector.enter_page(slot);
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
        Vector::VRuns::put(vector.out[r], vector.part, begin, Merge::kColumns, window);
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    merge.write_window(begin, rows, writer, thread_index, 32 * num_simdgroups);
  }
}
