// The plan: one int32 array that the planner writes and every backend reads.
//
// A step of attention is cut, on the host, into work items. An item is a set of
// query tokens (all of whose heads attend) against a run of pages. Items that
// share a token are joined by a merge. The array is
//
//   PlanHeader | items | row_tokens | positions | row_ends | pages
//              | page_starts, page_lens (ragged tables only) | merges | parts
//
// and the header holds the word offset of each part. Everything is a plain int:
// page ids and positions fit in 31 bits; element offsets into the pool do not
// and must be computed in 64 bits by the reader.
//
// Included by host C++ and by the Metal sources: ASCII, no includes, no std.
#ifndef PAGED_MLX_PLAN_FORMAT_H
#define PAGED_MLX_PLAN_FORMAT_H

namespace paged_mlx {

// Padding of a block table. Never read by a kernel.
#define PAGED_MLX_NO_PAGE (-1)

#define PAGED_MLX_PLAN_MAGIC 0x504c4e31

// Which body attends an item. Items are stored kind by kind, those of a kind over
// sealed pages first and then those over open pages, longest first of each.
enum PlanKind {
  kVectorItem = 0, // one or two rows per KV head
  kTileItem = 1,   // a few rows: decode of a head group, a short verify
  kWideItem = 2,   // many rows: prefill tiles, a prefix shared by many
  kNumPlanKinds = 3
};

struct PlanHeader {
  int magic;
  int num_words; // words in use; the array may be longer

  int num_items[kNumPlanKinds];
  int num_tokens;     // query tokens of the step
  int num_row_tokens; // tokens named by items, with repeats
  int num_pages;      // pages named by items, with repeats
  int num_partials;   // partial results, one per (item that is not final, token)
  int num_merges;
  int num_parts;

  // Word offsets from the start of the array.
  int items;       // PlanItem  [sum(num_items)]
  int row_tokens;  // int       [num_row_tokens]  query token of each row token
  int positions;   // int       [num_tokens]      position of the token in its sequence
  int row_ends;    // int       [num_tokens]      one past the last key it may see
  int pages;       // int       [num_pages]       page ids, item after item; of open pages their
                   //                             number in the arrays of open pages
  int page_starts; // int       [num_pages]       position of the page's first token; 0: not ragged
  int page_lens;   // int       [num_pages]       tokens of the sequence in the page; 0: not ragged
  int merges;      // PlanMerge [num_merges]
  int parts;       // int       [num_parts]       partial slots, merge after merge

  int num_q_heads;
  int num_kv_heads;
  int page_size;
  int causal;         // 0 or 1; already applied to row_ends
  int sliding_window; // keys a token may see, itself included; 0: no window
  int max_page_id;    // largest id of a sealed page named, -1 when there is none
  int max_row_end;    // longest context named

  // Open pages, of a pool whose format seals pages: they lie in arrays of their own.
  int max_open_page;                 // largest open page named, -1 when there is none
  int num_open_items[kNumPlanKinds]; // of num_items, those over open pages
};

// X(name) for each field of a header that is one number, but for `magic`.
// clang-format off
#define PAGED_MLX_PLAN_FIELDS(X) \
  X(num_words) X(num_tokens) X(num_row_tokens) X(num_pages) X(num_partials) X(num_merges) \
  X(num_parts) X(items) X(row_tokens) X(positions) X(row_ends) X(pages) X(page_starts) \
  X(page_lens) X(merges) X(parts) X(num_q_heads) X(num_kv_heads) X(page_size) X(causal) \
  X(sliding_window) X(max_page_id) X(max_row_end) X(max_open_page)
// clang-format on

// Row r of an item and a KV head is query head (kv_head * gqa_factor + r %
// gqa_factor) of query token row_tokens[row_begin + r / gqa_factor].
//
// A row may see the keys of the item whose position p satisfies
//   key_begin <= p < key_end,  p < row_ends[token],
//   p > positions[token] - sliding_window   (when there is a window).
struct PlanItem {
  int row_begin;      // into row_tokens
  int row_count;      // tokens
  int page_begin;     // into pages
  int page_count;     // 0: the rows see nothing
  int first_position; // position of slot 0 of the first page (not ragged)
  int key_begin;      // first key position that any row may see
  int key_end;        // one past the last
  int partial;        // first partial slot of the item, one per token; -1: final
};

// The result of one token is the merge of part_count partial states. A token
// all of whose keys lie in one item that is not final has a merge of one part.
struct PlanMerge {
  int token;
  int part_begin; // into parts
  int part_count; // at least 1
};

} // namespace paged_mlx

#endif
