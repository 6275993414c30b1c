#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "mlx/array.h"

#include "bindings/module.h"
#include "ops/attention.h"
#include "ops/plan_target.h"
#include "ops/route.h"
#include "plan/planner.h"
#include "shape_check.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace paged_mlx {

namespace {

using Ints = nb::ndarray<const int32_t, nb::c_contig, nb::device::cpu>;

// A step's arrays, their shapes checked. Views: valid while the arrays are.
class Step {
 public:
  Step(
      std::string op,
      const Ints& block_tables,
      const Ints& context_lens,
      const std::optional<Ints>& cu_seqlens_q,
      const std::optional<Ints>& page_starts,
      const std::optional<Ints>& page_lens)
      : op_(std::move(op)),
        tables_(block_tables.data()),
        lens_(context_lens.data()),
        cu_(cu_seqlens_q ? cu_seqlens_q->data() : nullptr),
        starts_(page_starts ? page_starts->data() : nullptr),
        page_lens_(page_lens ? page_lens->data() : nullptr) {
    check(block_tables, "block_tables", {"batch", "max_pages"});
    check(context_lens, "context_lens", {"batch"});
    batch_ = int(block_tables.shape(0));
    max_pages_ = int(block_tables.shape(1));
    expect("context_lens", context_lens, 0, batch_, "batch");
    if (cu_seqlens_q) {
      check(*cu_seqlens_q, "cu_seqlens_q", {"batch + 1"});
      expect("cu_seqlens_q", *cu_seqlens_q, 0, batch_ + 1, "batch + 1");
    }
    if (page_starts.has_value() != page_lens.has_value()) {
      fail(op_, "page_starts and page_lens must be given together", "one of them");
    }
    if (page_starts) {
      for (const auto& [name, ints] : {std::pair{"page_starts", &*page_starts}, {"page_lens", &*page_lens}}) {
        check(*ints, name, {"batch", "max_pages"});
        expect(name, *ints, 0, batch_, "batch");
        expect(name, *ints, 1, max_pages_, "max_pages");
      }
    }
  }

  PlanInput input(const PlanInput& geometry) const {
    PlanInput in = geometry;
    in.op = op_.c_str();
    in.batch = batch_;
    in.max_pages = max_pages_;
    in.block_tables = tables_;
    in.context_lens = lens_;
    in.cu_seqlens_q = cu_;
    in.page_starts = starts_;
    in.page_lens = page_lens_;
    return in;
  }

 private:
  void check(const Ints& a, const char* name, std::initializer_list<const char*> dims) const {
    if (a.ndim() == dims.size()) {
      return;
    }
    std::string list;
    for (const std::string dim : dims) {
      list += (list.empty() ? "" : ", ") + dim;
    }
    fail(op_, std::string(name) + " must have shape [" + list + "]", std::to_string(a.ndim()) + " dimensions");
  }

  void expect(const char* name, const Ints& a, int axis, int size, const char* dim) const {
    if (int(a.shape(axis)) != size) {
      fail(
          op_,
          std::string(name) + " must match " + dim + " = " + std::to_string(size) + " of block_tables",
          std::to_string(a.shape(axis)));
    }
  }

  std::string op_;
  int batch_ = 0, max_pages_ = 0;
  const int32_t *tables_, *lens_, *cu_, *starts_, *page_lens_;
};

// Words are handed out in a few sizes only, so that a compiled step that takes
// the plan as an input is not traced anew for each length.
size_t rounded(size_t words) {
  size_t unit = 256;
  while (unit * 8 < words) {
    unit *= 2;
  }
  return (words + unit - 1) / unit * unit;
}

class NativePlan {
 public:
  NativePlan(const Step& step, PlanInput geometry, const PlanTarget& target, PlanOptions options)
      : geometry_(geometry), words_(mx::array({0}, mx::int32)) {
    const PlanInput input = step.input(geometry_);
    validate(input);
    notes_ = make_plan(input, target, options, [this](int count) {
      words_ = array_of(count);
      return words_.data<int32_t>();
    });
  }

  // The plan of the next step, or None when it needs one of its own.
  std::optional<NativePlan> advance(const Step& step) const {
    const PlanInput next = step.input(geometry_);
    validate(next);
    if (!same_pages(words(), notes_, next)) {
      return std::nullopt;
    }
    NativePlan plan = *this;
    const int count = header().num_words;
    plan.words_ = array_of(count);
    std::copy_n(words(), count, plan.words_.data<int32_t>());
    move_plan(plan.words_.data<int32_t>(), plan.notes_, next);
    return plan;
  }

