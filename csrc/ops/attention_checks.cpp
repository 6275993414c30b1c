#include "ops/attention_checks.h"

#include <cmath>

#include "mlx/ops.h"

#include "ops/page_arrays.h"

namespace paged_mlx {

namespace {

void check_head_dim(const char* op, const char* name, int head_dim) {
  if (head_dim % 8 != 0 || head_dim < 8 || (head_dim > 256 && head_dim != 512)) {
    fail(op, std::string(name) + " must have a head_dim that is a multiple of 8 up to 256, or 512",
         std::to_string(head_dim));
  }
}

} // namespace

void check_pages(const char* op, ShapeCheck& shape, const mx::array& q,
                 const std::vector<mx::array>& pages, PageFormats formats) {
  check_page_shapes(op, shape, pages, formats);
  check_float(op, "q", q);
  check_page_dtypes(op, pages, formats, q.dtype(), "the dtype of q");
  check_head_dim(op, "q", shape.at("head_dim"));
  check_head_dim(op, "v_pages", shape.at("v_head_dim"));
  if (shape.at("num_kv_heads") == 0 || shape.at("num_q_heads") % shape.at("num_kv_heads") != 0) {
    fail(op,
         "num_q_heads of q must be a multiple of num_kv_heads = " +
             std::to_string(shape.at("num_kv_heads")) + " from k_pages",
         std::to_string(shape.at("num_q_heads")));
  }
  if (shape.at("page_size") == 0) {
    fail(op, "k_pages must have a page_size of at least 1", shape_string(pages[0]));
  }
}

void check_plan(const char* op, const int32_t* words, size_t num_words, const PlanGeometry& g) {
  const PlanHeader& plan = *reinterpret_cast<const PlanHeader*>(words);
  auto same = [op](const char* name, int planned, int actual, const char* from) {
    if (planned != actual) {
      fail(op, std::string("plan must be made for ") + name + " = " + std::to_string(actual) + from,
           std::to_string(planned));
    }
  };
  if (num_words < sizeof(PlanHeader) / sizeof(int32_t) || plan.magic != PAGED_MLX_PLAN_MAGIC ||
      size_t(plan.num_words) > num_words) {
    fail(op, "plan must be the array of an AttentionPlan", "other words");
  }
  same("tokens", plan.num_tokens, g.num_tokens, " of q");
  same("num_q_heads", plan.num_q_heads, g.num_q_heads, " of q");
  same("num_kv_heads", plan.num_kv_heads, g.num_kv_heads, " of k_pages");
  same("page_size", plan.page_size, g.page_size, " of k_pages");
  if (plan.max_page_id >= g.num_pages) {
    fail(op,
         "block_tables must hold page ids in [0, " + std::to_string(g.num_pages) +
             "), the pages of the pool",
         std::to_string(plan.max_page_id));
  }
  if (plan.max_open_page >= g.num_open_pages) {
    fail(op,
         "block_tables must hold open pages in [0, " + std::to_string(g.num_open_pages) +
             "), those of the pool",
         std::to_string(plan.max_open_page));
  }
  if (g.mask_keys >= 0 && plan.max_row_end > g.mask_keys) {
    fail(op,
         "mask must have a column for each key of the longest context (" +
             std::to_string(plan.max_row_end) + ")",
         std::to_string(g.mask_keys));
  }
}

void check_plan(const char* op, const mx::array& plan, const PlanGeometry& geometry) {
  ShapeCheck shape(op);
  shape("plan", plan, {"words"});
  check_dtype(op, "plan", plan, mx::int32, "the array of an AttentionPlan");
  if (!plan.is_tracer()) {
    mx::array words = plan;
    words.eval();
    if (!words.flags().row_contiguous) {
      fail(op, "plan must be the array of an AttentionPlan", "words that do not follow each other");
    }
    check_plan(op, words.data<int32_t>(), words.size(), geometry);
  }
}

void check_number(const char* op, const char* name, float value, bool positive) {
  if (!std::isfinite(value) || (positive && value <= 0)) {
    fail(op,
         std::string(name) + (positive ? " must be finite and greater than 0" : " must be finite"),
         std::to_string(value));
  }
}

mx::array per_head(const char* op, const char* name, const mx::array& a, ShapeCheck& shape,
                   mx::Stream s) {
  shape(name, a, {"num_q_heads"});
  check_float(op, name, a);
  return mx::contiguous(mx::astype(a, mx::float32, s), false, s);
}

} // namespace paged_mlx
