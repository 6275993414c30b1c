// Decode attention: the rows of all KV heads of one item against its pages.
//
//   q    [kv_head, row, D]   DotProduct::Query    scratch
//   acc  [kv_head, row, Dv]  float, lane order    scratch
//
// Pages are the outer loop and KV heads the inner one, so that memory is read
// in whole pages, and each K and V once for all rows. Blocks of keys start at
// positions that depend on page_size alone, so a row's numbers do not depend on
// the rest of its item.
#pragma once

#include "cpu/tile_block.h"
#include "cpu/tile_integers.h"

namespace paged_mlx::cpu {
namespace {

constexpr int kMaxTileRows = 64;               // rows of a KV head in one pass
constexpr size_t kTileStateBytes = 512 * 1024; // q and acc of one pass
// Small vectors take so long for a block that it is early enough to read the next one from
// memory meanwhile. Large ones read further ahead: so many bytes, or small spans as a whole.
constexpr bool kReadFurther = kLanes >= 16;
constexpr int64_t kFurtherBytes = 32 * 1024;
constexpr int64_t kSpanBytes = 256 * 1024;

// The keys that some row of a group sees, and those that all of them see.
struct GroupRange {
  int begin;
  int end;
  int all_begin;
  int all_end;
};

GroupRange join(GroupRange a, GroupRange b) {
  const int all_begin = max_int(a.all_begin, b.all_begin);
  const int all_end = min_int(a.all_end, b.all_end);
  if (a.begin >= a.end) {
    return {b.begin, b.end, all_begin, all_end};
  }
  if (b.begin >= b.end) {
    return {a.begin, a.end, all_begin, all_end};
  }
  return {min_int(a.begin, b.begin), max_int(a.end, b.end), all_begin, all_end};
}

GroupRange range_of(const Row& row) {
  return {row.begin, row.end, row.begin, row.end};
}

GroupRange group_range(const TilePass& pass, int first_row) {
  GroupRange range = range_of(pass.rows[first_row]);
  for (int r = first_row + 1; r < min_int(first_row + kRowGroup, pass.num_rows); r++) {
    range = join(range, range_of(pass.rows[r]));
  }
  return range;
}

// Bytes of K and V of one KV head of a span.
int64_t unit_bytes(const Job& job, int span_keys, int itemsize) {
  return int64_t(span_keys) * (job.head_dim + job.v_head_dim) * itemsize;
}

// A block of the walk: index of its span, first key in it, KV head.
struct Place {
  int span;
  int first;
  int kv_head;
};

Place next_block(const Job& job, const Span& span, Place here) {
  if (here.first + kBlockKeys < span.keys) {
    return {here.span, here.first + kBlockKeys, here.kv_head};
  }
  const int head = here.kv_head + 1;
  return head < job.num_kv_heads ? Place{here.span, 0, head} : Place{here.span + 1, 0, 0};
}

// The next span in the order it lies in memory, K of all heads and then V, in
// equal parts: long runs of lines are read faster than short ones.
Ahead next_span(const Job& job, Place here, Place next) {
  Ahead ahead;
  ahead.span = here.span + 1;
  ahead.first = here.first;
  ahead.next_head_row = int64_t(next.kv_head) * job.page_size;
  for (int i = 0; i < 2; i++) {
    const int at = 2 * here.kv_head + i;
    ahead.pool[i] = at < job.num_kv_heads ? job.k_pages : job.v_pages;
    ahead.head_row[i] = int64_t(at % job.num_kv_heads) * job.page_size;
  }
  return ahead;
}

// What is read from memory while a block is attended.
Ahead look_ahead(const Job& job, Place here, Place next, int64_t bytes) {
  Place there = next;
  if constexpr (kReadFurther) {
    if (job.head_dim == job.v_head_dim && job.num_kv_heads % 2 == 0 &&
        bytes * job.num_kv_heads <= kSpanBytes) {
      return next_span(job, here, next);
    }
    const int heads = clamp_int(int(kFurtherBytes / (bytes > 0 ? bytes : 1)), 1, job.num_kv_heads);
    const int at = here.kv_head + heads;
    there = {here.span + at / job.num_kv_heads, here.first, at % job.num_kv_heads};
  }
  const int64_t row = int64_t(there.kv_head) * job.page_size;
  const int64_t next_row = int64_t(next.kv_head) * job.page_size;
  return {there.span, there.first, {job.k_pages, job.v_pages}, {row, row}, next_row};
}

// Rows of the pool for keys [first, first + 16) of a span, of which the item
// may read those in [low, high).
void locate(const Walk& walk, const Span& span, int first, Block& block) {
  if (walk.one_page()) {
    const int64_t row = walk.row(span, first);
    for (int j = 0; j < kBlockKeys; j++) {
      block.rows[j] = row + clamp_int(j, block.low, block.high - 1);
    }
    return;
  }
  for (int j = 0; j < kBlockKeys; j++) {
    block.rows[j] = walk.row(span, first + clamp_int(j, block.low, block.high - 1));
  }
}

// The same for a block that comes later, a row per quad of keys.
void locate_ahead(const Walk& walk, const Span& span, int index, int first,
                  int64_t (&rows)[kBlockQuads]) {
  const int64_t row = walk.row_ahead(index, first);
  for (int i = 0; i < kBlockQuads; i++) {
    rows[i] = walk.one_page() ? row + i * kQuad
                              : walk.row_ahead(index, min_int(first + i * kQuad, span.keys - 1));
  }
}

// The row groups of `chosen`, a bit each, of one KV head, whose first row in a page is
// `head_row`, against one block.
template <typename X, bool kAhead>
void attend_rows(const TilePass& pass, const GroupRange* groups, const Block& whole,
                 const State& state, int kv_head, int64_t head_row, const Ahead& ahead,
                 uint32_t chosen = ~0u) {
  Block block = whole;
  bool first = kAhead;
  for (int r = 0; r < pass.num_rows; r += kRowGroup) {
    const GroupRange range = groups[r / kRowGroup];
    block.low = max_int(range.begin - block.position, whole.low);
    block.high = min_int(range.end - block.position, whole.high);
    if (block.low >= block.high || !(chosen >> r / kRowGroup & 1)) {
      continue;
    }
    block.seen_alike = range.all_begin <= block.position + block.low &&
        range.all_end >= block.position + block.high;
    block.seen_by_all = block.seen_alike && block.high - block.low == kBlockKeys;
    if constexpr (kAhead) {
      if (first) {
        attend_group<X, true>(pass, block, state, r, kv_head, head_row, ahead);
        first = false;
        continue;
      }
    }
    attend_group<X, false>(pass, block, state, r, kv_head, head_row, ahead);
  }
}

template <typename X>
void attend_span(const TilePass& pass, const Walk& walk, int index, const GroupRange& all,
                 const GroupRange* groups, const State* states) {
  const Job& job = pass.job;
  const Span span = walk.span(index);
  const int begin = max_int(all.begin - span.position, 0);
  const int end = min_int(all.end - span.position, span.keys);
  const int64_t bytes = unit_bytes(job, span.keys, sizeof(typename X::T));
  for (int h = 0; h < job.num_kv_heads; h++) {
    for (int first = begin / kBlockKeys * kBlockKeys; first < end; first += kBlockKeys) {
      Block block;
      block.position = span.position + first;
      block.low = max_int(begin - first, 0);
      block.high = min_int(end - first, kBlockKeys);
      const Place here = {index, first, h}, next = next_block(job, span, here);
      const Ahead ahead = look_ahead(job, here, next, bytes);
      locate(walk, span, first, block);
      locate_ahead(walk, span, ahead.span, ahead.first, block.far);
      if constexpr (kReadFurther) {
        locate_ahead(walk, span, next.span, next.first, block.next);
      } else {
        memcpy(block.next, block.far, sizeof(block.far));
      }
      attend_rows<X, true>(pass, groups, block, states[h], h, int64_t(h) * job.page_size, ahead);
    }
  }
}

// The rows of an item over pages of codes. A block of keys at a time becomes floats.
class CodedPass {
 public:
  // `job` is a copy of the pass's, whose pages become the block.
  CodedPass(const TilePass& pass, Job& job, const GroupRange& all, const GroupRange* groups,
            const State* states, Scratch& scratch)
      : job_(job),
        pass_{job, pass.item, pass.rows, pass.num_rows, pass.q_stride, pass.acc_stride},
        walk_(job, pass.item),
        all_(all),
        groups_(groups),
        states_(states),
        k_(job.k),
        v_(job.v),
        keys_(scratch.take<float>(size_t(kBlockKeys) * job.head_dim)),
        values_(scratch.take<float>(size_t(kBlockKeys) * job.v_head_dim)) {
    job.k_pages = keys_;
    job.v_pages = values_;
  }