  const mx::array& array() const {
    return words_;
  }

  const int32_t* words() const {
    return words_.data<int32_t>();
  }

  const PlanHeader& header() const {
    return *reinterpret_cast<const PlanHeader*>(words());
  }

  // Most query tokens of an item, for each kind.
  std::tuple<int, int, int> most_tokens() const {
    const PlanHeader& h = header();
    const auto* item = reinterpret_cast<const PlanItem*>(words() + h.items);
    int most[kNumPlanKinds] = {};
    for (int kind = 0; kind < kNumPlanKinds; kind++) {
      for (int i = 0; i < h.num_items[kind]; i++, item++) {
        most[kind] = std::max(most[kind], item->row_count);
      }
    }
    return {most[kVectorItem], most[kTileItem], most[kWideItem]};
  }

  const PlanNotes& notes() const {
    return notes_;
  }

 private:
  // For so many words; those behind them are 0.
  static mx::array array_of(int count) {
    const size_t size = rounded(count);
    mx::array a(mx::allocator::malloc(size * sizeof(int32_t)), mx::Shape{int(size)}, mx::int32);
    std::fill(a.data<int32_t>() + count, a.data<int32_t>() + size, 0);
    return a;
  }

  PlanInput geometry_;
  PlanNotes notes_;
  mx::array words_;
};

// Every key of every sequence is asked for, as by query tokens for all of them.
void check_whole_contexts(const Step& step, int num_pages, int page_size) {
  PlanInput geometry;
  geometry.num_pages = num_pages;
  geometry.page_size = page_size;
  geometry.allow_no_page = true;
  PlanInput input = step.input(geometry);
  std::vector<int32_t> cu = {0};
  for (int b = 0; b < input.batch; b++) {
    const int64_t end = int64_t(cu.back()) + std::max(0, input.context_lens[b]);
    cu.push_back(int32_t(std::min<int64_t>(end, INT32_MAX)));
  }
  input.cu_seqlens_q = cu.data();
  validate(input);
}

nb::dict header_dict(const PlanHeader& h) {
  nb::dict d;
  d["num_items"] = nb::make_tuple(h.num_items[0], h.num_items[1], h.num_items[2]);
#define PAGED_MLX_FIELD(name) d[#name] = h.name;
  PAGED_MLX_FIELD(num_words)
  PAGED_MLX_FIELD(num_tokens)
  PAGED_MLX_FIELD(num_row_tokens)
  PAGED_MLX_FIELD(num_pages)
  PAGED_MLX_FIELD(num_partials)
  PAGED_MLX_FIELD(num_merges)
  PAGED_MLX_FIELD(num_parts)
  PAGED_MLX_FIELD(items)
  PAGED_MLX_FIELD(row_tokens)
  PAGED_MLX_FIELD(positions)
  PAGED_MLX_FIELD(row_ends)
  PAGED_MLX_FIELD(pages)
  PAGED_MLX_FIELD(page_starts)
  PAGED_MLX_FIELD(page_lens)
  PAGED_MLX_FIELD(merges)
  PAGED_MLX_FIELD(parts)
  PAGED_MLX_FIELD(num_q_heads)
  PAGED_MLX_FIELD(num_kv_heads)
  PAGED_MLX_FIELD(page_size)
  PAGED_MLX_FIELD(causal)
  PAGED_MLX_FIELD(sliding_window)
  PAGED_MLX_FIELD(max_page_id)
  PAGED_MLX_FIELD(max_row_end)
#undef PAGED_MLX_FIELD
  return d;
}

using Decision = std::tuple<int, int, int, double, double, bool>;

std::vector<Decision> decision_rows(const PlanNotes& notes) {
  std::vector<Decision> rows;
  for (const SharingDecision& d : notes.decisions) {
    rows.emplace_back(
        d.num_sequences, d.first_page, d.num_pages, d.cost_shared, d.cost_alone, d.shared);
  }
  return rows;
}

} // namespace

