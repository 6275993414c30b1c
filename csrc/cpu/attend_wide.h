// Prefill attention: many rows of one KV head of one item.
//
//   q       [panel, words, kPanel]  words of DotProduct, scratch: lanes are rows
//   acc     [panel, Dv, kPanel]     float, scratch
//   tiles   K and V of kTileKeys keys, scratch: converted once for all panels
//
// With rows in the lanes, an element of K or V is a broadcast, so nothing is
// transposed but the queries, and the softmax has no horizontal step.
// Tiles start at multiples of kTileKeys, whatever the item.
#pragma once

#include "cpu/wide_panel.h"

namespace paged_mlx::cpu {
namespace {

constexpr int kMaxPanelVecs = kManyRegisters ? 3 : 4;
constexpr int kMaxPanel = kMaxPanelVecs * kLanes;
constexpr int kMaxWideRows = 384;
constexpr size_t kWideStateBytes = 448 * 1024; // q and acc of one pass

// Four rows of floats at a time become four lanes of `count` columns.
template <int kPanel>
void transpose_in(const float* const* rows, int count, float* to) {
  for (int d = 0; d < count; d += 4) {
    Vec4 a = load4(rows[0] + d), b = load4(rows[1] + d);
    Vec4 c = load4(rows[2] + d), e = load4(rows[3] + d);
    transpose4(a, b, c, e);
    store4(to + (d + 0) * kPanel, a);
    store4(to + (d + 1) * kPanel, b);
    store4(to + (d + 2) * kPanel, c);
    store4(to + (d + 3) * kPanel, e);
  }
}

template <int kPanel>
void transpose_out(const float* from, int count, float* const* rows) {
  for (int d = 0; d < count; d += 4) {
    Vec4 a = load4(from + (d + 0) * kPanel), b = load4(from + (d + 1) * kPanel);
    Vec4 c = load4(from + (d + 2) * kPanel), e = load4(from + (d + 3) * kPanel);
    transpose4(a, b, c, e);
    store4(rows[0] + d, a);
    store4(rows[1] + d, b);
    store4(rows[2] + d, c);
    store4(rows[3] + d, e);
  }
}

template <typename X, typename Pass>
void pack_queries(const Pass& pass, float* wide_rows) {
  const Job& job = pass.job;
  float* rows[4];
  for (int i = 0; i < 4; i++) {
    rows[i] = wide_rows + i * pass.words;
  }
  for (int r = 0; r < pass.num_panels * Pass::kPanel; r += 4) {
    for (int i = 0; i < 4; i++) {
      if (r + i < pass.num_rows) {
        const Row& row = pass.rows[r + i];
        const int64_t at = int64_t(row.token) * job.num_q_heads + row.head;
        pack_query<X>(job, at, reinterpret_cast<typename DotProduct<X>::Query*>(rows[i]));
      } else {
        memset(rows[i], 0, pass.words * sizeof(float));
      }
    }
    const size_t panel = r / Pass::kPanel;
    transpose_in<Pass::kPanel>(rows, pass.words,
                               pass.q + panel * pass.words * Pass::kPanel + r % Pass::kPanel);
  }
}

template <typename X, typename Pass>
void start_pass(const Pass& pass) {
  const int lanes = pass.num_panels * Pass::kPanel;
  for (int r = 0; r < lanes; r++) {
    const bool real = r < pass.num_rows;
    pass.rows[r] = real ? make_row(pass.job, pass.item, pass.kv_head, pass.first_row + r)
                        : Row{0, 0, 0, 0, 0, -1};
    pass.begins[r] = pass.rows[r].begin;
    pass.ends[r] = pass.rows[r].end;
    pass.most[r] = kNegInf;
    pass.sums[r] = 0.0f;
  }
  memset(pass.acc, 0, sizeof(float) * pass.v_dim * lanes);
  pack_queries<X>(pass, pass.tiles[0].k);
}

template <typename X, typename Pass>
void finish_pass(const Pass& pass) {
  float* rows[4];
  for (int i = 0; i < 4; i++) {
    rows[i] = pass.tiles[0].v + i * pass.v_dim;
  }
  for (int r = 0; r < pass.num_rows; r += 4) {
    const size_t panel = r / Pass::kPanel;
    transpose_out<Pass::kPanel>(pass.acc + panel * pass.v_dim * Pass::kPanel + r % Pass::kPanel,
                                pass.v_dim, rows);
    for (int i = 0; i < 4 && r + i < pass.num_rows; i++) {
      finish_attended<X>(pass.job, pass.rows[r + i], rows[i], pass.most[r + i], pass.sums[r + i]);
    }
  }
}

template <typename X, typename Pass>
void attend_pass(const Pass& pass) {
  start_pass<X>(pass);
  const KeyRange all = seen_by(pass, 0, pass.num_rows);
  TileLoader<X> loader(pass.job, pass.item, pass.kv_head, all, pass.words, pass.v_dim);
  int position = all.begin / kTileKeys * kTileKeys, turn = 0;
  loader.begin(pass.tiles[turn], position);
  for (; position < all.end; position += kTileKeys, turn ^= 1) {
    loader.advance(1, 1);
    const KeyRange held = loader.keys();
    loader.begin(pass.tiles[turn ^ 1], position + kTileKeys);
    for (int panel = 0; panel < pass.num_panels; panel++) {
      attend_panel<X>(pass, panel, position, held, pass.tiles[turn], loader);
    }
  }
  finish_pass<X>(pass);
}

// Rows that one pass holds.
int wide_rows(const Job& job) {
  const size_t row = sizeof(float) * (padded(job.head_dim) + padded(job.v_head_dim));
  const int most = int(kWideStateBytes / row) / kMaxPanel * kMaxPanel;
  return clamp_int(most, kMaxPanel, kMaxWideRows);
}

size_t wide_scratch_bytes(const Job& job) {
  const size_t dims = padded(job.head_dim) + padded(job.v_head_dim);
  const size_t row = dims * sizeof(float) + sizeof(Row) + 4 * sizeof(float);
  const size_t tile = tile_floats(padded(job.head_dim), padded(job.v_head_dim));
  return (wide_rows(job) + kMaxPanel) * row + (2 * tile + kTileKeys * kMaxPanel) * sizeof(float) +
      16 * 64;
}

template <typename X, int kVecs>
WidePass<kVecs> make_pass(const Job& job, const PlanItem& item, int kv_head, int first_row,
                          int num_rows, char* memory) {
  constexpr int kPanel = WidePass<kVecs>::kPanel;
  const int panels = (num_rows + kPanel - 1) / kPanel;
  const int words = padded(job.head_dim) / DotProduct<X>::kPerWord;
  const int v_dim = padded(job.v_head_dim);
  const size_t lanes = size_t(panels) * kPanel;
  Scratch scratch{memory};
  return {job,
          item,
          kv_head,
          first_row,
          num_rows,
          words,
          v_dim,
          panels,
          scratch.take<Row>(lanes),
          scratch.take<float>(lanes * words),
          scratch.take<float>(lanes * v_dim),
          scratch.take<float>(lanes),
          scratch.take<float>(lanes),
          {take_tile(scratch, words, v_dim), take_tile(scratch, words, v_dim)},
          scratch.take<float>(size_t(kTileKeys) * kPanel),
          scratch.take<int32_t>(lanes),
          scratch.take<int32_t>(lanes)};
}

// Vectors of a panel that leave the fewest lanes without a row, as many as possible.
int panel_vecs(int rows) {
  int best = kMaxPanelVecs, least = kMaxPanel;
  for (int vecs = kMaxPanelVecs; vecs > 0; vecs--) {
    const int panel = vecs * kLanes, idle = (panel - rows % panel) % panel;
    if (idle < least) {
      best = vecs;
      least = idle;
    }
  }
  return best;
}

template <typename X>
void attend_wide(const Job& job, int index, int kv_head, char* memory) {
  const PlanItem& item = job.items[index];
  const int total = item.row_count * job.gqa_factor;
  const int step = wide_rows(job);
  for (int first = 0; first < total; first += step) {
    const int rows = min_int(step, total - first);
    switch (panel_vecs(rows)) {
      case 1:
        attend_pass<X>(make_pass<X, 1>(job, item, kv_head, first, rows, memory));
        break;
      case 2:
        attend_pass<X>(make_pass<X, 2>(job, item, kv_head, first, rows, memory));
        break;
      case 3:
        attend_pass<X>(make_pass<X, 3>(job, item, kv_head, first, rows, memory));
        break;
      default:
        attend_pass<X>(make_pass<X, kMaxPanelVecs>(job, item, kv_head, first, rows, memory));
    }
  }
}

} // namespace
} // namespace paged_mlx::cpu
