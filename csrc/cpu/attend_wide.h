// Prefill attention: many rows of one KV head of one item.
//
//   q       [panel, words, kPanel]  words of DotProduct, scratch: lanes are rows
//   acc     [panel, Dv, kPanel]     float, scratch
//   k_tile  [kTileKeys, words]      words of DotProduct, scratch: converted once for all panels
//   v_tile  [kTileKeys, Dv]         float, scratch
//
// With rows in the lanes, an element of K or V is a broadcast, so nothing is
// transposed but the queries, and the softmax has no horizontal step.
//   Phase 1: scores of a tile, so many keys x a panel of rows that the registers are full.
//   Phase 2: online softmax, down the tile.
//   Phase 3: values, so many elements x a panel of rows.
// Tiles start at multiples of kTileKeys; lanes never meet: a row's numbers do
// not depend on the rows beside it.
#pragma once

#include "cpu/rows.h"

namespace paged_mlx::cpu {
namespace {

constexpr int kTileKeys = 64;
constexpr int kChainWords = 32;
constexpr int kMaxPanel = 3 * kLanes;
constexpr int kMaxWideRows = 384;
constexpr size_t kWideStateBytes = 448 * 1024; // q and acc of one pass

// Keys, or elements of V, that meet a panel of so many vectors in registers.
constexpr int micro(int panel_vecs) {
  return panel_vecs > 1 ? (kManyRegisters ? 8 : 4) : kPair < 16 ? 8 : kPair / 2;
}

// One pass: up to kMaxWideRows rows of one KV head, in panels of kVecs vectors.
template <int kVecs>
struct WidePass {
  static constexpr int kPanelVecs = kVecs;
  static constexpr int kPanel = kVecs * kLanes;

  const Job& job;
  const PlanItem& item;
  int kv_head;
  int first_row;
  int num_rows;
  int words; // of a query or key: padded head_dim, packed
  int v_dim; // padded v_head_dim
  int num_panels;