void bind_plan(nb::module_& m) {
  nb::class_<NativePlan>(m, "NativePlan", "One step's work items. Use paged_mlx.fast.plan.")
      .def(
          "__init__",
          [](NativePlan* self,
             std::string op,
             const Ints& block_tables,
             const Ints& context_lens,
             const std::optional<Ints>& cu_seqlens_q,
             const std::optional<Ints>& page_starts,
             const std::optional<Ints>& page_lens,
             int num_pages,
             int num_q_heads,
             int num_kv_heads,
             int page_size,
             bool causal,
             int sliding_window,
             mx::Dtype dtype,
             int head_dim,
             int v_head_dim,
             bool share_prefixes,
             int fixed_partition,
             int workers,
             int cores,
             bool kernels) {
            PlanInput geometry;
            geometry.num_pages = num_pages;
            geometry.num_q_heads = num_q_heads;
            geometry.num_kv_heads = num_kv_heads;
            geometry.page_size = page_size;
            geometry.causal = causal;
            geometry.sliding_window = sliding_window;
            PlanOptions options{share_prefixes, fixed_partition};
            new (self) NativePlan(
                Step(op, block_tables, context_lens, cu_seqlens_q, page_starts, page_lens),
                geometry,
                target_of({kernels, workers, cores, cpu_dtype(dtype), head_dim, v_head_dim}),
                options);
          },
          nb::kw_only(),
          "op"_a,
          "block_tables"_a,
          "context_lens"_a,
          "cu_seqlens_q"_a.none(),
          "page_starts"_a.none(),
          "page_lens"_a.none(),
          "num_pages"_a,
          "num_q_heads"_a,
          "num_kv_heads"_a,
          "page_size"_a,
          "causal"_a,
          "sliding_window"_a,
          "dtype"_a,
          "head_dim"_a,
          "v_head_dim"_a,
          "share_prefixes"_a,
          "fixed_partition"_a,
          "workers"_a,
          "cores"_a = 0,
          "kernels"_a)
      .def(
          "advance",
          [](const NativePlan& self,
             std::string op,
             const Ints& block_tables,
             const Ints& context_lens,
             const std::optional<Ints>& cu_seqlens_q) {
            return self.advance(
                Step(op, block_tables, context_lens, cu_seqlens_q, std::nullopt, std::nullopt));
          },
          nb::kw_only(),
          "op"_a,
          "block_tables"_a,
          "context_lens"_a,
          "cu_seqlens_q"_a.none())
      .def("array", &NativePlan::array, "The words of plan_format.h, int32 [words].")
      .def("most_tokens", &NativePlan::most_tokens, "Most query tokens of an item, by kind.")
      .def("header", [](const NativePlan& self) { return header_dict(self.header()); })
      .def("decisions", [](const NativePlan& self) { return decision_rows(self.notes()); });
  m.def(
      "check_tables",
      [](std::string op,
         const Ints& block_tables,
         const Ints& context_lens,
         const std::optional<Ints>& page_starts,
         const std::optional<Ints>& page_lens,
         int num_pages,
         int page_size) {
        const Step step(op, block_tables, context_lens, std::nullopt, page_starts, page_lens);
        check_whole_contexts(step, num_pages, page_size);
      },
      "op"_a,
      "block_tables"_a,
      "context_lens"_a,
      "page_starts"_a.none(),
      "page_lens"_a.none(),
      "num_pages"_a,
      "page_size"_a,
      "Raise ValueError unless the tables cover the whole contexts; NO_PAGE is allowed.");
  m.def(
      "check_plan",
      [](const NativePlan& plan,
         const mx::array& q,
         const mx::array& k_pages,
         const mx::array& v_pages,
         const std::optional<mx::array>& mask) {
        check_plan(
            "paged_attention",
            plan.words(),
            plan.array().size(),
            attention_geometry(q, k_pages, v_pages, mask));
      },
      "plan"_a,
      "q"_a,
      "k_pages"_a,
      "v_pages"_a,
      "mask"_a.none(),
      "Raise ValueError unless the plan fits the arrays.");
  m.def(
      "attention_geometry",
      [](const mx::array& q, const mx::array& k_pages, const mx::array& v_pages) {
        const PlanGeometry g = attention_geometry(q, k_pages, v_pages);
        nb::dict d;
        d["tokens"] = g.num_tokens;
        d["num_q_heads"] = g.num_q_heads;
        d["num_kv_heads"] = g.num_kv_heads;
        d["page_size"] = g.page_size;
        d["num_pages"] = g.num_pages;
        return d;
      },
      "q"_a,
      "k_pages"_a,
      "v_pages"_a,
      "Heads, page size and counts, after checking shapes and dtypes.");
}

} // namespace paged_mlx