  void attend(Scratch& scratch) {
#ifdef PAGED_MLX_TILE_INTEGERS
    if (walk_.one_page() && takes_integers(job_)) {
      IntegerState integers(pass_, states_, scratch);
      for (int i = 0; i < walk_.count(); i++) {
        attend_span(i, &integers);
      }
      return;
    }
#endif
    for (int i = 0; i < walk_.count(); i++) {
      attend_span(i, nullptr);
    }
  }

 private:
#ifndef PAGED_MLX_TILE_INTEGERS
  using IntegerState = void;
#endif

  void attend_span(int index, IntegerState* integers) {
    const Span span = walk_.span(index);
    const int begin = max_int(all_.begin - span.position, 0);
    const int end = min_int(all_.end - span.position, span.keys);
    for (int h = 0; h < job_.num_kv_heads; h++) {
      for (int first = begin / kBlockKeys * kBlockKeys, step = 0; first < end; first += step) {
        uint32_t rest = ~0u; // row groups
        step = kBlockKeys;
#ifdef PAGED_MLX_TILE_INTEGERS
        const int whole = min_int(kChunkKeys, (end - first) / kBlockKeys * kBlockKeys);
        if (integers && first >= begin && whole > 0) {
          step = whole;
          rest = attend_integers(*integers, index, span, h, first, whole);
        }
#endif
        for (int block = first; rest && block < min_int(first + step, end); block += kBlockKeys) {
          attend_floats(span, h, block, begin, end, rest);
        }
      }
    }
  }

