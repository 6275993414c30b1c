// Tiles of K and V that the panels of a pass share, converted once for all of them.
//
// There are two: while the panels attend one, the next is filled key by key between
// their multiplications, so that reading and converting wait for nobody. A key's rows
// are prefetched kKeysAhead keys before they are read: far enough for memory, near
// enough to be in the cache still.
#pragma once

#include "cpu/rows.h"

namespace paged_mlx::cpu {
namespace {

constexpr int kTileKeys = kManyRegisters ? 64 : 72; // a multiple of what a panel meets at once
constexpr int kKeysAhead = 8;
constexpr int kLineFloats = 16; // of a cache line

// Keys [begin, end), positions.
struct KeyRange {
  int begin;
  int end;
};

struct Tile {
  float* k; // [kTileKeys, words]     words of DotProduct
  float* v; // [kTileKeys, v_stride]  float, lane order
};

// Floats from one V of a tile to the next: an odd number of lines, so that a column of
// a tile does not fall into a few sets of the cache.
constexpr int tile_v_stride(int v_dim) {
  return v_dim + (v_dim / kLineFloats % 2 ? 0 : kLineFloats);
}

constexpr size_t tile_floats(int words, int v_dim) {
  return size_t(kTileKeys) * (words + tile_v_stride(v_dim));
}

PAGED_MLX_INLINE Tile take_tile(Scratch& scratch, int words, int v_dim) {
  float* const k = scratch.take<float>(size_t(kTileKeys) * words);
  memset(k, 0, sizeof(float) * kTileKeys * words); // rows that hold no key are multiplied too
  return {k, scratch.take<float>(size_t(kTileKeys) * tile_v_stride(v_dim))};
}

template <typename X>
PAGED_MLX_INLINE void pack_row(const typename X::T* from, int n, float* words) {
  DotProduct<X>::pack_row(from, n, reinterpret_cast<typename DotProduct<X>::Query*>(words));
}

// Finds the pool rows of keys that are asked for in rising order.
class KeyCursor {
 public:
  KeyCursor(const Job& job, const PlanItem& item, int kv_head)
      : job_(job), item_(item), kv_head_(kv_head) {}

  int64_t row(int key) {
    while (key >= end_ && page_ + 1 < item_.page_count) {
      page_++;
      end_ = page_start(job_, item_, page_) + page_len(job_, item_, page_);
      offset_ = first_row(job_, item_, page_, kv_head_) - page_start(job_, item_, page_);
    }
    return offset_ + key;
  }

 private:
  const Job& job_;
  const PlanItem& item_;
  int kv_head_;
  int page_ = -1;
  int end_ = INT32_MIN;
  int64_t offset_ = 0;
};

// Fills one tile after the other with the keys of a range.
template <typename X>
class TileLoader {
 public:
  // `all`: the keys of the pass.
  TileLoader(const Job& job, const PlanItem& item, int kv_head, KeyRange all, int words, int v_dim)
      : job_(job),
        next_(job, item, kv_head),
        ahead_(job, item, kv_head),
        all_(all),
        words_(words),
        v_stride_(tile_v_stride(v_dim)),
        k_codes_(job.k),
        v_codes_(job.v) {
    for (int key = all.begin; key < min_int(all.begin + kKeysAhead, all.end); key++) {
      prefetch_key(key);
    }
  }

  // From now on `tile` is filled, which begins at `position`.
  void begin(Tile tile, int position) {
    tile_ = tile;
    position_ = position;
    keys_ = {max_int(position, all_.begin), min_int(position + kTileKeys, all_.end)};
    at_ = keys_.begin;
  }

  KeyRange keys() const {
    return keys_;
  }

  // Loads the part of the tile that is due when `done` of `steps` steps are done.
  PAGED_MLX_INLINE void advance(int done, int steps) {
    const int due = keys_.begin + (keys_.end - keys_.begin) * done / steps;
    while (at_ < due) {
      load_key(at_++);
    }
  }

 private:
  using T = typename X::T;

  const T* k_row(int64_t row) const {
    return static_cast<const T*>(job_.k_pages) + row * job_.head_dim;
  }
  const T* v_row(int64_t row) const {
    return static_cast<const T*>(job_.v_pages) + row * job_.v_head_dim;
  }

  void load_key(int key) {
    if (key + kKeysAhead < all_.end) {
      prefetch_key(key + kKeysAhead);
    }
    const int64_t row = next_.row(key);
    const int at = key - position_;
    if constexpr (kAttendsCodes<X>) {
      if (job_.k) {
        k_codes_.read(row, tile_.k + size_t(at) * words_);
        v_codes_.read(row, tile_.v + size_t(at) * v_stride_);
        pad(tile_.k + size_t(at) * words_, job_.head_dim);
        return pad(tile_.v + size_t(at) * v_stride_, job_.v_head_dim);
      }
    }
    pack_row<X>(k_row(row), job_.head_dim, tile_.k + size_t(at) * words_);
    widen_row<X>(v_row(row), job_.v_head_dim, tile_.v + size_t(at) * v_stride_);
  }

  void prefetch_key(int key) {
    if (job_.k) {
      return;
    }
    const int64_t row = ahead_.row(key);
    prefetch_row(k_row(row), job_.head_dim);
    prefetch_row(v_row(row), job_.v_head_dim);
  }

  static void prefetch_row(const T* row, int dim) {
    const char* const at = reinterpret_cast<const char*>(row);
    for (size_t b = 0; b < dim * sizeof(T); b += 64) {
      prefetch_far(at + b);
    }
  }

  const Job& job_;
  KeyCursor next_;
  KeyCursor ahead_;
  KeyRange all_;
  int words_;
  int v_stride_;
  Tile tile_ = {};
  int position_ = 0;
  KeyRange keys_ = {0, 0};
  int at_ = 0;
  RowReader k_codes_, v_codes_; // where pages are codes
};

} // namespace
} // namespace paged_mlx::cpu
