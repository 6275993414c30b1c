#include <algorithm>

#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "mlx/array.h"

#include "bindings/module.h"
#include "ops/attention.h"
#include "ops/dtypes.h"
#include "ops/plan_target.h"
#include "ops/step_plan.h"
#include "plan/targets.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace paged_mlx {

namespace {

using Ints = nb::ndarray<const int32_t, nb::c_contig, nb::device::cpu>;

HostInts host_ints(const Ints& ints) {
  HostInts host{ints.data(), ints.ndim(), {}};
  for (size_t axis = 0; axis < std::min(ints.ndim(), host.shape.size()); axis++) {
    host.shape[axis] = int(ints.shape(axis));
  }
  return host;
}

std::optional<HostInts> host_ints(const std::optional<Ints>& ints) {
  return ints ? std::optional(host_ints(*ints)) : std::nullopt;
}

StepArrays step_of(std::string op, const Ints& block_tables, const Ints& context_lens,
                   const std::optional<Ints>& cu_seqlens_q = std::nullopt,
                   const std::optional<Ints>& page_starts = std::nullopt,
                   const std::optional<Ints>& page_lens = std::nullopt) {
  return {std::move(op),           host_ints(block_tables), host_ints(context_lens),
          host_ints(cu_seqlens_q), host_ints(page_starts),  host_ints(page_lens)};
}

nb::dict header_dict(const PlanHeader& h) {
#define PAGED_MLX_COUNT(name) +1
  static_assert(sizeof(PlanHeader) ==
                sizeof(int) * (1 + 2 * kNumPlanKinds PAGED_MLX_PLAN_FIELDS(PAGED_MLX_COUNT)));
#undef PAGED_MLX_COUNT
  nb::dict d;
  d["num_items"] = nb::make_tuple(h.num_items[0], h.num_items[1], h.num_items[2]);
  d["num_open_items"] =
      nb::make_tuple(h.num_open_items[0], h.num_open_items[1], h.num_open_items[2]);
#define PAGED_MLX_FIELD(name) d[#name] = h.name;
  PAGED_MLX_PLAN_FIELDS(PAGED_MLX_FIELD)
#undef PAGED_MLX_FIELD
  return d;
}

using Decision = std::tuple<int, int, int, double, double, bool>;

std::vector<Decision> decision_rows(const PlanNotes& notes) {
  std::vector<Decision> rows;
  for (const SharingDecision& d : notes.decisions) {
    rows.emplace_back(d.num_sequences, d.first_page, d.num_pages, d.cost_shared, d.cost_alone,
                      d.shared);
  }
  return rows;
}

} // namespace

