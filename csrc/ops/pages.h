// Operations that move pages: write, copy, gather.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "mlx/array.h"
#include "mlx/utils.h"

#include "page_format.h"

namespace paged_mlx {

namespace mx = mlx::core;

// How an operation that writes pages treats the buffer it is given.
enum class WriteMode {
  donate, // reuse the buffer when MLX says nobody else holds it, else copy it
  alias,  // always write through: for the linear versions of a PagePool
};

// Whole buffers copied so far because a write could not be done in place.
int64_t buffer_copies();

// `tokens`, k [tokens, num_kv_heads, head_dim] and v [tokens, num_kv_heads, v_head_dim],
// go to slots (int32 [tokens]; -1 skips) of a layer's pages, or where the formats have them of
// its open pages. Returns the next versions of the layer's arrays.
std::vector<mx::array> write_pages(const std::vector<mx::array>& tokens,
                                   const std::vector<mx::array>& pages, const mx::array& slots,
                                   WriteMode mode, PageFormats formats, mx::StreamOrDevice s = {});

// Pages are quantised as a whole, of formats that have open pages. For each layer, `sources`
// has its K and V in page shape, [n, num_kv_heads, page_size, head_dim] and alike, V `rotated`
// or not, and `pages` its arrays: pairs int32 [m, 3] are (source page, target page, tokens of
// it). Returns the next versions of the arrays.
std::vector<std::vector<mx::array>> seal_pages(const std::vector<mx::array>& sources,
                                               const std::vector<std::vector<mx::array>>& pages,
                                               const mx::array& pairs, PageFormats formats,
                                               bool rotated, mx::StreamOrDevice s = {});

// Page pairs[i, 0] of every array goes to page pairs[i, 1]. pairs: int32 [n,
// 2]; no page is both a source and a target, none a target twice. Returns the
// next versions of the arrays.
std::vector<mx::array> copy_pages(const std::vector<mx::array>& pools, const mx::array& pairs,
                                  WriteMode mode, mx::StreamOrDevice s = {});

// K and V of each sequence, contiguous: {k [batch, num_kv_heads, length,
// head_dim], v, pages'...}. Row j of a sequence is position j; rows
// past its context and rows of NO_PAGE are 0. With page_starts and page_lens
// (int32 [batch, max_pages]) the table is ragged.
std::vector<mx::array> gather_pages(const std::vector<mx::array>& pages,
                                    const mx::array& block_tables, const mx::array& context_lens,
                                    int length, const std::optional<mx::array>& page_starts,
                                    const std::optional<mx::array>& page_lens, PageFormats formats,
                                    mx::StreamOrDevice s = {});

} // namespace paged_mlx
