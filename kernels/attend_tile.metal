// Attention of 3 to 16 rows against a run of pages: decode of a head group, a
// short verify.
//
//   plan         int32 words of plan_format.h
//   q            [tokens, num_q_heads, D]                     T
//   k_pages      [num_pages, num_kv_heads, page_size, D]      T
//   v_pages      [num_pages, num_kv_heads, page_size, DV]     T
//   out, lse     [tokens, num_q_heads, DV] T, [tokens, num_q_heads] float
//   partial_out, partial_state: see ResultWriter
//
// Grid: one threadgroup per (KV head, item). Each simdgroup owns a run of the
// item's keys and reads each of their K and V rows once, 32 keys a step.
// Then, after a barrier, the simdgroups' states are merged.
//
// Compiled with T, D, DV, ROWS (the most of an item: 4, or a multiple of 8) and
// SIMDGROUPS (the most of a threadgroup) as macros of prefix PAGED_MLX_.

#include "attend_parameters.h"
#include "key_groups.h"
#include "merge_simdgroups.h"
#include "page_walk.h"
#include "scores.h"
#include "softmax.h"

namespace paged_mlx {

// Q in registers.
template <typename T, int D, int ROW_TILES>
struct HeldQueries {
  Matrix<T> q[ROW_TILES][D / 8];

  template <int WIDTH, int BEGIN>
  struct Part {
    thread const HeldQueries& queries;

    explicit Part(thread const HeldQueries& queries_) : queries(queries_) {}

    thread const Matrix<T>& matrix(int m, int i) const {
      return queries.q[m][BEGIN / 8 + i];
    }
  };
};

template <typename T, int D, int DV, int ROW_TILES>
struct TileAttention {
  thread const PageWalk& walk;
  thread const Scoring& scoring;
  const device T* k_pages;
  const device T* v_pages;
  LanePlace at;
  QueryRow rows[ROW_TILES];
  SoftmaxState states[ROW_TILES];
  HeldQueries<T, D, ROW_TILES> queries;
  Matrix<float> out[ROW_TILES][DV / 8];
  Matrix<float> scores[ROW_TILES][4]; // then weights; of the step's 32 keys

  TileAttention(
      thread const PageWalk& walk_,
      thread const Scoring& scoring_,
      const device T* k_pages_,
      const device T* v_pages_,
      short lane)
      : walk(walk_), scoring(scoring_), k_pages(k_pages_), v_pages(v_pages_), at(lane) {}

  void begin(const device T* q, thread const RowReader& reader) {
#pragma clang loop unroll(full)
    for (int m = 0; m < ROW_TILES; m++) {
      rows[m] = reader.read(8 * m + at.row);
      const long row = long(rows[m].token) * reader.arguments.num_q_heads + rows[m].head;
      DimRuns<T, D>::load_query(q + row * D, at, queries.q[m]);
#pragma clang loop unroll(full)
      for (int i = 0; i < DV / 8; i++) {
        out[m][i] = Matrix<float>(0);
      }
    }
  }

  template <bool EDGE>
  void step(int slot) {
    dot<EDGE>(slot);
    score_groups<EDGE, ROW_TILES, 4>(walk, scoring, rows, slot, at, &scores[0][0]);
    weigh<EDGE>();
    add_values<EDGE>(slot);
  }

  template <bool EDGE>
  void dot(int slot) {
    GroupWalk slots(walk, slot);
#pragma clang loop unroll(full)
    for (int g = 0; g < 4; g++) {
      slots.enter(g);
      const KeyPair<T> pairs[1] = {key_pair<T, D, EDGE>(slots, k_pages, at)};
      Matrix<float> sums[ROW_TILES];
#pragma clang loop unroll(full)
      for (int m = 0; m < ROW_TILES; m++) {
        sums[m] = Matrix<float>(0);
      }
      DimRuns<T, D>::template multiply<ROW_TILES, 1>(queries, pairs, at, sums);
#pragma clang loop unroll(full)
      for (int m = 0; m < ROW_TILES; m++) {
        scores[m][g] = sums[m];
      }
    }
  }

