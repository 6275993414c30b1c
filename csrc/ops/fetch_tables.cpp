#include "ops/fetch_tables.h"

#include <string>

#include "mlx/allocator.h"

#include "shape_check.h"

namespace paged_mlx {

namespace {

void check(const FetchStep& step) {
  if (step.num_starts != step.batch || step.num_freed > step.width || step.skip < 0 ||
      step.skip > step.length) {
    fail("FetchTables",
         "starts must have " + std::to_string(step.batch) +
             " lengths, as block_tables, and skip be at most " + std::to_string(step.length),
         std::to_string(step.num_starts) + " lengths, and skip " + std::to_string(step.skip));
  }
}

// Column of a row's first new token, the same for every row.
int new_column(const FetchStep& step) {
  return step.length - step.num_tokens;
}

bool is_ragged(const FetchStep& step) {
  bool ragged = step.page_starts != nullptr;
  for (int b = 0; b < step.batch; b++) {
    ragged = ragged || step.starts[b] - step.num_freed * step.page_size != new_column(step);
  }
  return ragged;
}

void write_pages_of(const FetchStep& step, const FetchTables& t, int b, int32_t* words) {
  const int shift = new_column(step) - step.starts[b]; // from a position to its column
  for (int i = 0; i < t.max_pages; i++) {
    const int page = step.num_freed + i;
    const int from = b * step.width + page, to = b * t.max_pages + i;
    words[to] = step.block_tables[from];
    if (t.ragged) {
      const int position = step.page_starts ? step.page_starts[from] : page * step.page_size;
      words[t.page_starts() + to] = position + shift;
      words[t.page_lens() + to] = step.page_lens ? step.page_lens[from] : step.page_size;
    }
  }
}

void write_tokens_of(const FetchStep& step, const FetchTables& t, int b, int32_t* words) {
  const int count = step.counts ? step.counts[b] : step.num_tokens;
  words[t.context_lens() + b] = new_column(step) + (step.written ? count : 0);
  for (int i = 0; i < t.num_tokens; i++) {
    const int slot = b * t.length + new_column(step) + i;
    words[t.slots() + b * t.num_tokens + i] = i < count ? slot : -1;
  }
}

} // namespace

std::shared_ptr<const FetchTables> make_fetch_tables(const FetchStep& step) {
  check(step);
  FetchTables t{step.batch,
                step.width - step.num_freed,
                step.written ? 0 : step.num_tokens,
                step.length,
                step.skip,
                is_ragged(step),
                mx::array({0}, mx::int32)};
  const int size = t.num_words();
  t.words = mx::array(mx::allocator::malloc(size * sizeof(int32_t)), mx::Shape{size}, mx::int32);
  for (int b = 0; b < t.batch; b++) {
    write_pages_of(step, t, b, t.words.data<int32_t>());
    write_tokens_of(step, t, b, t.words.data<int32_t>());
  }
  return std::make_shared<const FetchTables>(std::move(t));
}

} // namespace paged_mlx
