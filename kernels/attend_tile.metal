// Attention of 3 rows and more against a run of pages: decode of a head group, a
// short verify, prefill, a prefix that many sequences share.
//
//   plan         int32 words of plan_format.h
//   q            [tokens, num_q_heads, D]                     T
//   k_pages      [num_pages, num_kv_heads, page_size, D]      T, or codes
//   v_pages      [num_pages, num_kv_heads, page_size, DV]     T, or codes
//   k_scales, k_biases, v_scales, v_biases: see page_formats.h
//   out, lse     [tokens, num_q_heads, DV] T, [tokens, num_q_heads] float
//   partial_out, partial_state: see ResultWriter
//
// Grid: one threadgroup per (KV head, item, tile of ROWS rows), of exactly
// SIMDGROUPS simdgroups. A step is 8 or 16 keys a simdgroup. The simdgroups split the keys of the
// step for Q K^T and the columns of V for P V, so that the threadgroup reads each
// row of K and V once, stages neither, and a simdgroup holds a part of the result
// only. What they exchange, row maxima and weights, costs two barriers a step.
//
// Where K's channels have scales, a step has keys of one page, and a page costs a barrier
// more.
//
// Compiled with T, D, DV, ROWS (a multiple of 8) and SIMDGROUPS (at most 8) as
// macros of prefix PAGED_MLX_; K_FORMAT and V_FORMAT where they are not dense.

#include "attend_parameters.h"
#include "matrices.h"
#include "page_formats.h"
#include "page_walk.h"
#include "scores.h"
#include "softmax.h"
#include "tile_queries.h"

namespace paged_mlx {

// Columns that a simdgroup takes at a time: of `least`, 16 and 32 the most that leave
// the busiest simdgroup no more than it must have.
constexpr int busiest_columns(int dim, int width, int simdgroups) {
  return (dim + width * simdgroups - 1) / (width * simdgroups) * width;
}

constexpr int unit_columns(int dim, int simdgroups, int least) {
  int best = least;
  for (int width = 16; width <= 32; width *= 2) {
    if (dim % width == 0 &&
        busiest_columns(dim, width, simdgroups) <= busiest_columns(dim, best, simdgroups)) {
      best = width;
    }
  }
  return best;
}

// A lane's columns of one row go to the result.
template <typename T, int DV>
struct PutResult {
  thread const ResultWriter<T, DV>& writer;
  int token, head, slot, begin;
  float factor;

  template <int N>
  void operator()(int column, thread const float (&values)[N]) const {
    writer.write_values(token, head, slot, begin + column, factor, values);
  }
};

template <typename T, int D, int DV, int ROW_TILES, int SIMDGROUPS>
struct TileAttention {
  typedef PageRows<T, PAGED_MLX_K_FORMAT, group_size(D)> KRows;
  typedef PageRows<T, PAGED_MLX_V_FORMAT, group_size(DV)> VRows;
  typedef typename KRows::Stored KStored;
  typedef typename VRows::Stored VStored;
  typedef TileQueries<KRows, T, D, ROW_TILES, SIMDGROUPS> Queries;
  enum {
    kRows = 8 * ROW_TILES,
    // Groups of eight keys that a simdgroup scores in a whole step; codes of long rows are
    // one at a time.
    kGroups = ROW_TILES == 1 && SIMDGROUPS <= 4 && (D <= 128 || !KRows::kIsCoded) ? 2 : 1,
    kEdgeStep = 8 * SIMDGROUPS, // keys of a step that is not whole: one group of each simdgroup
    kStep = kGroups * kEdgeStep,
    kPageStep = KRows::kHasChannelScales ? int(kEdgeStep) : 1, // may not cross pages
    kKGroups = KRows::kHasTokenScales ? D / KRows::kGroup : 0, // of a token's channels
    kVGroups = VRows::kHasTokenScales ? DV / VRows::kGroup : 0,
    kColumns = unit_columns(DV, SIMDGROUPS, VRows::kIsCoded ? 16 : 8), // narrow loads cost more
    kUnits = busiest_columns(DV, kColumns, SIMDGROUPS) / kColumns,
    kOut = kUnits * kColumns / 8,
    kRollsKeys = VRows::kIsCoded && DV > 256 // of P V, as in rolls_dims
  };