  void attend_floats(const Span& span, int h, int first, int begin, int end, uint32_t chosen) {
    Block block{};
    block.position = span.position + first;
    block.low = max_int(begin - first, 0);
    block.high = min_int(end - first, kBlockKeys);
    locate(walk_, span, first, block);
    for (int j = block.low; j < block.high; j++) {
      const int64_t row = block.rows[j] + int64_t(h) * job_.page_size;
      k_.read(row, keys_ + j * job_.head_dim);
      v_.read(row, values_ + j * job_.v_head_dim);
    }
    for (int j = 0; j < kBlockKeys; j++) {
      block.rows[j] = clamp_int(j, block.low, block.high - 1);
    }
    attend_rows<Float32, false>(pass_, groups_, block, states_[h], h, 0, {}, chosen);
  }

#ifdef PAGED_MLX_TILE_INTEGERS
  // Attends the row groups that see the whole chunk; returns the others.
  uint32_t attend_integers(IntegerState& integers, int index, const Span& span, int h, int first,
                           int keys) {
    const int64_t row = walk_.row(span, first) + int64_t(h) * job_.page_size;
    if (!k_scales_.load_keys(*job_.k, row, keys) || !v_scales_.load_keys(*job_.v, row, keys)) {
      return ~0u;
    }
    int64_t next = row + keys;
    if (first + keys >= span.keys) {
      const bool last = h + 1 == job_.num_kv_heads;
      next = walk_.row_ahead(index + last, 0) + (last ? 0 : int64_t(h + 1) * job_.page_size);
    }
    auto codes = [](const PageSide& side, int64_t at) {
      return static_cast<const uint8_t*>(side.pages) + at * side.dim * code_bits(side.format) / 8;
    };
    auto ahead = [&](const PageSide& side) {
      prefetch_scales(side, next, keys);
      return reinterpret_cast<const char*>(codes(side, next));
    };
    const Chunk chunk{span.position + first, keys,           codes(*job_.k, row),
                      codes(*job_.v, row),   ahead(*job_.k), ahead(*job_.v)};
    const IntegerRows& q = integers.rows(pass_, states_[h], k_, h, row);
    uint32_t rest = 0;
    for (int r = 0; r < pass_.num_rows; r += kRowGroup) {
      const GroupRange& range = groups_[r / kRowGroup];
      const bool sees_all = range.all_begin <= chunk.position &&
          range.all_end >= chunk.position + keys && range.begin < range.end;
      const int rows = min_int(kRowGroup, pass_.num_rows - r);
      if (!sees_all ||
          !attend_chunk_rows(rows, pass_, chunk, k_scales_, v_scales_, q, states_[h], r, h)) {
        rest |= 1u << r / kRowGroup;
      }
    }
    return rest;
  }

  ChunkScales k_scales_, v_scales_;
#endif

