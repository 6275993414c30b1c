// Rows of pages on the host: where they lie, and how they get in and out. A row is one
// token of one head; `page_row` of kernels/arguments.h numbers them for host and kernels.
#pragma once

#include <cstdint>
#include <vector>

#include "mlx/array.h"
#include "mlx/utils.h"

#include "cpu/page_side.h"
#include "ops/token_rows.h"

namespace paged_mlx {

namespace mx = mlx::core;

// Pages as the kernels read them, row by row: `pages` themselves, unless they may lie in
// memory in another way.
mx::array row_contiguous(const mx::array& pages, mx::Stream s);

inline int row_bytes(const mx::array& pages) {
  return pages.shape(3) * int(pages.itemsize());
}

// New tokens of one side, K or V, on their way to slots of pages.
class SlotWriter {
 public:
  SlotWriter(const mx::array& tokens, const cpu::PageSide& side) : tokens_(tokens), side_(side) {}

  int64_t num_tokens() const {
    return tokens_.num_tokens();
  }
  int64_t num_slots() const {
    return int64_t(side_.num_pages) * side_.page_size;
  }

  void write(int64_t token, int32_t slot) const;

 private:
  TokenRows tokens_;
  cpu::PageSide side_;
};

// Writes all tokens of every writer to slots[token]; below 0 skips a token. A slot that the
// pages do not have is refused: `op` and `name` say whose argument it is.
void write_slots(const char* op, const char* name, const std::vector<SlotWriter>& writers,
                 const int32_t* slots);

// Sequences made contiguous: what lies in pages is copied, the rest is 0.
struct PageGather {
  const int32_t* tables;      // [batch, max_pages]
  const int32_t* lens;        // [batch]: the column behind a sequence's last token
  const int32_t* page_starts; // [batch, max_pages]: each page's first column; null: not ragged
  const int32_t* page_lens;
  int batch, max_pages, length, num_kv_heads, page_size;
  int num_sealed = INT32_MAX; // ids from here on are open pages, number 0 on

  // out: [batch, num_kv_heads, length, D], of the side's dtype. `open`: of the open pages.
  void run(const cpu::PageSide& side, const cpu::PageSide& open, char* out) const;
};

} // namespace paged_mlx