  typedef PageWalk<kPageStep> Walk;
  typedef TokenScales<T, 8 * kGroups, kKGroups> KScales; // of a whole step
  typedef TokenScales<T, 8 * kGroups, kVGroups> VScales;
  typedef TokenScales<T, 8, kKGroups> EdgeKScales;
  typedef TokenScales<T, 8, kVGroups> EdgeVScales;

  thread const Walk& walk;
  thread const Scoring& scoring;
  const device KStored* k_pages;
  const device VStored* v_pages;
  PageScales<T> k_scales, v_scales;
  Queries queries;
  threadgroup float* maxima;   // [SIMDGROUPS, kRows]
  threadgroup float2* weights; // [ROW_TILES, kStep / 8 groups, 32 lanes], from the lane's on
  threadgroup vec<T, 2>* staged_v_scales; // [kVGroups, kStep]
  short simdgroup;
  LanePlace at;
  QueryRow rows[ROW_TILES];
  SoftmaxState states[ROW_TILES]; // the sum: of this lane's columns of keys
  Matrix<float> out[ROW_TILES][kOut];
  float out_biases[ROW_TILES][kUnits]; // sums of weight * bias: of this lane's columns of keys

  TileAttention(thread const Walk& walk_, thread const Scoring& scoring_,
                const device KStored* k_pages_, const device VStored* v_pages_,
                PageScales<T> k_scales_, PageScales<T> v_scales_,
                threadgroup typename Queries::Element* q, threadgroup float* q_sums,
                threadgroup float* maxima_, threadgroup float2* weights_,
                threadgroup vec<T, 2>* staged_v_scales_, short simdgroup_, short lane)
      : walk(walk_),
        scoring(scoring_),
        k_pages(k_pages_),
        v_pages(v_pages_),
        k_scales(k_scales_),
        v_scales(v_scales_),
        maxima(maxima_),
        weights(weights_ + lane),
        staged_v_scales(staged_v_scales_),
        simdgroup(simdgroup_),
        at(lane) {
    queries.q = q;
    queries.sums = q_sums;
  }

