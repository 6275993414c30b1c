// From a call to dispatches: which variant of which kernel, its bindings, its
// grid. No MLX in here, and no Metal: everything goes through an Encoder.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/attention.h"
#include "metal/encoder.h"
#include "metal/long_work.h"
#include "metal/variant.h"
#include "page_format.h"
#include "plan/cost.h"

namespace paged_mlx::metal {

using cpu::DType;

// Its name in Metal.
const char* type_name(DType dtype);

// Of a side whose pages are codes.
struct ScaleBuffers {
  Buffer scales = nullptr, biases = nullptr;
};

// The fields mean what they mean in cpu::AttentionArgs.
struct AttendCall {
  DType dtype;
  Buffer q, k_pages, v_pages;
  Buffer plan;
  const int32_t* words; // the plan again, as the host reads it
  Buffer out, lse;
  int head_dim, v_head_dim;
  AttentionOptions options;
  Buffer alibi_slopes, sinks, mask; // those that the options have
  int64_t mask_head_stride, mask_token_stride;
  ItemRange items;                   // what this call attends
  Buffer partial_out, partial_state; // of all ranges of a plan; null: scratch memory

  PageFormats formats;
  ScaleBuffers k_scales, v_scales;
  Buffer open_k, open_v; // the open pages, where the formats have some
};

void attend(Encoder& encoder, const AttendCall& call);

// Bytes of one row of a head; of a dense side.
struct RowBytes {
  int k, v;
};

struct WritePagesCall {
  Buffer k, v; // v null: only keys
  Buffer k_pages, v_pages;
  Buffer slots;
  int tokens, num_kv_heads, page_size;
  RowBytes row;

  // Of pages that are not dense. Where there are open pages, k_pages and v_pages are those, and
  // slots are theirs.
  PageFormats formats = {};
  DType dtype = DType::float32;
  int head_dim = 0, v_head_dim = 0;
  ScaleBuffers k_scales = {}, v_scales = {};
};

void write_pages(Encoder& encoder, const WritePagesCall& call);

// Pages of one layer, of formats that have open pages, are quantised as a whole.
struct SealPagesCall {
  Buffer k, v; // [n, num_kv_heads, page_size, D or DV], V rotated or not
  bool rotated;
  Buffer k_pages, v_pages;
  ScaleBuffers k_scales, v_scales;
  Buffer pairs; // int32 [num_pairs, 3]: source page, target page, tokens of it
  int num_pairs, num_kv_heads, page_size;
  PageFormats formats;
  DType dtype;
  int head_dim, v_head_dim;
};

void seal_pages(Encoder& encoder, const SealPagesCall& call);

struct CopyPagesCall {
  std::vector<Buffer> pools;
  std::vector<int64_t> page_bytes; // of each pool
  Buffer pairs;
  int num_pairs;
};

void copy_pages(Encoder& encoder, const CopyPagesCall& call);

struct GatherPagesCall {
  Buffer k_pages, v_pages;
  Buffer tables, context_lens;
  Buffer page_starts, page_lens; // null: not ragged
  Buffer k_out, v_out;
  int batch, max_pages, length, num_kv_heads, page_size;
  RowBytes row;

  // Of pages that are not dense.
  PageFormats formats = {};
  DType dtype = DType::float32;
  int head_dim = 0, v_head_dim = 0;
  ScaleBuffers k_scales = {}, v_scales = {};
  Buffer open_k = nullptr, open_v = nullptr; // pages of ids from num_sealed on
  int num_sealed = 0;
};

void gather_pages(Encoder& encoder, const GatherPagesCall& call);

struct MergeStatesCall {
  DType dtype;
  std::vector<Buffer> outs, lses;
  Buffer out, lse;
  int64_t rows;
  int dim;
};

void merge_states(Encoder& encoder, const MergeStatesCall& call);

// The old contents of a buffer that a write could not reuse.
void copy_buffer(Encoder& encoder, Buffer from, Buffer to, int64_t bytes);

// How a kernel attends items of one kind.
struct Body {
  const char* kernel;
  int rows;       // that a threadgroup attends
  int simdgroups; // of a threadgroup
};

// Most rows per KV head that an item of each kind has on this GPU, by what its bodies hold.
KindRows kind_rows(int head_dim, int v_head_dim, DType dtype, PageFormats formats = {});

// The body that attends items of a kind, of at most `rows` rows per KV head. Where a plan made
// for another device puts more rows into a kind than its bodies hold, that of the next kind.
Body choose_body(PlanKind kind, int rows, int head_dim, int v_head_dim, DType dtype,
                 PageFormats formats = {});

// A body's text for threadgroups of so many simdgroups; its function constants are not set.
Variant body_text(const Body& body, int simdgroups, DType dtype, int head_dim, int v_head_dim,
                  PageFormats formats = {});

} // namespace paged_mlx::metal
