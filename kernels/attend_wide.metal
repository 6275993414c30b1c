// Attention of many rows against a run of pages: prefill, a long verify, a
// prefix that many sequences share.
//
// Buffers and macros as in attend_tile.metal; ROWS, a multiple of 8, is the rows
// of a tile.
//
// Grid: one threadgroup per (KV head, item, tile of ROWS rows), of exactly
// SIMDGROUPS simdgroups. A step is 16 keys per simdgroup. The simdgroups
// split the keys of the step for Q K^T and the columns of V for P V, so that
// the threadgroup reads each row of K and V once and stages neither; what they
// exchange, row maxima and weights, costs two barriers a step.

#include "attend_parameters.h"
#include "key_groups.h"
#include "merge_simdgroups.h"
#include "softmax.h"

namespace paged_mlx {

// Q in threadgroup memory, its rows 16 bytes apart from a multiple of 16.
template <typename T, int D, int ROW_TILES>
struct StagedQueries {
  enum { kStride = D + 16 / int(sizeof(T)), kSize = 8 * ROW_TILES * kStride };

  const threadgroup T* q;
  LanePlace at;

  template <int WIDTH, int BEGIN>
  struct Part {
    T v[ROW_TILES][2 * WIDTH];

    explicit Part(thread const StagedQueries& queries) {
#pragma clang loop unroll(full)
      for (int m = 0; m < ROW_TILES; m++) {
        const threadgroup T* row = queries.q + (8 * m + queries.at.row) * kStride;
        const threadgroup vec<T, 2>* from = reinterpret_cast<const threadgroup vec<T, 2>*>(
            row + BEGIN + WIDTH * queries.at.column);
#pragma clang loop unroll(full)
        for (int i = 0; i < WIDTH; i++) {
          const vec<T, 2> two = from[i];
          v[m][2 * i] = two.x;
          v[m][2 * i + 1] = two.y;
        }
      }
    }

    Matrix<T> matrix(int m, int i) const {
      Matrix<T> matrix;
      elements(matrix) = vec<T, 2>(v[m][i], v[m][WIDTH + i]);
      return matrix;
    }
  };
};

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

template <typename T, int D, int DV, int ROW_TILES, int SIMDGROUPS>
struct WideAttention {
  enum {
    kRows = 8 * ROW_TILES,
    kStep = 16 * SIMDGROUPS,
    kWeightStride = kStep + 4,
    kColumns = unit_columns(DV, SIMDGROUPS),
    kUnits = busiest_columns(DV, kColumns, SIMDGROUPS) / kColumns
  };

  thread const PageWalk& walk;
  thread const Scoring& scoring;
  const device T* k_pages;
  const device T* v_pages;
  threadgroup float* maxima;  // [SIMDGROUPS, kRows], at the end sums
  threadgroup float* weights; // [kRows, kWeightStride]
  StagedQueries<T, D, ROW_TILES> queries;
  short simdgroup;
  LanePlace at;
  QueryRow rows[ROW_TILES];
  SoftmaxState states[ROW_TILES]; // the sum: of this lane's keys
  Matrix<float> out[ROW_TILES][kUnits * kColumns / 8];
  Matrix<float> scores[ROW_TILES][2];

  WideAttention(
      thread const PageWalk& walk_,
      thread const Scoring& scoring_,
      const device T* k_pages_,
      const device T* v_pages_,
      threadgroup float* maxima_,
      threadgroup float* weights_,
      const threadgroup T* q,
      short simdgroup_,
      short lane)
      : walk(walk_),
        scoring(scoring_),
        k_pages(k_pages_),
        v_pages(v_pages_),
        maxima(maxima_),
        weights(weights_),
        queries{q, LanePlace(lane)},
        simdgroup(simdgroup_),
        at(lane) {}

  void begin(thread const RowReader& reader, int first_row) {
#pragma clang loop unroll(full)
    for (int m = 0; m < ROW_TILES; m++) {
      rows[m] = reader.read(first_row + 8 * m + at.row);
#pragma clang loop unroll(full)
      for (int i = 0; i < kUnits * kColumns / 8; i++) {
        out[m][i] = Matrix<float>(0);
      }
    }
  }