  void begin(const device T* q, thread const RowReader& reader, int first_row) {
#pragma clang loop unroll(full)
    for (int m = 0; m < ROW_TILES; m++) {
      rows[m] = reader.read(first_row + 8 * m + at.row);
      const long row = long(rows[m].token) * reader.arguments.num_q_heads + rows[m].head;
      queries.begin(m, q + row * D, at, simdgroup);
#pragma clang loop unroll(full)
      for (int i = 0; i < kOut; i++) {
        out[m][i] = Matrix<float>(0);
      }
#pragma clang loop unroll(full)
      for (int u = 0; u < kUnits; u++) {
        out_biases[m][u] = 0;
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }

  // To be called with every slot before its step.
  void enter_page(int slot) {
    queries.enter_page(slot, walk, k_scales, at, simdgroup);
  }

  // Slots [slot, slot + kStep), all of them seen by all rows.
  void whole_step(int slot) {
    const int own = slot + 8 * kGroups * simdgroup;
    RowWalk<kPageStep> k_rows(walk, own), v_rows(walk, slot);
    KeyPair<KStored> pairs[kGroups];
    long first = 0;
#pragma clang loop unroll(full)
    for (int g = 0; g < kGroups; g++) {
      const long row = k_rows.row(8 * g);
      first = g == 0 ? row : first;
      const device KStored* key = KRows::template at<D>(k_pages, row + at.column);
      pairs[g] = KeyPair<KStored>{key, KRows::template at<D>(key, 1), true, true};
    }
    KScales own_k_scales;
    VScales own_v_scales;
    if (KRows::kHasTokenScales || VRows::kHasTokenScales) {
      const int key = at.lane % (8 * kGroups);
      const long row = kPageSize % (8 * kGroups) == 0 ? first + key : walk.row(own + key);
      own_k_scales.load(k_scales, row, true, at.lane);
      own_v_scales.load(v_scales, row, true, at.lane);
    }
    weigh<false>(own, pairs, own_k_scales, own_v_scales);
    const device VStored* own_v_pages = VRows::template at<DV>(v_pages, at.row);
    if (kRollsKeys) {
#pragma clang loop unroll(disable)
      for (int g = 0; g < kStep / 8; g++) {
        add_values<false>(VRows::template at<DV>(own_v_pages, v_rows.row(8 * g)), true, g);
      }
    } else {
#pragma clang loop unroll(full)
      for (int g = 0; g < kStep / 8; g++) {
        add_values<false>(VRows::template at<DV>(own_v_pages, v_rows.row(8 * g)), true, g);
      }
    }
  }

  // Slots [slot, slot + kEdgeStep), of which any may be dead or hidden.
  void edge_step(int slot) {
    const int own = slot + 8 * simdgroup, first = own + at.column;
    const KeyPair<KStored> pairs[1] = {{KRows::template at<D>(k_pages, walk.row(first)),
                                        KRows::template at<D>(k_pages, walk.row(first + 1)),
                                        walk.is_live(first), walk.is_live(first + 1)}};
    EdgeKScales own_k_scales;
    EdgeVScales own_v_scales;
    if (KRows::kHasTokenScales || VRows::kHasTokenScales) {
      const int key = own + at.lane % 8;
      own_k_scales.load(k_scales, walk.row(key), walk.is_live(key), at.lane);
      own_v_scales.load(v_scales, walk.row(key), walk.is_live(key), at.lane);
    }
    weigh<true>(own, pairs, own_k_scales, own_v_scales);
#pragma clang loop unroll(disable)
    for (int g = 0; g < SIMDGROUPS; g++) {
      const int value = slot + 8 * g + at.row;
      add_values<true>(VRows::template at<DV>(v_pages, walk.row(value)), walk.is_live(value), g);
    }
  }

  // The simdgroup's keys, from slot `own` on, get weights that all simdgroups can read.
  template <bool EDGE, int GROUPS, typename OfK, typename OfV>
  void weigh(int own, thread const KeyPair<KStored> (&pairs)[GROUPS],
             thread const OfK& own_k_scales, thread const OfV& own_v_scales) {
    Matrix<float> scores[ROW_TILES][GROUPS];
    dot(pairs, own_k_scales, scores);
    score<EDGE>(own, pairs, scores);
    put_maxima(scores);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    put_weights<EDGE>(scores);
    own_v_scales.stage(staged_v_scales + 8 * GROUPS * simdgroup, kStep, at.lane);
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }

  template <int GROUPS, typename OfK>
  void dot(thread const KeyPair<KStored> (&pairs)[GROUPS], thread const OfK& own_k_scales,
           thread Matrix<float> (&scores)[ROW_TILES][GROUPS]) {
#pragma clang loop unroll(full)
    for (int m = 0; m < ROW_TILES; m++) {
#pragma clang loop unroll(full)
      for (int g = 0; g < GROUPS; g++) {
        elements(scores[m][g]) = float2(queries.bias(m));
      }
    }
    DimRuns<KRows, T, D>::multiply(queries.q, queries.sums + at.row, pairs, at, own_k_scales,
                                   scores);
  }

  // From dot products to scores.
  template <bool EDGE, int GROUPS>
  void score(int own, thread const KeyPair<KStored> (&pairs)[GROUPS],
             thread Matrix<float> (&scores)[ROW_TILES][GROUPS]) {
#pragma clang loop unroll(full)
    for (int g = 0; g < GROUPS; g++) {
      const int slot = own + 8 * g + at.column;
      const int first = walk.position(slot);
      const int second = kRagged ? walk.position(slot + 1) : first + 1;
#pragma clang loop unroll(full)
      for (int m = 0; m < ROW_TILES; m++) {
        thread float2& two = elements(scores[m][g]);
        two.x = pairs[g].first_live ? scoring.of<EDGE>(two.x, rows[m], first) : kHidden;
        two.y = pairs[g].second_live ? scoring.of<EDGE>(two.y, rows[m], second) : kHidden;
      }
    }
  }

  template <int GROUPS>
  void put_maxima(thread Matrix<float> (&scores)[ROW_TILES][GROUPS]) {
#pragma clang loop unroll(full)
    for (int m = 0; m < ROW_TILES; m++) {
      float most = kLowest;
#pragma clang loop unroll(full)
      for (int g = 0; g < GROUPS; g++) {
        const float2 two = elements(scores[m][g]);
        most = max(most, max(two.x, two.y));
      }
      most = row_max(most);
      if (at.column == 0) {
        maxima[simdgroup * kRows + 8 * m + at.row] = most;
      }
    }
  }

  template <bool EDGE, int GROUPS>
  void put_weights(thread Matrix<float> (&scores)[ROW_TILES][GROUPS]) {
#pragma clang loop unroll(full)
    for (int m = 0; m < ROW_TILES; m++) {
      raise(m);
#pragma clang loop unroll(full)
      for (int g = 0; g < GROUPS; g++) {
        float2 two = elements(scores[m][g]);
        two.x = states[m].template weight<EDGE>(two.x);
        two.y = states[m].template weight<EDGE>(two.y);
        *weight_of(m, GROUPS * simdgroup + g) = two;
      }
    }
  }

  // Row tile m moves to the maxima of all simdgroups.
  void raise(int m) {
    float most = states[m].most;
#pragma clang loop unroll(full)
    for (int s = 0; s < SIMDGROUPS; s++) {
      most = max(most, maxima[s * kRows + 8 * m + at.row]);
    }
    const float factor = states[m].raise(most);
#pragma clang loop unroll(full)
    for (int i = 0; i < kOut; i++) {
      elements(out[m][i]) *= factor;
    }
#pragma clang loop unroll(full)
    for (int u = 0; u < kUnits; u++) {
      out_biases[m][u] *= factor;
    }
  }

  threadgroup float2* weight_of(int m, int group) const {
    return weights + 32 * (m * kStep / 8 + group);
  }

  // The values of the step's keys of `group`; the lane reads its columns of one key.
  template <bool EDGE>
  void add_values(const device VStored* value, bool live, int group) {
    Matrix<float> p[ROW_TILES];
#pragma clang loop unroll(full)
    for (int m = 0; m < ROW_TILES; m++) {
      const float2 two = *weight_of(m, group);
      elements(p[m]) = two;
      states[m].sum += two.x + two.y;
    }
#pragma clang loop unroll(full)
    for (int u = 0; u < kUnits; u++) {
      const int column = (u * SIMDGROUPS + simdgroup) * kColumns;
      if (column < DV) {
        thread Matrix<float>* to = &out[0][u * kColumns / 8];
        if (VRows::kHasTokenScales) {
          Matrix<float> scaled[ROW_TILES];
          scale_weights<EDGE>(p, group, u, column / VRows::kGroup, scaled);
          ColumnRuns<VRows, T, kColumns>::template multiply<EDGE, ROW_TILES, kOut>(
              scaled, VRows::from(value, column), live, at, to);
        } else {
          ColumnRuns<VRows, T, kColumns>::template multiply<EDGE, ROW_TILES, kOut>(
              p, VRows::from(value, column), live, at, to);
        }
      }
    }
  }

  // Weights of eight keys, times their scales of a group of V's channels; those times the
  // biases are added up. What a row does not see has no part in it, were it NaN.
  template <bool EDGE>
  void scale_weights(thread Matrix<float> (&p)[ROW_TILES], int group, int unit, int v_group,
                     thread Matrix<float> (&scaled)[ROW_TILES]) {
    const threadgroup vec<T, 2>* own = staged_v_scales + v_group * kStep + 8 * group + at.column;
    const float2 first = of_numbers<VRows::kBits>(own[0].x, own[0].y);
    const float2 second = of_numbers<VRows::kBits>(own[1].x, own[1].y);
#pragma clang loop unroll(full)
    for (int m = 0; m < ROW_TILES; m++) {
      const float2 two = elements(p[m]);
      const bool no_first = EDGE && is_no_weight(two.x), no_second = EDGE && is_no_weight(two.y);
      elements(scaled[m]) =
          float2(no_first ? 0.0f : two.x * first.x, no_second ? 0.0f : two.y * second.x);
      out_biases[m][unit] +=
          (no_first ? 0.0f : two.x * first.y) + (no_second ? 0.0f : two.y * second.y);
    }
  }

  // The sums of weight * bias of a row join its sums of values.
  void add_biases(int m) {
    if (VRows::kHasTokenScales) {
#pragma clang loop unroll(full)
      for (int u = 0; u < kUnits; u++) {
        const float bias = row_sum(out_biases[m][u]);
#pragma clang loop unroll(full)
        for (int i = 0; i < kColumns / 8; i++) {
          elements(out[m][u * kColumns / 8 + i]) += bias;
        }
      }
    }
  }

  // The simdgroup's columns of the rows that there are.
  void write(thread const RowReader& reader, thread const ResultWriter<T, DV>& writer,
             int first_row) {
#pragma clang loop unroll(full)
    for (int m = 0; m < ROW_TILES; m++) {
      const int row = first_row + 8 * m + at.row;
      const float most = states[m].most, sum = row_sum(states[m].sum);
      add_biases(m);
      if (row >= reader.num_rows) {
        continue;
      }
      const int token = reader.token(row), head = reader.head(row);
      const int slot = row / reader.arguments.gqa_factor;
      const float factor = finish(most, sum, writer.sink(head)).factor;
#pragma clang loop unroll(full)
      for (int u = 0; u < kUnits; u++) {
        const int column = (u * SIMDGROUPS + simdgroup) * kColumns;
        if (column < DV) {
          const PutResult<T, DV> put{writer, token, head, slot, column, factor};
          ColumnRuns<VRows, T, kColumns>::each(&out[m][u * kColumns / 8], at, put);
        }
      }
      if (simdgroup == 0 && at.column == 0) {
        writer.write_state(token, head, slot, most, sum);
      }
    }
  }
};

} // namespace paged_mlx

using namespace paged_mlx;

[[kernel, max_total_threads_per_threadgroup(32 * PAGED_MLX_SIMDGROUPS)]] void attend_tile(
    PAGED_MLX_ATTEND_PARAMETERS) {
  constexpr int D = PAGED_MLX_D, DV = PAGED_MLX_DV;
  constexpr int kRowTiles = PAGED_MLX_ROWS / 8, kSimdgroups = PAGED_MLX_SIMDGROUPS;
  typedef PAGED_MLX_T T;
  typedef TileAttention<T, D, DV, kRowTiles, kSimdgroups> Tile;
  typedef typename Tile::Queries::Element Query;
  threadgroup uint4
      staged[Tile::kRows * D * sizeof(Query) / 16]; // of 16 bytes, for their alignment
  threadgroup float maxima[kSimdgroups * Tile::kRows];
  threadgroup float2 weights[kRowTiles * Tile::kStep * 4];
#if PAGED_MLX_K_FORMAT == PAGED_MLX_DENSE
  threadgroup float* q_sums = nullptr;
#else
  threadgroup float q_sums[Tile::Queries::kSums * Tile::kRows];
#endif
#if PAGED_MLX_V_FORMAT == PAGED_MLX_DENSE
  threadgroup vec<T, 2>* v_scales_of_step = nullptr;
#else
  threadgroup vec<T, 2> v_scales_of_step[Tile::kVGroups * Tile::kStep];
#endif

  const device PlanItem& item =
      reinterpret_cast<const device PlanItem*>(plan + arguments.items)[group.y];
  const RowReader reader(plan, item, arguments, alibi_slopes, group.x);
  const int first_row = group.z * Tile::kRows;
  if (first_row >= reader.num_rows) {
    return;
  }
  typename Tile::Walk walk(plan, item, arguments, group.x);
  const Scoring scoring(arguments, mask);
  Tile tile(walk, scoring, k_pages, v_pages, PageScales<T> PAGED_MLX_K_SCALES,
            PageScales<T> PAGED_MLX_V_SCALES, reinterpret_cast<threadgroup Query*>(staged), q_sums,
            maxima, weights, v_scales_of_step, simdgroup, lane);
  tile.begin(q, reader, first_row);

  const int2 whole = seen_by_all(tile.rows), any = seen_by_any(tile.rows);
  const int2 slots = walk.slots(any.x, any.y, Tile::kEdgeStep);
  walk.narrow(any.x, any.y);
  for (int slot = slots.x; slot < slots.y;) {
    tile.enter_page(slot);
    if (walk.is_whole(slot, Tile::kStep, whole)) {
      tile.whole_step(slot);
      slot += Tile::kStep;
    } else {
      tile.edge_step(slot);
      slot += Tile::kEdgeStep;
    }
  }

  const ResultWriter<T, DV> writer{
      out, lse, partial_out, partial_state, sinks, arguments.num_q_heads, item.partial};
  tile.write(reader, writer, first_row);
}
