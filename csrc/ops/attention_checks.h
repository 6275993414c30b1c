// The checks of operations that attend, in the one message form: all of these throw
// std::invalid_argument.
#pragma once

#include <vector>

#include "mlx/array.h"
#include "mlx/utils.h"

#include "page_format.h"
#include "plan_format.h"
#include "shape_check.h"

namespace paged_mlx {

// What a plan must agree with, checked where the plan's words are first read.
struct PlanGeometry {
  int num_tokens, num_q_heads, num_kv_heads, page_size, num_pages;
  int mask_keys;      // columns of the mask; -1: no mask
  int num_open_pages; // in arrays of their own
};

// The arrays of a layer's pages, for a q whose num_q_heads and head_dim `shape` knows.
void check_pages(const char* op, ShapeCheck& shape, const mx::array& q,
                 const std::vector<mx::array>& pages, PageFormats formats);

// The words of a plan.
void check_plan(const char* op, const int32_t* words, size_t num_words,
                const PlanGeometry& geometry);

// A plan's array: its words too, unless they are known only when it is evaluated.
void check_plan(const char* op, const mx::array& plan, const PlanGeometry& geometry);

void check_number(const char* op, const char* name, float value, bool positive);

// One value per query head, as float32.
mx::array per_head(const char* op, const char* name, const mx::array& a, ShapeCheck& shape,
                   mx::Stream s);

} // namespace paged_mlx
