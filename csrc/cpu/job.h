// One call of attend(), as the kernels see it.
//
// Included by translation units that are compiled for different instruction
// sets: plain data only, no functions, no standard library.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/attention.h"
#include "plan_format.h"

namespace paged_mlx::cpu {

// Head dims of scratch and partial rows are padded to a multiple of this, twice
// the lanes of the widest vector.
constexpr int kDimAlign = 32;

struct Job {
  DType dtype; // of q and of out
  const void* q;
  const void* k_pages; // dense
  const void* v_pages;
  const PageSide* k; // where K or V is codes: both of them; else null
  const PageSide* v;
  void* out;
  float* lse;

  const PlanHeader* plan;
  const PlanItem* items;
  const int32_t* row_tokens;
  const int32_t* positions;
  const int32_t* row_ends;
  const int32_t* pages;
  const int32_t* page_starts; // null: not ragged
  const int32_t* page_lens;
  const PlanMerge* merges;
  const int32_t* parts;

  int num_q_heads;
  int num_kv_heads;
  int gqa_factor;
  int page_size;
  int head_dim;
  int v_head_dim;
  int sliding_window;

  AttentionOptions options;
  const float* alibi_slopes; // null: none
  const float* sinks;        // null: none
  const Mask* mask;          // null: none
  bool plain;                // a score is scale * dot, nothing else, and scale > 0
  float score_unit;          // kernels keep scores, and their maxima, in units of this:
                             // scale when plain, so that they need not multiply; else 1

  bool multiplies_codes; // the machine has AVX512-VNNI

  bool rotated; // V is: what was attended is rotated back when it is finished

  bool prefetch_next_item; // the caller will run item i + 1 after item i

  // One partial state per (partial slot, query head).
  float* partial_acc; // [num_partials, num_q_heads, partial_stride]
  float* partial_max; // [num_partials, num_q_heads], in score_unit
  float* partial_sum; // [num_partials, num_q_heads]
  int partial_stride;
};

constexpr int kMaxHeadDim = 512; // of K and of V
constexpr int kNumDTypes = 3;    // indexed by DType

// What a translation unit for one instruction set exports. `scratch` belongs to
// the calling thread, is aligned to 64 bytes and holds scratch_bytes(job).
struct Kernels {
  int lanes; // floats of a vector
  size_t (*scratch_bytes)(const Job& job);
  // All KV heads of one vector or tile item. Pages of codes are attended in float32.
  void (*attend_tile[kNumDTypes])(const Job& job, int item, char* scratch);
  // One KV head of one wide item.
  void (*attend_wide[kNumDTypes])(const Job& job, int item, int kv_head, char* scratch);
  // Merges [begin, end).
  void (*merge[kNumDTypes])(const Job& job, int begin, int end, char* scratch);

  // One token of one head, `from` or `to` in the dtype of the side.
  void (*write_row)(const PageSide& side, int64_t row, const void* from);
  void (*read_row)(const PageSide& side, int64_t row, void* to);
  // A page of one head, whose first row is `row`, of a format with a scale for each channel.
  void (*seal_channels)(const PageSide& side, int64_t row, const void* from, int tokens);
};

} // namespace paged_mlx::cpu
