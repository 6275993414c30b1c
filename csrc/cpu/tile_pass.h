// What decode attention works on, a block of keys at a time, and the cache lines that it
// prefetches meanwhile.
//
// Every line of K and V is prefetched twice: far ahead from memory, and into L1 in the
// phase before the one that reads it. Of prefetches that come as fast as memory answers
// the processor drops some (benchmarks/dropped_prefetches.cpp counts them), and each of
// those would be waited for; the second time finds it.
#pragma once

#include "cpu/walk.h"

namespace paged_mlx::cpu {
namespace {

constexpr int kRowGroup = 4;
constexpr int kQuad = 4; // keys scored together
constexpr int kBlockQuads = kBlockKeys / kQuad;

// Keys [low, high) of one block, and the pool rows that hold them.
struct Block {
  int position; // of key 0
  int low;
  int high;
  bool seen_by_all;         // all 16 keys, by every row of the group
  bool seen_alike;          // [low, high) by every row of the group, but for a mask
  int64_t rows[kBlockKeys]; // those outside [low, high) repeat the nearest inside
  // What to prefetch meanwhile, a row per quad of keys: from memory, and of the next block.
  int64_t far[kBlockQuads];
  int64_t next[kBlockQuads];
};

// What phase 1, and then phases 2 and 3, prefetch from memory while they work on a block:
// the rows of a pool, K or V, of some KV head in a block that comes later.
struct Ahead {
  int span;
  int first; // key of the span
  const void* pool[2];
  int64_t head_row[2];
  int64_t next_head_row; // of the block that comes next
};

// Four rows of what comes later, and four of what comes next.
struct Lines {
  const char* far;
  const char* near;
};

struct TilePass {
  const Job& job;
  const PlanItem& item;
  const Row* rows; // of KV head 0
  int num_rows;
  int q_stride;
  int acc_stride;
};

PAGED_MLX_INLINE void prefetch_line(Lines lines, int offset) {
  prefetch_far(lines.far + offset);
  prefetch_near(lines.near + offset);
}

// Prefetches the lines that begin in [offset, offset + kBytes).
template <int kBytes>
PAGED_MLX_INLINE void prefetch_part(Lines lines, int offset) {
  if constexpr (kBytes >= 64) {
    for (int b = 0; b < kBytes; b += 64) {
      prefetch_line(lines, offset + b);
    }
  } else if ((offset & 63) == 0) {
    prefetch_line(lines, offset);
  }
}

PAGED_MLX_INLINE void prefetch_range(Lines lines, int begin, int end) {
  for (int b = begin; b < end; b += 64) {
    prefetch_line(lines, b);
  }
}

template <typename T>
PAGED_MLX_INLINE const char* pool_row(const void* pool, int64_t row, int dim) {
  return static_cast<const char*>(pool) + row * dim * int64_t(sizeof(T));
}

} // namespace
} // namespace paged_mlx::cpu
