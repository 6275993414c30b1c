// The order in which a decode item reads its pages.
#pragma once

#include "cpu/rows.h"

namespace paged_mlx::cpu {
namespace {

constexpr int kBlockKeys = 16; // keys of one softmax step

// Pages of an item that are walked together: one page, or so many small ones
// that they fill a block. Starts at a position that does not depend on the item.
struct Span {
  int first_page; // index in the item; may lie before 0
  int position;   // of key 0
  int keys;
};

class Walk {
 public:
  Walk(const Job& job, const PlanItem& item) : job_(job), item_(item) {
    pages_ = job.page_starts ? 1 : max_int(1, kBlockKeys / job.page_size);
    lead_ = pages_ > 1 ? (item.first_position / job.page_size) % pages_ : 0;
    count_ = (lead_ + item.page_count + pages_ - 1) / pages_;
  }

  int count() const {
    return count_;
  }

  bool one_page() const {
    return pages_ == 1;
  }

  Span span(int i) const {
    const int first = i * pages_ - lead_;
    if (job_.page_starts) {
      return {first, page_start(job_, item_, first), page_len(job_, item_, first)};
    }
    return {first, item_.first_position + first * job_.page_size, pages_ * job_.page_size};
  }

  // Pool row, KV head 0, of a key of the span.
  int64_t row(const Span& span, int key) const {
    if (pages_ == 1) {
      return first_row(job_, item_, span.first_page, 0) + key;
    }
    return first_row(job_, item_, span.first_page + key / job_.page_size, 0) + key % job_.page_size;
  }

  // The same for a span that may lie behind the item, where the walk goes on
  // with the pages of the next one. Only to prefetch.
  int64_t row_ahead(int i, int key) const {
    const int first = i * pages_ - lead_;
    const int page = pages_ == 1 ? first : first + key / job_.page_size;
    const int end =
        job_.prefetch_next_item ? job_.plan->num_pages - item_.page_begin : item_.page_count;
    const int slot = pages_ == 1 ? key : key % job_.page_size;
    return first_row(job_, item_, clamp_int(page, 0, end - 1), 0) + slot;
  }

 private:
  const Job& job_;
  const PlanItem& item_;
  int pages_; // of a span
  int lead_;  // pages of the first span that lie before the item
  int count_;
};

} // namespace
} // namespace paged_mlx::cpu
