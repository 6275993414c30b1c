#include "ops/step_plan.h"

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "mlx/allocator.h"

#include "shape_check.h"

namespace paged_mlx {

namespace {

using Dims = std::initializer_list<std::pair<const char*, int>>; // name and size; -1: any

void check(const std::string& op, const char* name, const HostInts& ints, Dims dims) {
  if (ints.ndim != dims.size()) {
    std::string list;
    for (const auto& [dim, size] : dims) {
      list += (list.empty() ? "" : ", ") + std::string(dim);
    }
    fail(op, std::string(name) + " must have shape [" + list + "]",
         std::to_string(ints.ndim) + " dimensions");
  }
  size_t axis = 0;
  for (const auto& [dim, size] : dims) {
    const int found = ints.shape[axis++];
    if (size >= 0 && found != size) {
      fail(op,
           std::string(name) + " must match " + dim + " = " + std::to_string(size) +
               " of block_tables",
           std::to_string(found));
    }
  }
}

// `geometry` with the arrays of a step, their shapes checked.
PlanInput input_of(const StepArrays& step, const PlanInput& geometry) {
  check(step.op, "block_tables", step.block_tables, {{"batch", -1}, {"max_pages", -1}});
  const auto [batch, max_pages] = step.block_tables.shape;
  check(step.op, "context_lens", step.context_lens, {{"batch", batch}});
  if (step.cu_seqlens_q) {
    check(step.op, "cu_seqlens_q", *step.cu_seqlens_q, {{"batch + 1", batch + 1}});
  }
  if (step.page_starts.has_value() != step.page_lens.has_value()) {
    fail(step.op, "page_starts and page_lens must be given together", "one of them");
  }
  if (step.page_starts) {
    const Dims dims = {{"batch", batch}, {"max_pages", max_pages}};
    check(step.op, "page_starts", *step.page_starts, dims);
    check(step.op, "page_lens", *step.page_lens, dims);
  }
  auto optional = [](const auto& ints) { return ints ? ints->data : nullptr; };
  PlanInput in = geometry;
  in.op = step.op.c_str();
  in.batch = batch;
  in.max_pages = max_pages;
  in.block_tables = step.block_tables.data;
  in.context_lens = step.context_lens.data;
  in.cu_seqlens_q = optional(step.cu_seqlens_q);
  in.page_starts = optional(step.page_starts);
  in.page_lens = optional(step.page_lens);
  return in;
}

// Words are handed out in a few sizes only, so that a compiled step that takes
// the plan as an input is not traced anew for each length.
size_t rounded(size_t words) {
  size_t unit = 256;
  while (unit * 8 < words) {
    unit *= 2;
  }
  return (words + unit - 1) / unit * unit;
}

// For so many words; those behind them are 0.
mx::array words_for(int count) {
  const size_t size = rounded(count);
  mx::array words(mx::allocator::malloc(size * sizeof(int32_t)), mx::Shape{int(size)}, mx::int32);
  std::fill(words.data<int32_t>() + count, words.data<int32_t>() + size, 0);
  return words;
}

} // namespace

void check_whole_contexts(const StepArrays& step, int num_pages, int page_size) {
  PlanInput geometry;
  geometry.num_pages = num_pages;
  geometry.page_size = page_size;
  geometry.allow_no_page = true;
  PlanInput input = input_of(step, geometry);
  std::vector<int32_t> cu = {0};
  for (int b = 0; b < input.batch; b++) {
    const int64_t end = int64_t(cu.back()) + std::max(0, input.context_lens[b]);
    cu.push_back(int32_t(std::min<int64_t>(end, INT32_MAX)));
  }
  input.cu_seqlens_q = cu.data();
  validate(input);
}

StepPlan::StepPlan(const StepArrays& step, const PlanInput& geometry, const PlanTarget& target,
                   const PlanOptions& options)
    : geometry_(geometry), words_(mx::array({0}, mx::int32)) {
  const PlanInput input = input_of(step, geometry_);
  validate(input);
  notes_ = make_plan(input, target, options, [this](int count) {
    words_ = words_for(count);
    return words_.data<int32_t>();
  });
}

std::optional<StepPlan> StepPlan::advance(const StepArrays& step) const {
  const PlanInput next = input_of(step, geometry_);
  validate(next);
  if (!can_advance(words(), notes_, next)) {
    return std::nullopt;
  }
  StepPlan plan = *this;
  plan.words_ = words_for(header().num_words);
  std::copy_n(words(), header().num_words, plan.words_.data<int32_t>());
  advance_plan(plan.words_.data<int32_t>(), plan.notes_, next);
  return plan;
}

std::array<int, kNumPlanKinds> StepPlan::most_tokens() const {
  const auto* item = reinterpret_cast<const PlanItem*>(words() + header().items);
  std::array<int, kNumPlanKinds> most = {};
  for (int kind = 0; kind < kNumPlanKinds; kind++) {
    for (int i = 0; i < header().num_items[kind]; i++, item++) {
      most[kind] = std::max(most[kind], item->row_count);
    }
  }
  return most;
}

} // namespace paged_mlx