  const Job& job_;
  TilePass pass_;
  Walk walk_;
  GroupRange all_;
  const GroupRange* groups_;
  const State* states_;
  RowReader k_, v_;
  float *keys_, *values_;
};

template <typename X>
void start_states(const TilePass& pass, Scratch& scratch, State* states) {
  using Query = typename DotProduct<X>::Query;
  const Job& job = pass.job;
  for (int h = 0; h < job.num_kv_heads; h++) {
    State& state = states[h];
    auto* const q = scratch.take<Query>(size_t(pass.num_rows) * pass.q_stride);
    state.q = q;
    state.acc = scratch.take<float>(size_t(pass.num_rows) * pass.acc_stride);
    state.most = scratch.take<float>(pass.num_rows);
    state.sums = scratch.take<float>(size_t(pass.num_rows) * kLanes);
    memset(state.acc, 0, sizeof(float) * pass.num_rows * pass.acc_stride);
    memset(state.sums, 0, sizeof(float) * pass.num_rows * kLanes);
    for (int r = 0; r < pass.num_rows; r++) {
      const Row& row = pass.rows[r];
      const int64_t at = int64_t(row.token) * job.num_q_heads + row.head + h * job.gqa_factor;
      pack_query<X>(job, at, q + int64_t(r) * pass.q_stride);
      state.most[r] = kNegInf;
    }
  }
}

template <typename X>
void finish_states(const TilePass& pass, const State* states) {
  for (int h = 0; h < pass.job.num_kv_heads; h++) {
    for (int r = 0; r < pass.num_rows; r++) {
      Row row = pass.rows[r];
      row.head += h * pass.job.gqa_factor;
      finish_attended<X>(pass.job, row, states[h].acc + int64_t(r) * pass.acc_stride,
                         states[h].most[r], sum(load(states[h].sums + r * kLanes)));
    }
  }
}

// Rows of a KV head that one pass over the pages can hold the states of.
int tile_rows(const Job& job) {
  const size_t row = sizeof(float) * (padded(job.head_dim) + padded(job.v_head_dim) + kLanes);
  const int rows = int(kTileStateBytes / (row * job.num_kv_heads)) / kRowGroup * kRowGroup;
  return clamp_int(rows, kRowGroup, kMaxTileRows);
}

size_t tile_scratch_bytes(const Job& job) {
  const size_t row = sizeof(float) * (padded(job.head_dim) + padded(job.v_head_dim) + kLanes + 1);
  return job.num_kv_heads * (tile_rows(job) * row + sizeof(State) + 5 * 64) +
      kMaxTileRows * (sizeof(Row) + sizeof(GroupRange)) + 6 * 64 +
      kBlockKeys * (job.head_dim + job.v_head_dim) * sizeof(float) +
      integer_scratch_bytes(job, tile_rows(job));
}

template <typename X>
void attend_pass(const TilePass& pass, Scratch scratch) {
  State* const states = scratch.take<State>(pass.job.num_kv_heads);
  GroupRange* const groups = scratch.take<GroupRange>(kMaxTileRows / kRowGroup);
  GroupRange all = {0, 0, 0, 0};
  for (int r = 0; r < pass.num_rows; r += kRowGroup) {
    groups[r / kRowGroup] = group_range(pass, r);
    all = join(all, groups[r / kRowGroup]);
  }
  start_states<X>(pass, scratch, states);
  const Walk walk(pass.job, pass.item);
  if constexpr (kAttendsCodes<X>) {
    if (pass.job.k) {
      Job job = pass.job;
      CodedPass(pass, job, all, groups, states, scratch).attend(scratch);
      return finish_states<X>(pass, states);
    }
  }
  for (int i = 0; i < walk.count(); i++) {
    attend_span<X>(pass, walk, i, all, groups, states);
  }
  finish_states<X>(pass, states);
}

template <typename X>
void attend_tile(const Job& job, int index, char* memory) {
  const PlanItem& item = job.items[index];
  Scratch scratch{memory};
  Row* const rows = scratch.take<Row>(kMaxTileRows);
  const int num_rows = item.row_count * job.gqa_factor;
  const int step = tile_rows(job);
  for (int first = 0; first < num_rows; first += step) {
    const int count = min_int(step, num_rows - first);
    for (int r = 0; r < count; r++) {
      rows[r] = make_row(job, item, 0, first + r);
    }
    attend_pass<X>({job, item, rows, count, padded(job.head_dim), padded(job.v_head_dim)}, scratch);
  }
}

} // namespace
} // namespace paged_mlx::cpu
