// Prefill attention, the inner part: a tile of keys against one panel of rows.
//   Phase 1: scores of a tile, so many keys x a panel of rows that the registers are full.
//   Phase 2: online softmax, down the tile.
//   Phase 3: values, so many elements x a panel of rows.
// Lanes are rows and never meet: a row's numbers do not depend on the rows beside it.
#pragma once

#include "cpu/wide_tiles.h"

namespace paged_mlx::cpu {
namespace {

constexpr int kChainWords = 128;

// Keys, or elements of V, that meet a panel of so many vectors at once: on few registers
// twelve sums, which hide the latency of a multiplication, the row's vectors and the element.
constexpr int micro_step(int panel_vecs) {
  return kManyRegisters ? 8 : 12 / panel_vecs;
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

  Row* rows;   // [panels * kPanel]; lanes without a row see nothing
  float* q;    // [panel, words, kPanel]
  float* acc;  // [panel, v_dim, kPanel]
  float* most; // [panel, kPanel]
  float* sums; // [panel, kPanel]
  Tile tiles[2];
  float* scores;   // [kTileKeys, kPanel]
  int32_t* begins; // [panel, kPanel]
  int32_t* ends;   // [panel, kPanel]
};

// The keys that rows [first, first + count) see: the least begin, the last end.
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

// Phase 1: scores of kMicroKeys keys with the rows of a panel, added up
// kChainWords words at a time: a shorter chain of roundings.
template <typename X, int kPanelVecs>
__attribute__((noinline)) void score_keys(const float* q, const float* keys, int words,
                                          float* scores) {
  constexpr int kPanel = kPanelVecs * kLanes, kMicroKeys = micro_step(kPanelVecs);
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
      VecI shown = splat_int(-1);
      if (!job.plain) {
        Vec bias = {};
        for (int i = 0; job.mask && i < kLanes; i++) {
          const bool seen = key >= rows[i].begin && key < rows[i].end;
          bias[i] = seen ? mask_bias(job, mask_row(job, rows[i]), key) : 0.0f;
        }
        score = to_score(job, score, slope, splat(float(key)) - at) + bias;
        shown = bias != splat(kNegInf);
      }
      const VecI seen = (splat_int(key) >= begin) & (splat_int(key) < end) & shown;
      store(s, select(seen, score, splat(kNegInf)));
    }
  }
}

