// Q of a threadgroup in threadgroup memory, as the matrices that Q K^T takes.
//
// Where K's channels have scales, Q waits in registers, and Q times the scales of a page
// takes its place whenever the keys come to another page.
#ifndef PAGED_MLX_TILE_QUERIES_H
#define PAGED_MLX_TILE_QUERIES_H

#include "matrices.h"
#include "page_formats.h"
#include "page_walk.h"

namespace paged_mlx {

template <typename Rows, typename T, int D, int ROW_TILES, int SIMDGROUPS,
          bool BY_PAGE = Rows::kHasChannelScales>
struct TileQueries {
  typedef T Element;
  enum { kRows = 8 * ROW_TILES, kSums = Rows::kHasTokenScales ? D / Rows::kGroup : 0 };

  threadgroup T* q;        // matrices of each row tile, see DimRuns
  threadgroup float* sums; // [kSums, kRows], of each group of channels

  // Row tile m; `row`: of the lane's row.
  void begin(int m, const device T* row, LanePlace at, short simdgroup) {
    if (m % SIMDGROUPS == simdgroup) {
      DimRuns<Rows, T, D>::template stage<kRows>(row, at, q + 8 * m * D, sums + 8 * m);
    }
  }

  // To be called with every slot before its step.
  template <int STEP>
  void enter_page(int, thread const PageWalk<STEP>&, PageScales<T>, LanePlace, short) {}

  // What every dot product with a row begins with.
  float bias(int) const {
    return 0;
  }
};

// A simdgroup's share of Q: kShare of each lane's elements of a run, of both columns.
template <typename Rows, typename T, int D, int ROW_TILES, int SIMDGROUPS, int BEGIN = 0,
          bool MORE = (BEGIN < D)>
struct QueryShare {
  enum {
    kWidth = dims_of_lane<Rows, D>(BEGIN),
    kShare = kWidth > SIMDGROUPS ? kWidth / SIMDGROUPS : 1,
    kNext = BEGIN + 8 * kWidth
  };

  T first[ROW_TILES][kShare], second[ROW_TILES][kShare];
  QueryShare<Rows, T, D, ROW_TILES, SIMDGROUPS, kNext> rest;

  static int dim(LanePlace at, short simdgroup) {
    return BEGIN + kWidth * at.column + kShare * simdgroup;
  }

  void load(int m, const device T* row, LanePlace at, short simdgroup) {
    if (kShare * simdgroup < kWidth) {
      load_elements<kShare>(row + dim(at, simdgroup), first[m]);
      load_elements<kShare>(row + dim(at, simdgroup) + kWidth, second[m]);
    }
    rest.load(m, row, at, simdgroup);
  }

  // q * scale to threadgroup memory, q . bias to `biases`. `page`: of the page and head.
  void stage(PageScales<T> page, LanePlace at, short simdgroup, threadgroup float* q,
             thread float (&biases)[ROW_TILES]) const {
    if (kShare * simdgroup < kWidth) {
      const int low = dim(at, simdgroup), high = low + kWidth;
      T low_scales[kShare], high_scales[kShare], low_biases[kShare], high_biases[kShare];
      load_elements<kShare>(page.scales + low, low_scales);
      load_elements<kShare>(page.scales + high, high_scales);
      load_elements<kShare>(page.biases + low, low_biases);
      load_elements<kShare>(page.biases + high, high_biases);
#pragma clang loop unroll(full)
      for (int m = 0; m < ROW_TILES; m++) {
        threadgroup float2* to = reinterpret_cast<threadgroup float2*>(
            q + 8 * (m * D + BEGIN) + 2 * (kWidth * at.lane + kShare * simdgroup));
#pragma clang loop unroll(full)
        for (int i = 0; i < kShare; i++) {
          const float2 low_scale = of_numbers<Rows::kBits>(low_scales[i], low_biases[i]);
          const float2 high_scale = of_numbers<Rows::kBits>(high_scales[i], high_biases[i]);
          const float2 two = float2(float(first[m][i]), float(second[m][i]));
          to[i] = two * float2(low_scale.x, high_scale.x);
          biases[m] += two.x * low_scale.y + two.y * high_scale.y;
        }
      }
    }
    rest.stage(page, at, simdgroup, q, biases);
  }
};

template <typename Rows, typename T, int D, int ROW_TILES, int SIMDGROUPS, int BEGIN>
struct QueryShare<Rows, T, D, ROW_TILES, SIMDGROUPS, BEGIN, false> {
  void load(int, const device T*, LanePlace, short) {}

  void stage(PageScales<T>, LanePlace, short, threadgroup float*,
             thread float (&)[ROW_TILES]) const {}
};

template <typename Rows, typename T, int D, int ROW_TILES, int SIMDGROUPS>
struct TileQueries<Rows, T, D, ROW_TILES, SIMDGROUPS, true> {
  typedef float Element;
  enum { kRows = 8 * ROW_TILES, kSums = SIMDGROUPS };

  threadgroup float* q;
  threadgroup float* sums; // [SIMDGROUPS, kRows], q . bias of a simdgroup's share
  int page;                // whose scales are in q
  float biases[ROW_TILES];
  QueryShare<Rows, T, D, ROW_TILES, SIMDGROUPS> share;

  void begin(int m, const device T* row, LanePlace at, short simdgroup) {
    page = -1;
    share.load(m, row, at, simdgroup);
  }

  // All simdgroups have passed the barriers of the step before, so have read what is
  // overwritten.
  template <int STEP>
  void enter_page(int slot, thread const PageWalk<STEP>& walk, PageScales<T> scales, LanePlace at,
                  short simdgroup) {
    const int next = walk.page_of(slot);
    if (next == page) {
      return;
    }
    page = next;
    const long channels = walk.page_head(page) * D;
#pragma clang loop unroll(full)
    for (int m = 0; m < ROW_TILES; m++) {
      biases[m] = 0;
    }
    share.stage(PageScales<T>{scales.scales + channels, scales.biases + channels}, at, simdgroup, q,
                biases);
#pragma clang loop unroll(full)
    for (int m = 0; m < ROW_TILES; m++) {
      const float sum = row_sum(biases[m]);
      if (at.column == 0) {
        sums[simdgroup * kRows + 8 * m + at.row] = sum;
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
#pragma clang loop unroll(full)
    for (int m = 0; m < ROW_TILES; m++) {
      biases[m] = 0;
#pragma clang loop unroll(full)
      for (int s = 0; s < SIMDGROUPS; s++) {
        biases[m] += sums[s * kRows + 8 * m + at.row];
      }
    }
  }

  float bias(int m) const {
    return biases[m];
  }
};

} // namespace paged_mlx

#endif
