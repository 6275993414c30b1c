// Types that planner.cpp, sharing.cpp and partition.cpp hand to one another.
#pragma once

#include <vector>

#include "planner.h"

namespace paged_mlx {

// A range of entries of one page table, half-open, and the keys it is read for.
struct PageRange {
  int sequence;    // whose table row holds the pages
  int entry_begin; // [entry_begin, entry_end)
  int entry_end;
  int key_begin; // [key_begin, key_end), positions
  int key_end;
  bool open = false; // pages that are not sealed; a piece has pages of one sort

  int num_keys() const {
    return key_end > key_begin ? key_end - key_begin : 0;
  }
};

// Query tokens in rising order: a run of them, which takes no memory, or a list.
class TokenSet {
 public:
  TokenSet() = default;
  TokenSet(int begin, int count) : begin_(begin), count_(count) {}

  void add(int token) {
    if (count_ == 0) {
      begin_ = token;
    } else if (listed_.empty() && token != begin_ + count_) {
      for (int i = 0; i < count_; i++) {
        listed_.push_back(begin_ + i);
      }
    }
    if (!listed_.empty()) {
      listed_.push_back(token);
    }
    count_++;
  }

  void clear() {
    count_ = 0;
    listed_.clear();
  }

  int size() const {
    return count_;
  }
  bool is_run() const {
    return listed_.empty();
  }
  int operator[](int i) const {
    return is_run() ? begin_ + i : listed_[i];
  }

 private:
  int begin_ = 0;
  int count_ = 0;
  std::vector<int> listed_;
};

// A set of query tokens against one range of pages: an item before it is cut.
struct Segment {
  TokenSet tokens;
  PageRange range;
  bool shared = false; // a prefix that several sequences have
};

// Most query tokens of one tile.
inline int item_tokens(const PlanInput& input, const PlanTarget& target) {
  const int tokens = target.rows.wide / input.gqa_factor();
  return tokens > 1 ? tokens : 1;
}

// Whether the query tokens of every sequence that has some are its whole context, and each sees
// all before it.
bool sees_whole_prompts(const PlanInput& input);

// First position that the token at `position` may see.
inline int window_begin(const PlanInput& input, int position) {
  if (input.sliding_window <= 0 || position < input.sliding_window) {
    return 0;
  }
  return position - input.sliding_window + 1;
}

// Position of the first slot, and one past the last used slot, of an entry.
int entry_start(const PlanInput& input, int sequence, int entry);
int entry_end(const PlanInput& input, int sequence, int entry);

// First entry whose keys reach past `position`; entries needed to cover it.
int entry_of(const PlanInput& input, int sequence, int position);

// sharing.cpp: every query token against every key it may see, exactly once.
std::vector<Segment> make_segments(const PlanInput& input, const PlanTarget& target,
                                   const PlanOptions& options,
                                   std::vector<SharingDecision>& decisions);

// partition.cpp: pieces of one segment's range, in order.
std::vector<PageRange> cut(const PlanInput& input, const Segment& segment, double budget,
                           const PlanTarget& target, const PlanOptions& options);

// Cost of the segments in units that run one at a time: whole items, or KV heads of them.
double total_cost(const PlanInput& input, const std::vector<Segment>& segments,
                  const PlanTarget& target);

} // namespace paged_mlx