// Phase 2: scores of keys [low, high) of the tile become weights; `shrink` is
// what the sums so far shrink by. Even and odd keys are added up apart.
template <int kPanelVecs>
__attribute__((noinline)) void soften(float unit, float* scores, int low, int high, float* most,
                                      float* sums, Vec (&shrink)[kPanelVecs]) {
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

// Phase 3: kDims elements of the accumulators of a panel.
template <int kPanelVecs, int kDims>
__attribute__((noinline)) void add_values(const float* weights, const float* values, int count,
                                          int v_stride, const Vec (&shrink)[kPanelVecs],
                                          float* acc) {
  constexpr int kPanel = kPanelVecs * kLanes;
  Vec sum[kDims][kPanelVecs];
  for (int d = 0; d < kDims; d++) {
    for (int x = 0; x < kPanelVecs; x++) {
      sum[d][x] = Vec{};
    }
  }
  for (int j = 0; j < count; j++) {
    Vec weight[kPanelVecs];
    for (int x = 0; x < kPanelVecs; x++) {
      weight[x] = load(weights + j * kPanel + x * kLanes);
    }
    for (int d = 0; d < kDims; d++) {
      const Vec value = splat(values[j * v_stride + d]);
      for (int x = 0; x < kPanelVecs; x++) {
        sum[d][x] = fma(value, weight[x], sum[d][x]);
      }
    }
  }
  for (int d = 0; d < kDims; d++) {
    for (int x = 0; x < kPanelVecs; x++) {
      float* const at = acc + d * kPanel + x * kLanes;
      store(at, fma(load(at), shrink[x], sum[d][x]));
    }
  }
}

// Lanes of a panel that see a key, for the keys of a tile.
template <int kPanelVecs>
struct SeenKeys {
  VecI lanes[kTileKeys][kPanelVecs];

  void find(const float* scores, int count) {
    for (int j = 0; j < count; j++) {
      for (int x = 0; x < kPanelVecs; x++) {
        lanes[j][x] = load(scores + (j * kPanelVecs + x) * kLanes) != splat(kNegInf);
      }
    }
  }
};

// Phase 3 where a row does not see a key whose values are not finite: 0 times them is NaN.
template <int kPanelVecs>
__attribute__((noinline)) void add_seen_values(const float* weights,
                                               const SeenKeys<kPanelVecs>& seen,
                                               const float* values, int count, int v_dim,
                                               const Vec (&shrink)[kPanelVecs], float* acc) {
  constexpr int kPanel = kPanelVecs * kLanes;
  for (int d = 0; d < v_dim; d++) {
    for (int x = 0; x < kPanelVecs; x++) {
      Vec sum = {};
      for (int j = 0; j < count; j++) {
        const Vec value =
            select(seen.lanes[j][x], splat(values[j * tile_v_stride(v_dim) + d]), Vec{});
        sum = fma(value, load(weights + j * kPanel + x * kLanes), sum);
      }
      float* const at = acc + d * kPanel + x * kLanes;
      store(at, fma(load(at), shrink[x], sum));
    }
  }
}

PAGED_MLX_INLINE bool all_finite(const float* values, int count, int v_dim) {
  Vec zero = {};
  for (int j = 0; j < count; j++) {
    for (int d = 0; d < v_dim; d += kLanes) {
      zero += load(values + j * tile_v_stride(v_dim) + d) * Vec{};
    }
  }
  return sum(zero) == 0.0f;
}

// A number of elements of V, known when this is compiled.
template <int kCount>
struct Dims {
  static constexpr int count = kCount;
};

// A tile of keys against the rows of one panel; the loader fills the next tile meanwhile.
template <typename X, typename Pass>
void attend_panel(const Pass& pass, int panel, int position, KeyRange held, const Tile& tile,
                  TileLoader<X>& next) {
  const KeyRange seen = seen_by(pass, panel * Pass::kPanel, Pass::kPanel);
  const KeyRange keys = {max_int(held.begin, seen.begin), min_int(held.end, seen.end)};
  if (keys.begin >= keys.end) {
    return;
  }
  constexpr int kMicroKeys = micro_step(Pass::kPanelVecs), kMicroDims = kMicroKeys;
  const Job& job = pass.job;
  const float* const q = pass.q + size_t(panel) * pass.words * Pass::kPanel;
  const int low = keys.begin - position, high = keys.end - position;
  const int first = low / kMicroKeys * kMicroKeys;
  const int k_steps = (high - first + kMicroKeys - 1) / kMicroKeys;
  const int v_steps = (pass.v_dim + kMicroDims - 1) / kMicroDims;
  const int steps = k_steps + v_steps;
  int done = panel * steps;
  for (int j = first; j < high; j += kMicroKeys) {
    score_keys<X, Pass::kPanelVecs>(q, tile.k + j * pass.words, pass.words,
                                    pass.scores + j * Pass::kPanel);
    next.advance(++done, pass.num_panels * steps);
  }
  bool seen_by_all = !job.mask;
  for (int r = panel * Pass::kPanel; seen_by_all && r < (panel + 1) * Pass::kPanel; r++) {
    seen_by_all = pass.begins[r] <= keys.begin && pass.ends[r] >= keys.end;
  }
  if (!(job.plain && seen_by_all)) {
    finish_scores(pass, panel, position, keys);
  }
  const int v_stride = tile_v_stride(pass.v_dim);
  const float* const values = tile.v + low * v_stride;
  float* const weights = pass.scores + low * Pass::kPanel;
  const bool apart = !seen_by_all && !all_finite(values, high - low, pass.v_dim);
  SeenKeys<Pass::kPanelVecs> seen_keys;
  if (apart) {
    seen_keys.find(weights, high - low);
  }
  Vec shrink[Pass::kPanelVecs];
  soften<Pass::kPanelVecs>(exponent_unit(job), pass.scores, low, high,
                           pass.most + panel * Pass::kPanel, pass.sums + panel * Pass::kPanel,
                           shrink);
  float* const acc = pass.acc + size_t(panel) * pass.v_dim * Pass::kPanel;
  auto add_dims = [&](int d, auto dims) __attribute__((always_inline)) {
    add_values<Pass::kPanelVecs, decltype(dims)::count>(weights, values + d, high - low, v_stride,
                                                        shrink, acc + size_t(d) * Pass::kPanel);
    next.advance(++done, pass.num_panels * steps);
  };
  if (apart) {
    add_seen_values<Pass::kPanelVecs>(weights, seen_keys, values, high - low, pass.v_dim, shrink,
                                      acc);
    next.advance(done + v_steps, pass.num_panels * steps);
    return;
  }
  int d = 0;
  for (; d + kMicroDims <= pass.v_dim; d += kMicroDims) {
    add_dims(d, Dims<kMicroDims>{});
  }
  // Steps of 4 and 8 divide v_dim. Of one that is three times a divisor, two may be left.
  if constexpr (kMicroDims % 3 == 0) {
    constexpr int kRest = kMicroDims / 3;
    if (d + kRest == pass.v_dim) {
      add_dims(d, Dims<kRest>{});
    } else if (d < pass.v_dim) {
      add_dims(d, Dims<2 * kRest>{});
    }
  }
}

} // namespace
} // namespace paged_mlx::cpu