  template <bool EDGE>
  void step(int slot) {
    dot<EDGE>(slot + 16 * simdgroup);
    put_maxima();
    threadgroup_barrier(mem_flags::mem_threadgroup);
    weigh<EDGE>();
    threadgroup_barrier(mem_flags::mem_threadgroup);
    GroupWalk slots(walk, slot);
#pragma clang loop unroll(full)
    for (int g = 0; g < kStep / 8; g++) {
      slots.enter(g);
      add_values<EDGE>(slots);
    }
  }

  template <bool EDGE>
  void dot(int slot) {
    GroupWalk slots(walk, slot);
    KeyPair<T> pairs[2];
#pragma clang loop unroll(full)
    for (int g = 0; g < 2; g++) {
      slots.enter(g);
      pairs[g] = key_pair<T, D, EDGE>(slots, k_pages, at);
    }
#pragma clang loop unroll(full)
    for (int m = 0; m < ROW_TILES; m++) {
      scores[m][0] = Matrix<float>(0);
      scores[m][1] = Matrix<float>(0);
    }
    DimRuns<T, D>::template multiply<ROW_TILES, 2>(queries, pairs, at, &scores[0][0]);
    score_groups<EDGE, ROW_TILES, 2>(walk, scoring, rows, slot, at, &scores[0][0]);
  }

  void put_maxima() {
#pragma clang loop unroll(full)
    for (int m = 0; m < ROW_TILES; m++) {
      const float2 a = elements(scores[m][0]), b = elements(scores[m][1]);
      const float most = row_max(max(max(a.x, a.y), max(b.x, b.y)));
      if (at.column == 0) {
        maxima[simdgroup * kRows + 8 * m + at.row] = most;
      }
    }
  }

  template <bool EDGE>
  void weigh() {
#pragma clang loop unroll(full)
    for (int m = 0; m < ROW_TILES; m++) {
      const int row = 8 * m + at.row;
      float most = states[m].most;
#pragma clang loop unroll(full)
      for (int s = 0; s < SIMDGROUPS; s++) {
        most = max(most, maxima[s * kRows + row]);
      }
      const float factor = states[m].raise(most);
#pragma clang loop unroll(full)
      for (int g = 0; g < 2; g++) {
        float2 two = elements(scores[m][g]);
        two.x = states[m].template weight<EDGE>(two.x);
        two.y = states[m].template weight<EDGE>(two.y);
        states[m].sum += two.x + two.y;
        *weight_of(row, 16 * simdgroup + 8 * g + at.column) = two;
      }
#pragma clang loop unroll(full)
      for (int i = 0; i < kUnits * kColumns / 8; i++) {
        elements(out[m][i]) *= factor;
      }
    }
  }

  threadgroup float2* weight_of(int row, int key) const {
    return reinterpret_cast<threadgroup float2*>(weights + row * kWeightStride + key);
  }

  template <bool EDGE>
  void add_values(thread const GroupWalk& slots) {
    const device T* value = v_pages + slots.row(at.row) * DV;
    const bool live = !EDGE || slots.is_live(at.row);
    Matrix<float> p[ROW_TILES];
#pragma clang loop unroll(full)
    for (int m = 0; m < ROW_TILES; m++) {
      elements(p[m]) = *weight_of(8 * m + at.row, 8 * slots.group + at.column);
    }
#pragma clang loop unroll(full)
    for (int u = 0; u < kUnits; u++) {
      const int column = (u * SIMDGROUPS + simdgroup) * kColumns;
      if (column < DV) {
        ColumnRuns<T, kColumns>::template multiply<EDGE, ROW_TILES, 1, kUnits * kColumns / 8>(
            p, value + column, live, at, &out[0][u * kColumns / 8]);
      }
    }
  }