void bind_plan(nb::module_& m) {
  nb::class_<StepPlan>(m, "NativePlan", "One step's work items. Use paged_mlx.fast.plan.")
      .def(
          "__init__",
          [](StepPlan* self, std::string op, const Ints& block_tables, const Ints& context_lens,
             const std::optional<Ints>& cu_seqlens_q, const std::optional<Ints>& page_starts,
             const std::optional<Ints>& page_lens, int num_pages, int num_q_heads, int num_kv_heads,
             int page_size, bool causal, int sliding_window, mx::Dtype dtype, int head_dim,
             int v_head_dim, bool share_prefixes, int fixed_partition, int workers, int cores,
             bool kernels, int num_sealed_pages, const FormatNames& formats) {
            PlanInput geometry;
            geometry.num_pages = num_pages;
            geometry.num_sealed_pages = num_sealed_pages < 0 ? INT32_MAX : num_sealed_pages;
            geometry.num_q_heads = num_q_heads;
            geometry.num_kv_heads = num_kv_heads;
            geometry.page_size = page_size;
            geometry.causal = causal;
            geometry.sliding_window = sliding_window;
            new (self) StepPlan(
                step_of(op, block_tables, context_lens, cu_seqlens_q, page_starts, page_lens),
                geometry,
                target_of({kernels, workers, cores, cpu_dtype(dtype), head_dim, v_head_dim,
                           num_kv_heads > 0 ? num_q_heads / num_kv_heads : 1,
                           page_formats(op.c_str(), formats)}),
                {share_prefixes, fixed_partition,
                 kernels && page_formats(op.c_str(), formats).rotates()});
          },
          nb::kw_only(), "op"_a, "block_tables"_a, "context_lens"_a, "cu_seqlens_q"_a.none(),
          "page_starts"_a.none(), "page_lens"_a.none(), "num_pages"_a, "num_q_heads"_a,
          "num_kv_heads"_a, "page_size"_a, "causal"_a, "sliding_window"_a, "dtype"_a, "head_dim"_a,
          "v_head_dim"_a, "share_prefixes"_a, "fixed_partition"_a, "workers"_a, "cores"_a = 0,
          "kernels"_a, "num_sealed_pages"_a = -1, "formats"_a = FormatNames())
      .def(
          "advance",
          [](const StepPlan& self, std::string op, const Ints& block_tables,
             const Ints& context_lens, const std::optional<Ints>& cu_seqlens_q) {
            return self.advance(step_of(op, block_tables, context_lens, cu_seqlens_q));
          },
          nb::kw_only(), "op"_a, "block_tables"_a, "context_lens"_a, "cu_seqlens_q"_a.none())
      .def("array", &StepPlan::array, "The words of plan_format.h, int32 [words].")
      .def("measured", [](const StepPlan& self) { return self.notes().measured; })
      .def("cu_seqlens_q", [](const StepPlan& self) { return self.notes().cu_seqlens_q; })
      .def("fresh_prompt", [](const StepPlan& self) { return self.notes().fresh_prompt; })
      .def(
          "most_tokens",
          [](const StepPlan& self) { return nb::tuple(nb::cast(self.most_tokens())); },
          "Most query tokens of an item, by kind.")
      .def("header", [](const StepPlan& self) { return header_dict(self.header()); })
      .def("decisions", [](const StepPlan& self) { return decision_rows(self.notes()); });
  m.def(
      "plan_thresholds",
      [](bool kernels, int itemsize) {
        const PlanDevice device = kernels ? PlanDevice::gpu : PlanDevice::cpu;
        const Thresholds t = thresholds(device, itemsize);
        nb::dict d;
#define PAGED_MLX_FIELD(name) d[#name] = t.name;
        PAGED_MLX_THRESHOLDS(PAGED_MLX_FIELD)
#undef PAGED_MLX_FIELD
        return nb::make_tuple(d, thresholds_are_measured(device, itemsize));
      },
      "kernels"_a, "itemsize"_a,
      "The planner's thresholds for a device, and whether they were measured here.");
  m.def(
      "set_plan_thresholds",
      [](bool kernels, int itemsize, const std::optional<nb::dict>& measured) {
        std::optional<Thresholds> t;
        if (measured) {
          t.emplace();
#define PAGED_MLX_FIELD(name) t->name = nb::cast<int>((*measured)[#name]);
          PAGED_MLX_THRESHOLDS(PAGED_MLX_FIELD)
#undef PAGED_MLX_FIELD
        }
        set_thresholds(kernels ? PlanDevice::gpu : PlanDevice::cpu, itemsize, t);
      },
      "kernels"_a, "itemsize"_a, "measured"_a.none(),
      "Plan with thresholds measured here; None: with the table's again.");
  m.def(
      "check_tables",
      [](std::string op, const Ints& block_tables, const Ints& context_lens,
         const std::optional<Ints>& page_starts, const std::optional<Ints>& page_lens,
         int num_pages, int page_size) {
        check_whole_contexts(
            step_of(op, block_tables, context_lens, std::nullopt, page_starts, page_lens),
            num_pages, page_size);
      },
      "op"_a, "block_tables"_a, "context_lens"_a, "page_starts"_a.none(), "page_lens"_a.none(),
      "num_pages"_a, "page_size"_a,
      "Raise ValueError unless the tables cover the whole contexts; NO_PAGE is allowed.");
  m.def(
      "attention_geometry",
      [](const mx::array& q, const std::vector<mx::array>& pages, const FormatNames& formats) {
        const PlanGeometry g =
            attention_geometry(q, pages, page_formats("paged_attention", formats));
        nb::dict d;
        d["tokens"] = g.num_tokens;
        d["num_q_heads"] = g.num_q_heads;
        d["num_kv_heads"] = g.num_kv_heads;
        d["page_size"] = g.page_size;
        d["num_pages"] = g.num_pages;
        return d;
      },
      "q"_a, "pages"_a, "formats"_a = FormatNames(),
      "Heads, page size and counts, after checking shapes and dtypes.");
}

} // namespace paged_mlx
