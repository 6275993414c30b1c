// The places of K and V of a step's sequences: the same for all layers.
#pragma once

#include <cstdint>
#include <memory>

#include "mlx/array.h"

namespace paged_mlx {

namespace mx = mlx::core;

struct FetchTables {
  int batch, max_pages, num_tokens; // num_tokens: of a row, padding included; 0: all are in pages
  int length;                       // columns of the gather
  int skip;                         // columns at its front that handles leave out
  bool ragged;                      // pages are not one after the other from column 0

  // int32: block_tables [batch, max_pages], context_lens [batch], slots [batch *
  // num_tokens], and if ragged page_starts and page_lens [batch, max_pages].
  // context_lens: the column behind the last token that the pages hold. slots:
  // where the new tokens go in the gather, seen as `batch` pages of `length` slots.
  // page_starts: the column of each page's first token.
  mx::array words;

  // Positions in `words`.
  int context_lens() const {
    return batch * max_pages;
  }
  int slots() const {
    return context_lens() + batch;
  }
  int page_starts() const {
    return slots() + batch * num_tokens;
  }
  int page_lens() const {
    return page_starts() + batch * max_pages;
  }
  int num_words() const {
    return ragged ? page_lens() + batch * max_pages : page_starts();
  }
};

// A step as the adapter knows it. Nothing is kept after the call.
struct FetchStep {
  int batch, width;            // of block_tables
  const int32_t* block_tables; // [batch, width]
  int num_starts;              // must be batch
  const int32_t* starts;       // [batch]: position of each row's first new token
  const int32_t* counts;       // [batch]: its new tokens, padding apart; null: num_tokens
  int num_tokens;              // of a row, padding included
  bool written;                // the pages hold the new tokens already
  int num_freed;               // pages at the front that every sequence gave back
  int page_size, length, skip;
  const int32_t* page_starts; // [batch, width]; null: not ragged
  const int32_t* page_lens;
};

// The pages that every sequence gave back are left out. The new tokens of all rows stand in
// the last columns: shorter rows are moved to the right, by giving each page its first column.
std::shared_ptr<const FetchTables> make_fetch_tables(const FetchStep& step);

} // namespace paged_mlx
