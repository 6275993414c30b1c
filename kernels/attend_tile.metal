// Attention of 3 rows and more against a run of pages: decode of a head group, a
// short verify, prefill, a prefix that many sequences share.
//
//   plan         int32 words of plan_format.h
//   q            [tokens, num_q_heads, D]                     T
//   k_pages      [num_pages, num_kv_heads, page_size, D]      T
//   v_pages      [num_pages, num_kv_heads, page_size, DV]     T
//   out, lse     [tokens, num_q_heads, DV] T, [tokens, num_q_heads] float
//   partial_out, partial_state: see ResultWriter
//
// Grid: one threadgroup per (KV head, item, tile of ROWS rows), of exactly
// SIMDGROUPS simdgroups. A step is 8 or 16 keys a simdgroup. The simdgroups split the keys of the
// step for Q K^T and the columns of V for P V, so that the threadgroup reads each
// row of K and V once, stages neither, and a simdgroup holds a part of the result
// only. What they exchange, row maxima and weights, costs two barriers a step.
//
// Compiled with T, D, DV, ROWS (a multiple of 8) and SIMDGROUPS (at most 8) as
// macros of prefix PAGED_MLX_.

#include "attend_parameters.h"
#include "matrices.h"
#include "page_walk.h"
#include "scores.h"
#include "softmax.h"

