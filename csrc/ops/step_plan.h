// The plan of one step, from the step's arrays to the array that operations take.
#pragma once

#include <array>
#include <optional>
#include <string>

#include "mlx/array.h"

#include "plan/planner.h"

namespace paged_mlx {

namespace mx = mlx::core;

// int32 in the memory of the host, row by row.
struct HostInts {
  const int32_t* data;
  size_t ndim;
  std::array<int, 2> shape; // of the first axes
};

// A step's arrays. Nothing is kept after a call.
struct StepArrays {
  std::string op; // the function that errors name
  HostInts block_tables, context_lens;
  std::optional<HostInts> cu_seqlens_q, page_starts, page_lens;
};

// Throws std::invalid_argument unless the tables cover the whole contexts, as if query tokens
// asked for every key; NO_PAGE is allowed.
void check_whole_contexts(const StepArrays& step, int num_pages, int page_size);

class StepPlan {
 public:
  // Of `geometry` the step's own arrays are not read.
  StepPlan(const StepArrays& step, const PlanInput& geometry, const PlanTarget& target,
           const PlanOptions& options);

  // The plan of the next step, or none when it needs one of its own.
  std::optional<StepPlan> advance(const StepArrays& step) const;

  // The words of plan_format.h, and zeros after them.
  const mx::array& array() const {
    return words_;
  }
  const int32_t* words() const {
    return words_.data<int32_t>();
  }
  const PlanHeader& header() const {
    return *reinterpret_cast<const PlanHeader*>(words());
  }
  const PlanNotes& notes() const {
    return notes_;
  }

  // Most query tokens of an item, for each kind.
  std::array<int, kNumPlanKinds> most_tokens() const;

 private:
  PlanInput geometry_;
  PlanNotes notes_;
  mx::array words_;
};

} // namespace paged_mlx