  template <bool EDGE>
  void weigh() {
#pragma clang loop unroll(full)
    for (int m = 0; m < ROW_TILES; m++) {
      float most = states[m].most;
#pragma clang loop unroll(full)
      for (int g = 0; g < 4; g++) {
        const float2 two = elements(scores[m][g]);
        most = max(most, max(two.x, two.y));
      }
      const float factor = states[m].raise(row_max(most));
#pragma clang loop unroll(full)
      for (int g = 0; g < 4; g++) {
        thread float2& two = elements(scores[m][g]);
        two.x = states[m].template weight<EDGE>(two.x);
        two.y = states[m].template weight<EDGE>(two.y);
        states[m].sum += two.x + two.y;
      }
#pragma clang loop unroll(full)
      for (int i = 0; i < DV / 8; i++) {
        elements(out[m][i]) *= factor;
      }
    }
  }

  template <bool EDGE>
  void add_values(int slot) {
    GroupWalk slots(walk, slot);
#pragma clang loop unroll(full)
    for (int g = 0; g < 4; g++) {
      slots.enter(g);
      ColumnRuns<T, DV>::template multiply<EDGE, ROW_TILES, 4, DV / 8>(
          &scores[0][g],
          v_pages + slots.row(at.row) * DV,
          !EDGE || slots.is_live(at.row),
          at,
          &out[0][0]);
    }
  }
};

// Puts a lane's columns into the window that begins at `begin`.
template <typename Merge>
struct PutValues {
  thread const Merge& merge;
  int sum, row, begin;

  template <int N>
  void operator()(int column, thread const float (&values)[N]) const {
    if (column >= begin && column < begin + Merge::kColumns) {
      threadgroup float* to = merge.value(sum, row, column - begin);
#pragma clang loop unroll(full)
      for (int i = 0; i < N; i++) {
        to[i] = values[i];
      }
    }
  }
};

} // namespace paged_mlx

using namespace paged_mlx;

[[kernel, max_total_threads_per_threadgroup(32 * PAGED_MLX_SIMDGROUPS)]] void attend_tile(
    PAGED_MLX_ATTEND_PARAMETERS,
    ushort num_simdgroups [[simdgroups_per_threadgroup]]) {
  constexpr int D = PAGED_MLX_D, DV = PAGED_MLX_DV;
  constexpr int kRows = PAGED_MLX_ROWS, kRowTiles = (kRows + 7) / 8;
  typedef PAGED_MLX_T T;
  typedef SimdgroupMerge<PAGED_MLX_SIMDGROUPS, 1, kRows, DV> Merge;
  threadgroup float values[Merge::kValues];
  threadgroup float merge_states[Merge::kStates];

  const device PlanItem& item =
      reinterpret_cast<const device PlanItem*>(plan + arguments.items)[group.y];
  const PageWalk walk(plan, item, arguments, group.x);
  const RowReader rows(plan, item, arguments, alibi_slopes, group.x);
  const Scoring scoring(arguments, mask);
  TileAttention<T, D, DV, kRowTiles> tile(walk, scoring, k_pages, v_pages, lane);
  tile.begin(q, rows);

  const int2 whole = seen_by_all(tile.rows);
  const int2 steps = walk.steps(item.key_begin, item.key_end, 32);
  const int count = steps.y - steps.x;
  const int end = steps.x + count * (simdgroup + 1) / num_simdgroups;
  for (int s = steps.x + count * simdgroup / num_simdgroups; s < end; s++) {
    const int first = walk.first_position + 32 * s;
    if (walk.all_live(32 * s, 32) && first >= whole.x && first + 32 <= whole.y) {
      tile.step<false>(32 * s);
    } else {
      tile.step<true>(32 * s);
    }
  }

  const Merge merge{values, merge_states, num_simdgroups};
#pragma clang loop unroll(full)
  for (int m = 0; m < kRowTiles; m++) {
    tile.states[m].sum = row_sum(tile.states[m].sum);
    const int row = 8 * m + tile.at.row;
    if (tile.at.column == 0 && row < kRows) {
      merge.put_state(simdgroup, row, tile.states[m]);
    }
  }
  const ResultWriter<T, DV> writer{
      out, lse, partial_out, partial_state, sinks, arguments.num_q_heads, item.partial};
  for (int begin = 0; begin < DV; begin += Merge::kColumns) {
    if (begin > 0) {
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
#pragma clang loop unroll(full)
    for (int m = 0; m < kRowTiles; m++) {
      const int row = 8 * m + tile.at.row;
      if (row < kRows) {
        const PutValues<Merge> put{merge, simdgroup, row, begin};
        ColumnRuns<T, DV>::each(tile.out[m], tile.at, put);
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    merge.write_window(begin, rows, writer, thread_index, 32 * num_simdgroups);
  }
}