namespace paged_mlx {

// Columns that a simdgroup takes at a time: of 8, 16 and 32 the most that leave
// the busiest simdgroup no more than it must have.
constexpr int busiest_columns(int dim, int width, int simdgroups) {
  return (dim + width * simdgroups - 1) / (width * simdgroups) * width;
}

constexpr int unit_columns(int dim, int simdgroups) {
  int best = 8;
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
  enum {
    kRows = 8 * ROW_TILES,
    kGroups = ROW_TILES == 1 && SIMDGROUPS <= 4 ? 2 : 1, // that a simdgroup scores in a whole step
    kEdgeStep = 8 * SIMDGROUPS, // keys of a step that is not whole: one group of each simdgroup
    kStep = kGroups * kEdgeStep,
    kColumns = unit_columns(DV, SIMDGROUPS),
    kUnits = busiest_columns(DV, kColumns, SIMDGROUPS) / kColumns,
    kOut = kUnits * kColumns / 8
  };

  thread const PageWalk& walk;
  thread const Scoring& scoring;
  const device T* k_pages;
  const device T* v_pages;
  threadgroup T* q;            // matrices of each row tile, see DimRuns
  threadgroup float* maxima;   // [SIMDGROUPS, kRows]
  threadgroup float2* weights; // [ROW_TILES, kStep / 8 groups, 32 lanes], from the lane's on
  short simdgroup;
  LanePlace at;
  QueryRow rows[ROW_TILES];
  SoftmaxState states[ROW_TILES]; // the sum: of this lane's columns of keys
  Matrix<float> out[ROW_TILES][kOut];

  TileAttention(thread const PageWalk& walk_, thread const Scoring& scoring_,
                const device T* k_pages_, const device T* v_pages_, threadgroup T* q_,
                threadgroup float* maxima_, threadgroup float2* weights_, short simdgroup_,
                short lane)
      : walk(walk_),
        scoring(scoring_),
        k_pages(k_pages_),
        v_pages(v_pages_),
        q(q_),
        maxima(maxima_),
        weights(weights_ + lane),
        simdgroup(simdgroup_),
        at(lane) {}

  void begin(const device T* queries, thread const RowReader& reader, int first_row) {
#pragma clang loop unroll(full)
    for (int m = 0; m < ROW_TILES; m++) {
      rows[m] = reader.read(first_row + 8 * m + at.row);
      if (m % SIMDGROUPS == simdgroup) {
        const long row = long(rows[m].token) * reader.arguments.num_q_heads + rows[m].head;
        DimRuns<T, D>::stage(queries + row * D, at, q + 8 * m * D);
      }
#pragma clang loop unroll(full)
      for (int i = 0; i < kOut; i++) {
        out[m][i] = Matrix<float>(0);
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }

  // Slots [slot, slot + kStep), all of them seen by all rows.
  void whole_step(int slot) {
    const int own = slot + 8 * kGroups * simdgroup;
    RowWalk k_rows(walk, own), v_rows(walk, slot);
    KeyPair<T> pairs[kGroups];
#pragma clang loop unroll(full)
    for (int g = 0; g < kGroups; g++) {
      const device T* key = k_pages + (k_rows.row(8 * g) + at.column) * D;
      pairs[g] = KeyPair<T>{key, key + D, true, true};
    }
    weigh<false>(own, pairs);
#pragma clang loop unroll(full)
    for (int g = 0; g < kStep / 8; g++) {
      add_values<false>(v_pages + (v_rows.row(8 * g) + at.row) * DV, true, g);
    }
  }

  // Slots [slot, slot + kEdgeStep), of which any may be dead or hidden.
  void edge_step(int slot) {
    const int own = slot + 8 * simdgroup, first = own + at.column;
    const KeyPair<T> pairs[1] = {{k_pages + walk.row(first) * D, k_pages + walk.row(first + 1) * D,
                                  walk.is_live(first), walk.is_live(first + 1)}};
    weigh<true>(own, pairs);
#pragma clang loop unroll(disable)
    for (int g = 0; g < SIMDGROUPS; g++) {
      const int value = slot + 8 * g + at.row;
      add_values<true>(v_pages + walk.row(value) * DV, walk.is_live(value), g);
    }
  }

  // The simdgroup's keys, from slot `own` on, get weights that all simdgroups can read.
  template <bool EDGE, int GROUPS>
  void weigh(int own, thread const KeyPair<T> (&pairs)[GROUPS]) {
    Matrix<float> scores[ROW_TILES][GROUPS];
    dot(pairs, scores);
    score<EDGE>(own, pairs, scores);
    put_maxima(scores);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    put_weights<EDGE>(scores);
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }

  template <int GROUPS>
  void dot(thread const KeyPair<T> (&pairs)[GROUPS],
           thread Matrix<float> (&scores)[ROW_TILES][GROUPS]) {
#pragma clang loop unroll(full)
    for (int m = 0; m < ROW_TILES; m++) {
#pragma clang loop unroll(full)
      for (int g = 0; g < GROUPS; g++) {
        scores[m][g] = Matrix<float>(0);
      }
    }
    DimRuns<T, D>::template multiply<ROW_TILES, GROUPS>(q, pairs, at, scores);
  }

  // From dot products to scores.
  template <bool EDGE, int GROUPS>
  void score(int own, thread const KeyPair<T> (&pairs)[GROUPS],
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
  }

  threadgroup float2* weight_of(int m, int group) const {
    return weights + 32 * (m * kStep / 8 + group);
  }

  // The values of the step's keys of `group`; the lane reads its columns of one key.
  template <bool EDGE>
  void add_values(const device T* value, bool live, int group) {
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
        ColumnRuns<T, kColumns>::template multiply<EDGE, ROW_TILES, kOut>(
            p, value + column, live, at, &out[0][u * kColumns / 8]);
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
          ColumnRuns<T, kColumns>::each(&out[m][u * kColumns / 8], at, put);
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
  threadgroup uint4 staged[Tile::kRows * D * sizeof(T) / 16]; // of 16 bytes, for their alignment
  threadgroup float maxima[kSimdgroups * Tile::kRows];
  threadgroup float2 weights[kRowTiles * Tile::kStep * 4];

  const device PlanItem& item =
      reinterpret_cast<const device PlanItem*>(plan + arguments.items)[group.y];
  const RowReader reader(plan, item, arguments, alibi_slopes, group.x);
  const int first_row = group.z * Tile::kRows;
  if (first_row >= reader.num_rows) {
    return;
  }
  PageWalk walk(plan, item, arguments, group.x);
  const Scoring scoring(arguments, mask);
  Tile tile(walk, scoring, k_pages, v_pages, reinterpret_cast<threadgroup T*>(staged), maxima,
            weights, simdgroup, lane);
  tile.begin(q, reader, first_row);

  const int2 whole = seen_by_all(tile.rows), any = seen_by_any(tile.rows);
  const int2 slots = walk.slots(any.x, any.y, Tile::kEdgeStep);
  walk.narrow(any.x, any.y);
  for (int slot = slots.x; slot < slots.y;) {
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
