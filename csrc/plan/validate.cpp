// The tables and lengths of a step are what the caller promised.
#include <cstdint>
#include <stdexcept>

#include "segments.h"

namespace paged_mlx {

namespace {

[[noreturn]] void fail(const PlanInput& input, const std::string& must, const std::string& found) {
  throw std::invalid_argument("[" + std::string(input.op) + "] " + must + "; got " + found + ".");
}

std::string str(int64_t value) {
  return std::to_string(value);
}

void check_numbers(const PlanInput& in) {
  if (in.batch < 1) {
    fail(in, "block_tables must have at least one sequence", "batch = " + str(in.batch));
  }
  if (in.page_size < 1) {
    fail(in, "page_size must be at least 1", str(in.page_size));
  }
  if (in.num_kv_heads < 1 || in.num_q_heads < 1 || in.num_q_heads % in.num_kv_heads != 0) {
    fail(in, "num_q_heads must be a multiple of num_kv_heads = " + str(in.num_kv_heads),
         str(in.num_q_heads));
  }
  if (in.sliding_window < 0) {
    fail(in, "sliding_window must be at least 1, or None", str(in.sliding_window));
  }
}

void check_cu_seqlens(const PlanInput& in) {
  if (!in.cu_seqlens_q) {
    return;
  }
  if (in.cu_seqlens_q[0] != 0) {
    fail(in, "cu_seqlens_q must start with 0", str(in.cu_seqlens_q[0]));
  }
  for (int b = 0; b < in.batch; b++) {
    if (in.cu_seqlens_q[b + 1] < in.cu_seqlens_q[b]) { // their difference may overflow
      fail(in, "cu_seqlens_q must not decrease",
           str(in.cu_seqlens_q[b]) + " before " + str(in.cu_seqlens_q[b + 1]) + " at sequence " +
               str(b));
    }
  }
}

void check_length(const PlanInput& in, int b) {
  int context_len = in.context_lens[b];
  if (context_len < 0) {
    fail(in, "context_lens must be at least 0", str(context_len) + " for sequence " + str(b));
  }
  // The end of its last page is an int32, too.
  if (in.query_len(b) > 0 && context_len > INT32_MAX - in.page_size) {
    fail(in, "context_lens must be at most 2^31 - 1 - page_size",
         str(context_len) + " for sequence " + str(b));
  }
  if (context_len > 0 && in.query_len(b) > context_len) {
    fail(in,
         "the query must not be longer than its context, which includes it (context_lens[" +
             str(b) + "] = " + str(context_len) + ")",
         str(in.query_len(b)) + " query tokens");
  }
}

[[noreturn]] void fail_coverage(const PlanInput& in, int b, int64_t covered) {
  fail(in,
       "context_lens must be covered by the pages of block_tables (sequence " + str(b) + " has " +
           str(covered) + " tokens' worth)",
       str(in.context_lens[b]));
}

void check_ragged_entry(const PlanInput& in, int b, int entry, int expected_start) {
  const int64_t i = int64_t(b) * in.max_pages + entry;
  if (in.page_lens[i] < 0 || in.page_lens[i] > in.page_size) {
    fail(in, "page_lens must be in [0, page_size = " + str(in.page_size) + "]",
         str(in.page_lens[i]) + " at [" + str(b) + ", " + str(entry) + "]");
  }
  if (expected_start >= 0 && in.page_starts[i] != expected_start) {
    fail(in, "page_starts must continue where the entry before ends (" + str(expected_start) + ")",
         str(in.page_starts[i]) + " at [" + str(b) + ", " + str(entry) + "]");
  }
}

// Entries [0, count) cover the context; every entry a token can see is a page.
void check_ragged(const PlanInput& in, int b, int first_key) {
  int start = -1, entry = 0;
  for (; entry < in.max_pages && start < in.context_lens[b]; entry++) {
    const int64_t i = int64_t(b) * in.max_pages + entry;
    check_ragged_entry(in, b, entry, start);
    if (entry == 0 && (in.page_starts[i] < 0 || in.page_starts[i] > first_key)) {
      fail(in,
           "page_starts must begin at or before the first key that a token sees (" +
               str(first_key) + ")",
           str(in.page_starts[i]) + " for sequence " + str(b));
    }
    start = in.page_starts[i] + in.page_lens[i];
  }
  if (start < in.context_lens[b]) {
    fail_coverage(in, b, start < 0 ? 0 : start);
  }
}

[[noreturn]] void fail_page(const PlanInput& in, int b, int entry, int32_t page) {
  fail(in,
       in.num_pages >= 0 ? "block_tables must hold page ids in [0, " + str(in.num_pages) +
               "), the pages of the pool"
                         : "block_tables must hold page ids that are not negative",
       str(page) + " at [" + str(b) + ", " + str(entry) + "]");
}

void check_ids(const PlanInput& in, int b, int first, int last) {
  const int32_t* row = in.block_tables + int64_t(b) * in.max_pages;
  const uint32_t limit = in.num_pages >= 0 ? in.num_pages : INT32_MAX;
  // Tables are long and nearly always right: the sign of `bad` is set by an id below 0
  // and by one of limit or more.
  uint32_t bad = 0;
  for (int entry = first; entry <= last; entry++) {
    bad |= uint32_t(row[entry]) | (limit - 1 - uint32_t(row[entry]));
  }
  const bool all_good = int32_t(bad) >= 0;
  for (int entry = first; !all_good && entry <= last; entry++) {
    const bool missing = row[entry] == PAGED_MLX_NO_PAGE;
    if (missing && !in.allow_no_page) {
      fail_coverage(in, b, entry_start(in, b, entry));
    }
    if (!missing && uint32_t(row[entry]) >= limit) {
      fail_page(in, b, entry, row[entry]);
    }
  }
}

void check_pages(const PlanInput& in, int b) {
  const int context_len = in.context_lens[b];
  if (context_len == 0 || in.query_len(b) == 0) {
    return;
  }
  const int first_key = window_begin(in, context_len - in.query_len(b));
  if (in.ragged()) {
    check_ragged(in, b, first_key);
  } else if (int64_t(in.max_pages) * in.page_size < context_len) {
    fail_coverage(in, b, int64_t(in.max_pages) * in.page_size);
  }
  check_ids(in, b, entry_of(in, b, first_key), entry_of(in, b, context_len - 1));
}

} // namespace

void validate(const PlanInput& input) {
  check_numbers(input);
  check_cu_seqlens(input);
  for (int b = 0; b < input.batch; b++) {
    check_length(input, b);
    check_pages(input, b);
  }
}

} // namespace paged_mlx
