// The planner: one step's tables and lengths in, a plan out. No MLX in here.
//
// Work is cut in three moves, each a file of its own:
//   validate.cpp   the tables and lengths are what the caller promised
//   sharing.cpp    rows x pages: prefix runs that several sequences share, then
//                  what each sequence has for itself
//   partition.cpp  long ranges are cut so that every worker has something to do
// cost.cpp weighs, targets.cpp holds the figures of each device.
// planner.cpp strings them together and writes the words of plan_format.h.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "plan/cost.h"
#include "plan_format.h"

namespace paged_mlx {

// One step of a batch, host data. Nothing is kept after the call.
struct PlanInput {
  const char* op = "plan"; // the function that errors name
  int batch = 0;
  int max_pages = 0;                     // columns of block_tables
  const int32_t* block_tables = nullptr; // [batch, max_pages], padded with NO_PAGE
  const int32_t* context_lens = nullptr; // [batch], this step's tokens included
  const int32_t* cu_seqlens_q = nullptr; // [batch + 1]; null: one query token each
  const int32_t* page_starts = nullptr;  // [batch, max_pages]; null: pages are full but the last
  const int32_t* page_lens = nullptr;    // [batch, max_pages]; with page_starts
  int num_pages = -1;                    // ids that tables may name; -1: not known here
  int num_sealed_pages = INT32_MAX;      // ids from here on are open pages, number 0 on
  int num_q_heads = 1;
  int num_kv_heads = 1;
  int page_size = 16;
  bool causal = true;
  int sliding_window = 0;     // 0: none
  bool allow_no_page = false; // a visible entry may be NO_PAGE

  int query_begin(int sequence) const {
    return cu_seqlens_q ? cu_seqlens_q[sequence] : sequence;
  }
  int query_len(int sequence) const {
    return cu_seqlens_q ? cu_seqlens_q[sequence + 1] - cu_seqlens_q[sequence] : 1;
  }
  int num_tokens() const {
    return cu_seqlens_q ? cu_seqlens_q[batch] : batch;
  }
  int gqa_factor() const {
    return num_q_heads / num_kv_heads;
  }
  bool ragged() const {
    return page_starts != nullptr;
  }
  bool is_open(int32_t page) const {
    return page >= num_sealed_pages;
  }
};

struct PlanOptions {
  bool share_prefixes = true;
  int fixed_partition = 0; // tokens; > 0: cut at multiples of it, share nothing
  bool merges_all = false; // no item is final: results are finished as they are merged
};

// Why a run of pages that several sequences begin with is read once or not.
struct SharingDecision {
  int num_sequences;
  int first_page; // index in the page tables
  int num_pages;
  double cost_shared;
  double cost_alone;
  bool shared;
};

// A plan without its words: what the next step is compared with.
struct PlanNotes {
  std::vector<SharingDecision> decisions;
  std::vector<int32_t> entry_begins; // for each item, its first entry in the page tables
  std::vector<int32_t> context_lens;
  std::vector<int32_t> cu_seqlens_q; // empty: one query token each
  int item_tokens = 1;               // most query tokens of one tile
  bool fresh_prompt = false; // whole contexts, for which MLX's attention is the faster route
  bool measured = false;     // by thresholds measured on this machine
};

// Throws std::invalid_argument, in the one message form, before anything is
// planned.
void validate(const PlanInput& input);

// Gives memory for so many words of a plan.
using TakeWords = std::function<int32_t*(int words)>;

// Writes the plan of a valid step to the words that it takes, once.
PlanNotes make_plan(const PlanInput& input, const PlanTarget& target, const PlanOptions& options,
                    const TakeWords& take);

// Whether the valid step `next` sees the same entries of the same pages as the
// step that `words` and `notes` were made for: then only positions differ.
bool can_advance(const int32_t* words, const PlanNotes& notes, const PlanInput& next);

// Moves the positions of a plan to those of `next`, for which can_advance holds.
void advance_plan(int32_t* words, PlanNotes& notes, const PlanInput& next);

} // namespace paged_mlx
