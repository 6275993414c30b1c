// One sequence's K or V, copied out of its pages on the CPU.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace paged_mlx {

// Copies the runs of one sequence that lie in pages, and zeroes the rest.
struct GatherRow {
  const int32_t *table, *starts, *lens; // starts and lens may be null
  int max_pages, context_len, length;
  int64_t num_kv_heads, page_size;

  void operator()(const char* pages, char* out, int64_t row_bytes) const {
    std::memset(out, 0, num_kv_heads * length * row_bytes);
    const int end = std::min(context_len, length);
    int start = 0;
    for (int e = 0; e < max_pages && start < end; e++) {
      start = starts ? starts[e] : int(e * page_size);
      const int count = std::min(lens ? lens[e] : int(page_size), end - start);
      if (count > 0 && table[e] >= 0) {
        copy_run(pages + table[e] * num_kv_heads * page_size * row_bytes, out, start, count, row_bytes);
      }
      start += std::max(0, count);
    }
  }

  void copy_run(const char* page, char* out, int64_t start, int64_t count, int64_t row_bytes) const {
    for (int64_t h = 0; h < num_kv_heads; h++) {
      std::memcpy(
          out + (h * length + start) * row_bytes, page + h * page_size * row_bytes, count * row_bytes);
    }
  }
};

} // namespace paged_mlx