  // Every lane of a row gets the row's whole sum. The maxima were read before the
  // second barrier of the last step.
  void gather_sums() {
#pragma clang loop unroll(full)
    for (int m = 0; m < ROW_TILES; m++) {
      const float sum = row_sum(states[m].sum);
      if (at.column == 0) {
        maxima[simdgroup * kRows + 8 * m + at.row] = sum;
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
#pragma clang loop unroll(full)
    for (int m = 0; m < ROW_TILES; m++) {
      states[m].sum = 0;
#pragma clang loop unroll(full)
      for (int s = 0; s < SIMDGROUPS; s++) {
        states[m].sum += maxima[s * kRows + 8 * m + at.row];
      }
    }
  }
};

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

} // namespace paged_mlx

using namespace paged_mlx;

[[kernel, max_total_threads_per_threadgroup(32 * PAGED_MLX_SIMDGROUPS)]] void attend_wide(PAGED_MLX_ATTEND_PARAMETERS) {
  constexpr int D = PAGED_MLX_D, DV = PAGED_MLX_DV;
  constexpr int kRowTiles = PAGED_MLX_ROWS / 8, kSimdgroups = PAGED_MLX_SIMDGROUPS;
  typedef PAGED_MLX_T T;
  typedef WideAttention<T, D, DV, kRowTiles, kSimdgroups> Wide;
  typedef StagedQueries<T, D, kRowTiles> Queries;
  typedef vec<T, 4> T4;
  threadgroup T4 staged[Queries::kSize / 4]; // wide types, for their alignment
  threadgroup float maxima[kSimdgroups * Wide::kRows];
  threadgroup float4 weights[Wide::kRows * Wide::kWeightStride / 4];

  const device PlanItem& item =
      reinterpret_cast<const device PlanItem*>(plan + arguments.items)[group.y];
  const RowReader reader(plan, item, arguments, alibi_slopes, group.x);
  const int first_row = group.z * Wide::kRows;
  if (first_row >= reader.num_rows) {
    return;
  }
  for (int i = thread_index; i < Wide::kRows * D / 4; i += 32 * kSimdgroups) {
    const int row = i / (D / 4), dim = i % (D / 4) * 4;
    const int index = min(first_row + row, reader.num_rows - 1);
    const long from = long(reader.token(index)) * arguments.num_q_heads + reader.head(index);
    staged[(row * Queries::kStride + dim) / 4] =
        *reinterpret_cast<const device T4*>(q + from * D + dim);
  }
  PageWalk walk(plan, item, arguments, group.x);
  const Scoring scoring(arguments, mask);
  Wide wide(
      walk,
      scoring,
      k_pages,
      v_pages,
      maxima,
      reinterpret_cast<threadgroup float*>(weights),
      reinterpret_cast<const threadgroup T*>(staged),
      simdgroup,
      lane);
  wide.begin(reader, first_row);
  threadgroup_barrier(mem_flags::mem_threadgroup);

  const int2 whole = seen_by_all(wide.rows), any = seen_by_any(wide.rows);
  const int2 steps = walk.steps(any.x, any.y, Wide::kStep);
  walk.narrow(any.x, any.y);
  for (int s = steps.x; s < steps.y; s++) {
    const int slot = Wide::kStep * s, first = walk.first_position + slot;
    if (walk.all_live(slot, Wide::kStep) && first >= whole.x && first + Wide::kStep <= whole.y) {
      wide.template step<false>(slot);
    } else {
      wide.template step<true>(slot);
    }
  }
  wide.gather_sums();

  const ResultWriter<T, DV> writer{
      out, lse, partial_out, partial_state, sinks, arguments.num_q_heads, item.partial};
#pragma clang loop unroll(full)
  for (int m = 0; m < kRowTiles; m++) {
    const int row = first_row + 8 * m + wide.at.row;
    if (row >= reader.num_rows) {
      continue;
    }
    const SoftmaxState state = wide.states[m];
    const int token = reader.token(row), head = reader.head(row);
    const int slot = row / arguments.gqa_factor;
    const float factor = finish(state.most, state.sum, writer.sink(head)).factor;
#pragma clang loop unroll(full)
    for (int u = 0; u < Wide::kUnits; u++) {
      const int column = (u * kSimdgroups + simdgroup) * Wide::kColumns;
      if (column < DV) {
        const PutResult<T, DV> put{writer, token, head, slot, column, factor};
        ColumnRuns<T, Wide::kColumns>::each(&wide.out[m][u * Wide::kColumns / 8], wide.at, put);
      }
    }
    if (simdgroup == 0 && wide.at.column == 0) {
      writer.write_state(token, head, slot, state.most, state.sum);
    }
  }
}