  Row* rows;     // [panels * kPanel]; lanes without a row see nothing
  float* q;      // [panel, words, kPanel]
  float* acc;    // [panel, v_dim, kPanel]
  float* most;   // [panel, kPanel]
  float* sums;   // [panel, kPanel]
  float* k_tile; // [kTileKeys, words]
  float* v_tile; // [kTileKeys, v_dim]
  float* scores; // [kTileKeys, kPanel]
  int32_t* begins; // [panel, kPanel]
  int32_t* ends;   // [panel, kPanel]
};

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

template <typename X>
PAGED_MLX_INLINE void pack_row(const typename X::T* from, int n, float* words) {
  DotProduct<X>::pack_row(from, n, reinterpret_cast<typename DotProduct<X>::Query*>(words));
}

template <typename X, typename Pass>
void pack_queries(const Pass& pass, float* wide_rows) {
  const Job& job = pass.job;
  const auto* const q = static_cast<const typename X::T*>(job.q);
  float* rows[4];
  for (int i = 0; i < 4; i++) {
    rows[i] = wide_rows + i * pass.words;
  }
  for (int r = 0; r < pass.num_panels * Pass::kPanel; r += 4) {
    for (int i = 0; i < 4; i++) {
      if (r + i < pass.num_rows) {
        const Row& row = pass.rows[r + i];
        const int64_t at = int64_t(row.token) * job.num_q_heads + row.head;
        pack_row<X>(q + at * job.head_dim, job.head_dim, rows[i]);
      } else {
        memset(rows[i], 0, pass.words * sizeof(float));
      }
    }
    const size_t panel = r / Pass::kPanel;
    transpose_in<Pass::kPanel>(rows, pass.words, pass.q + panel * pass.words * Pass::kPanel + r % Pass::kPanel);
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
  pack_queries<X>(pass, pass.k_tile);
}

template <typename X, typename Pass>
void finish_pass(const Pass& pass) {
  float* rows[4];
  for (int i = 0; i < 4; i++) {
    rows[i] = pass.v_tile + i * pass.v_dim;
  }
  for (int r = 0; r < pass.num_rows; r += 4) {
    const size_t panel = r / Pass::kPanel;
    transpose_out<Pass::kPanel>(pass.acc + panel * pass.v_dim * Pass::kPanel + r % Pass::kPanel, pass.v_dim, rows);
    for (int i = 0; i < 4 && r + i < pass.num_rows; i++) {
      finish_row<X>(pass.job, pass.rows[r + i], rows[i], pass.most[r + i], pass.sums[r + i]);
    }
  }
}

// The keys that rows [first, first + count) see: the least begin, the last end.
struct KeyRange {
  int begin;
  int end;
};

template <typename Pass>
KeyRange seen_by(const Pass& pass, int first, int count) {
  KeyRange range = {0, 0};
  for (int r = first; r < first + count; r++) {
    const int begin = pass.begins[r], end = pass.ends[r];
    if (begin >= end) {
      continue;
    }
    const bool empty = range.begin >= range.end;
    range.begin = empty ? begin : min_int(range.begin, begin);
    range.end = empty ? end : max_int(range.end, end);
  }
  return range;
}

// Calls visit(row of K and V in the pool, key) for keys [keys.begin, keys.end);
// `page` is the first page that may hold one of them, and moves up to it.
template <typename Pass, typename Visit>
PAGED_MLX_INLINE void for_each_key(const Pass& pass, KeyRange keys, int& page, Visit visit) {
  const Job& job = pass.job;
  const int64_t head = int64_t(pass.kv_head) * job.page_size;
  auto page_end = [&](int i) {
    return page_start(job, pass.item, i) + page_len(job, pass.item, i);
  };
  while (page < pass.item.page_count && page_end(page) <= keys.begin) {
    page++;
  }
  for (int i = page; i < pass.item.page_count; i++) {
    const int start = page_start(job, pass.item, i);
    if (start >= keys.end) {
      break;
    }
    const int64_t row = page_row(job, pass.item, i) + head - start;
    const int end = min_int(page_end(i), keys.end);
    for (int key = max_int(start, keys.begin); key < end; key++) {
      visit(row + key, key);
    }
  }
}

// The tile at `position` holds keys [keys.begin, keys.end).
template <typename X, typename Pass>
void load_tile(const Pass& pass, int position, KeyRange keys, int& page) {
  using T = typename X::T;
  const Job& job = pass.job;
  const T* const k_pages = static_cast<const T*>(job.k_pages);
  const T* const v_pages = static_cast<const T*>(job.v_pages);
  for_each_key(pass, keys, page, [&](int64_t row, int key) {
    const int at = key - position;
    pack_row<X>(k_pages + row * job.head_dim, job.head_dim, pass.k_tile + at * pass.words);
    widen_row<X>(v_pages + row * job.v_head_dim, job.v_head_dim, pass.v_tile + at * pass.v_dim);
  });
}

// Prefetches the rows of `keys` in one of the pools, K or V.
template <typename Pass>
void prefetch_keys(const Pass& pass, const void* pool, int row_bytes, KeyRange keys, int page) {
  for_each_key(pass, keys, page, [&](int64_t row, int) {
    const char* const at = static_cast<const char*>(pool) + row * row_bytes;
    for (int b = 0; b < row_bytes; b += 64) {
      prefetch(at + b);
    }
  });
}

// Keys that a panel prefetches while it works, spread evenly over its steps.
struct TileAhead {
  KeyRange keys;
  int page; // the first that may hold one of them
  int itemsize;

  KeyRange share(int step, int steps) const {
    const int count = max_int(keys.end - keys.begin, 0);
    return {keys.begin + count * step / steps, keys.begin + count * (step + 1) / steps};
  }
  template <typename Pass>
  void prefetch_k(const Pass& pass, int step, int steps) const {
    const Job& job = pass.job;
    prefetch_keys(pass, job.k_pages, job.head_dim * itemsize, share(step, steps), page);
  }
  template <typename Pass>
  void prefetch_v(const Pass& pass, int step, int steps) const {
    const Job& job = pass.job;
    prefetch_keys(pass, job.v_pages, job.v_head_dim * itemsize, share(step, steps), page);
  }
};

// Phase 1: scores of kMicroKeys keys with the rows of a panel, added up
// kChainWords words at a time: a shorter chain of roundings.
template <typename X, int kPanelVecs>
void score_keys(const float* q, const float* keys, int words, float* scores) {
  constexpr int kPanel = kPanelVecs * kLanes, kMicroKeys = micro(kPanelVecs);
  for (int first = 0; first < words; first += kChainWords) {
    const int end = min_int(first + kChainWords, words);
    Vec dots[kMicroKeys][kPanelVecs];
    for (int j = 0; j < kMicroKeys; j++) {
      for (int x = 0; x < kPanelVecs; x++) {
        dots[j][x] = Vec{};
      }
    }
    for (int w = first; w < end; w++) {
      Vec row[kPanelVecs];
      for (int x = 0; x < kPanelVecs; x++) {
        row[x] = load(q + w * kPanel + x * kLanes);
      }
      for (int j = 0; j < kMicroKeys; j++) {
        const Vec key = splat_word(keys + j * words + w);
        for (int x = 0; x < kPanelVecs; x++) {
          dots[j][x] = DotProduct<X>::add_words(key, row[x], dots[j][x]);
        }
      }
    }
    for (int j = 0; j < kMicroKeys; j++) {
      for (int x = 0; x < kPanelVecs; x++) {
        float* const score = scores + j * kPanel + x * kLanes;
        store(score, first == 0 ? dots[j][x] : load(score) + dots[j][x]);
      }
    }
  }
}

// Scores that are more than scale * dot, or hidden from some row.
template <typename Pass>
void finish_scores(const Pass& pass, int panel, int position, KeyRange keys) {
  const Job& job = pass.job;
  for (int x = 0; x < Pass::kPanelVecs; x++) {
    const int first = panel * Pass::kPanel + x * kLanes;
    const Row* const rows = pass.rows + first;
    const VecI begin = (VecI)load(reinterpret_cast<const float*>(pass.begins + first));
    const VecI end = (VecI)load(reinterpret_cast<const float*>(pass.ends + first));
    Vec slope = {}, at = {};
    for (int i = 0; i < kLanes; i++) {
      slope[i] = job.alibi_slopes ? job.alibi_slopes[rows[i].head] : 0.0f;
      at[i] = float(rows[i].position);
    }
    for (int key = keys.begin; key < keys.end; key++) {
      float* const s = pass.scores + (key - position) * Pass::kPanel + x * kLanes;
      Vec score = load(s);
      if (!job.plain) {
        Vec bias = {};
        for (int i = 0; job.mask && i < kLanes; i++) {
          const bool seen = key >= rows[i].begin && key < rows[i].end;
          bias[i] = seen ? mask_bias(job, mask_row(job, rows[i]), key) : 0.0f;
        }
        score = to_score(job, score, slope, splat(float(key)) - at) + bias;
      }
      const VecI seen = (splat_int(key) >= begin) & (splat_int(key) < end);
      store(s, select(seen, score, splat(kNegInf)));
    }
  }
}

// Phase 2: scores of keys [low, high) of the tile become weights; `shrink` is
// what the sums so far shrink by. Even and odd keys are added up apart.
template <int kPanelVecs>
void soften(
    float unit,
    float* scores,
    int low,
    int high,
    float* most,
    float* sums,
    Vec (&shrink)[kPanelVecs]) {
  constexpr int kPanel = kPanelVecs * kLanes;
  for (int x = 0; x < kPanelVecs; x++) {
    float* const column = scores + x * kLanes;
    const Vec before = load(most + x * kLanes);
    Vec top = before;
    for (int j = low; j < high; j++) {
      top = max(load(column + j * kPanel), top);
    }
    const Vec base = select(top == splat(kNegInf), Vec{}, top);
    shrink[x] = exp2((before - base) * splat(unit));
    auto soften_one = [&](int j) __attribute__((always_inline)) {
      const Vec weight = exp2((load(column + j * kPanel) - base) * splat(unit));
      store(column + j * kPanel, weight);
      return weight;
    };
    Vec even = {}, odd = {};
    if (low & 1) {
      odd = soften_one(low);
    }
    for (int j = low + (low & 1); j < high; j += 2) {
      even += soften_one(j);
      if (j + 1 < high) {
        odd += soften_one(j + 1);
      }
    }
    store(most + x * kLanes, top);
    store(sums + x * kLanes, fma(load(sums + x * kLanes), shrink[x], even + odd));
  }
}

// Phase 3: kMicroDims elements of the accumulators of a panel.
template <int kPanelVecs>
void add_values(
    const float* weights,
    const float* values,
    int count,
    int v_dim,
    const Vec (&shrink)[kPanelVecs],
    float* acc) {
  constexpr int kPanel = kPanelVecs * kLanes, kMicroDims = micro(kPanelVecs);
  Vec sum[kMicroDims][kPanelVecs];
  for (int d = 0; d < kMicroDims; d++) {
    for (int x = 0; x < kPanelVecs; x++) {
      sum[d][x] = Vec{};
    }
  }
  for (int j = 0; j < count; j++) {
    Vec weight[kPanelVecs];
    for (int x = 0; x < kPanelVecs; x++) {
      weight[x] = load(weights + j * kPanel + x * kLanes);
    }
    for (int d = 0; d < kMicroDims; d++) {
      const Vec value = splat(values[j * v_dim + d]);
      for (int x = 0; x < kPanelVecs; x++) {
        sum[d][x] = fma(value, weight[x], sum[d][x]);
      }
    }
  }
  for (int d = 0; d < kMicroDims; d++) {
    for (int x = 0; x < kPanelVecs; x++) {
      float* const at = acc + d * kPanel + x * kLanes;
      store(at, fma(load(at), shrink[x], sum[d][x]));
    }
  }
}

// A tile of keys against the rows of one panel.
template <typename X, typename Pass>
void attend_panel(
    const Pass& pass, int panel, int position, KeyRange tile, const TileAhead& ahead) {
  const KeyRange seen = seen_by(pass, panel * Pass::kPanel, Pass::kPanel);
  const KeyRange keys = {max_int(tile.begin, seen.begin), min_int(tile.end, seen.end)};
  if (keys.begin >= keys.end) {
    return;
  }
  constexpr int kMicro = micro(Pass::kPanelVecs);
  const Job& job = pass.job;
  const float* const q = pass.q + size_t(panel) * pass.words * Pass::kPanel;
  const int low = keys.begin - position, high = keys.end - position;
  const int first = low / kMicro * kMicro;
  const int k_steps = (high - first + kMicro - 1) / kMicro, v_steps = pass.v_dim / kMicro;
  for (int j = first; j < high; j += kMicro) {
    ahead.prefetch_k(pass, (j - first) / kMicro, k_steps);
    score_keys<X, Pass::kPanelVecs>(
        q, pass.k_tile + j * pass.words, pass.words, pass.scores + j * Pass::kPanel);
  }
  bool whole = job.plain;
  for (int r = panel * Pass::kPanel; whole && r < (panel + 1) * Pass::kPanel; r++) {
    whole = pass.begins[r] <= keys.begin && pass.ends[r] >= keys.end;
  }
  if (!whole) {
    finish_scores(pass, panel, position, keys);
  }
  Vec shrink[Pass::kPanelVecs];
  soften<Pass::kPanelVecs>(
      exponent_unit(job),
      pass.scores,
      low,
      high,
      pass.most + panel * Pass::kPanel,
      pass.sums + panel * Pass::kPanel,
      shrink);
  const float* const weights = pass.scores + low * Pass::kPanel;
  float* const acc = pass.acc + size_t(panel) * pass.v_dim * Pass::kPanel;
  for (int d = 0; d < pass.v_dim; d += kMicro) {
    ahead.prefetch_v(pass, d / kMicro, v_steps);
    add_values<Pass::kPanelVecs>(
        weights, pass.v_tile + low * pass.v_dim + d, high - low, pass.v_dim, shrink,
        acc + size_t(d) * Pass::kPanel);
  }
}

// The part of the tile at `position` that one of `count` panels prefetches.
KeyRange share_of_tile(int position, int panel, int count, int end) {
  return {
      min_int(position + kTileKeys * panel / count, end),
      min_int(position + kTileKeys * (panel + 1) / count, end)};
}

template <typename X, typename Pass>
void attend_pass(const Pass& pass) {
  start_pass<X>(pass);
  memset(pass.k_tile, 0, sizeof(float) * kTileKeys * pass.words);
  const KeyRange all = seen_by(pass, 0, pass.num_rows);
  int page = 0;
  for (int at = all.begin / kTileKeys * kTileKeys; at < all.end; at += kTileKeys) {
    const KeyRange tile = {max_int(at, all.begin), min_int(at + kTileKeys, all.end)};
    load_tile<X>(pass, at, tile, page);
    for (int panel = 0; panel < pass.num_panels; panel++) {
      const KeyRange ahead = share_of_tile(at + kTileKeys, panel, pass.num_panels, all.end);
      attend_panel<X>(pass, panel, at, tile, {ahead, page, sizeof(typename X::T)});
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
  return (wide_rows(job) + kMaxPanel) * row +
      kTileKeys * (dims + kMaxPanel) * sizeof(float) + 16 * 64;
}

template <typename X, int kVecs>
WidePass<kVecs> make_pass(
    const Job& job, const PlanItem& item, int kv_head, int first_row, int num_rows, char* memory) {
  constexpr int kPanel = WidePass<kVecs>::kPanel;
  const int panels = (num_rows + kPanel - 1) / kPanel;
  const int words = padded(job.head_dim) / DotProduct<X>::kPerWord;
  const int v_dim = padded(job.v_head_dim);
  const size_t lanes = size_t(panels) * kPanel;
  Scratch scratch{memory};
  return {
      job,
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
      scratch.take<float>(size_t(kTileKeys) * words),
      scratch.take<float>(size_t(kTileKeys) * v_dim),
      scratch.take<float>(size_t(kTileKeys) * kPanel),
      scratch.take<int32_t>(lanes),
      scratch.take<int32_t>(lanes)};
}

// Vectors of a panel that leave the fewest lanes without a row.
int panel_vecs(int rows) {
  auto idle = [rows](int vecs) { return (vecs * kLanes - rows % (vecs * kLanes)) % (vecs * kLanes); };
  const int best = idle(3) <= idle(2) ? 3 : 2;
  return idle(best) <= idle(1) ? best : 1;
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
      default:
        attend_pass<X>(make_pass<X, 3>(job, item, kv_head, first, rows, memory));
    }
  }
}

} // namespace
} // namespace paged_mlx::cpu
