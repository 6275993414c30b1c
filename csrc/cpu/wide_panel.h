// Prefill attention, the inner part: a tile of keys against one panel of rows.
//   Phase 1: scores of a tile, so many keys x a panel of rows that the registers are full.
//   Phase 2: online softmax, down the tile.
//   Phase 3: values, so many elements x a panel of rows.
// Lanes are rows and never meet: a row's numbers do not depend on the rows beside it.
#pragma once

#include "cpu/rows.h"

namespace paged_mlx::cpu {
namespace {

constexpr int kTileKeys = 64;
constexpr int kChainWords = 32;

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

} // namespace
} // namespace paged_mlx::cpu
