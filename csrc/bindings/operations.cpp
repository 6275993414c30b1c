#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include "bindings/module.h"
#include "cpu/dispatch.h"
#include "metal/gpu_cores.h"
#include "metal/launch.h"
#include "metal/pipeline_limits.h"
#include "ops/attention.h"
#include "ops/dtypes.h"
#include "ops/merge_states.h"
#include "ops/pages.h"
#include "ops/pool_memory.h"
#include "ops/primitive.h"
#include "ops/routes.h"
#include "shape_check.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace paged_mlx {

namespace {

PageFormat page_format(const char* op, const std::optional<std::string>& name, PageFormat four) {
  if (name && *name != "q8" && *name != "q4") {
    fail(op, "formats must be a pair of None, 'q8' or 'q4'", "'" + *name + "'");
  }
  return !name ? PageFormat::dense : *name == "q8" ? PageFormat::token8 : four;
}

} // namespace

PageFormats page_formats(const char* op, const FormatNames& names) {
  return {page_format(op, names.first, PageFormat::channel4),
          page_format(op, names.second, PageFormat::token4)};
}

namespace {

// A dispatch as Python sees it. Memory is named by address and size.
nb::dict dispatch_dict(const metal::HostDispatch& dispatch) {
  nb::dict constants, buffers, bytes, d;
  for (const auto& constant : dispatch.variant.constants) {
    constants[nb::int_(constant.id)] = constant.is_bool ? nb::object(nb::bool_(constant.value != 0))
                                                        : nb::object(nb::int_(constant.value));
  }
  for (const auto& [index, buffer] : dispatch.buffers) {
    buffers[nb::int_(index)] =
        nb::make_tuple(reinterpret_cast<uintptr_t>(buffer.address), buffer.nbytes);
  }
  for (const auto& [index, data] : dispatch.bytes) {
    bytes[nb::int_(index)] = nb::bytes(data.data(), data.size());
  }
  auto size = [](const metal::Size& s) { return nb::make_tuple(s.x, s.y, s.z); };
  d["kernel"] = dispatch.variant.kernel;
  d["library"] = dispatch.variant.library_name();
  d["text"] = dispatch.variant.text();
  d["constants"] = constants;
  d["buffers"] = buffers;
  d["bytes"] = bytes;
  d["groups"] = size(dispatch.groups);
  d["group"] = size(dispatch.group);
  return d;
}

// The function lives as long as the process: the stream's thread may outlive
// the interpreter's last look at it.
metal::HostLaunch python_launch(const nb::callable& launch) {
  auto* held = new nb::callable(launch);
  return [held](const metal::HostDispatch& dispatch) {
    const nb::gil_scoped_acquire gil;
    (*held)(dispatch_dict(dispatch));
  };
}

WriteMode write_mode(bool alias) {
  return alias ? WriteMode::alias : WriteMode::donate;
}

} // namespace

void bind_operations(nb::module_& m) {
  m.def(
      "paged_attention",
      [](const mx::array& q, const Arrays& pages, const mx::array& plan, std::optional<float> scale,
         std::optional<float> cap, const std::optional<mx::array>& alibi_slopes,
         const std::optional<mx::array>& sinks, const std::optional<mx::array>& mask,
         const FormatNames& formats, mx::StreamOrDevice s) {
        return paged_attention(q, pages, plan, scale, cap, alibi_slopes, sinks, mask,
                               page_formats("paged_attention", formats), s);
      },
      "q"_a, "pages"_a, "plan"_a, "scale"_a = nb::none(), "cap"_a = nb::none(),
      "alibi_slopes"_a = nb::none(), "sinks"_a = nb::none(), "mask"_a = nb::none(), nb::kw_only(),
      "formats"_a = FormatNames(), "stream"_a = nb::none(), "[out, lse, *pages'] of one step.");
  m.def(
      "write_pages",
      [](const Arrays& tokens, const Arrays& pages, const mx::array& slots, bool alias,
         const FormatNames& formats, mx::StreamOrDevice s) {
        return write_pages(tokens, pages, slots, write_mode(alias),
                           page_formats("write_pages", formats), s);
      },
      "tokens"_a, "pages"_a, "slot_mapping"_a, nb::kw_only(), "alias"_a = false,
      "formats"_a = FormatNames(), "stream"_a = nb::none(),
      "[*pages'] with new tokens, [k, v], in their slots.");
  m.def(
      "seal_pages",
      [](const Arrays& sources, const std::vector<Arrays>& pages, const mx::array& pairs,
         const FormatNames& formats, bool rotated, mx::StreamOrDevice s) {
        return seal_pages(sources, pages, pairs, page_formats("seal_pages", formats), rotated, s);
      },
      "sources"_a, "pages"_a, "pairs"_a, "formats"_a, nb::kw_only(), "rotated"_a = true,
      "stream"_a = nb::none(),
      "[[*pages'], ...] of all layers, where page pairs[i, 0] of each layer's two sources has been "
      "quantised into page pairs[i, 1], pairs[i, 2] tokens of it. V of the sources is rotated.");
  m.def(
      "copy_pages",
      [](const std::vector<mx::array>& pools, const mx::array& pairs, bool alias,
         mx::StreamOrDevice s) { return copy_pages(pools, pairs, write_mode(alias), s); },
      "pools"_a, "pairs"_a, nb::kw_only(), "alias"_a = false, "stream"_a = nb::none(),
      "The pools with page pairs[i, 0] copied to page pairs[i, 1].");
  m.def(
      "pool_memory",
      [](const std::optional<mx::array>& kept, const std::vector<int>& shape, float fill,
         mx::Dtype dtype, int most_pages, mx::StreamOrDevice s) {
        const mx::Shape sizes(shape.begin(), shape.end());
        return pool_memory(kept, sizes, fill, dtype, most_pages, s);
      },
      "kept"_a.none(), "shape"_a, "fill"_a, "dtype"_a, nb::kw_only(), "most_pages"_a = 0,
      "stream"_a = nb::none(),
      "New memory for pages: those kept, and pages full of `fill`; with addresses for "
      "`most_pages`.");
  m.def("resized_in_place", &resized_in_place, "pages"_a, "num_pages"_a, "fill"_a,
        "Computed pages of pool_memory with more or fewer of them, where they are; None if that is "
        "not possible.");
  m.def(
      "gather_pages",
      [](const Arrays& pages, const mx::array& block_tables, const mx::array& context_lens,
         int length, const std::optional<mx::array>& page_starts,
         const std::optional<mx::array>& page_lens, const FormatNames& formats,
         mx::StreamOrDevice s) {
        return gather_pages(pages, block_tables, context_lens, length, page_starts, page_lens,
                            page_formats("gather_pages", formats), s);
      },
      "pages"_a, "block_tables"_a, "context_lens"_a, "length"_a, nb::kw_only(),
      "page_starts"_a = nb::none(), "page_lens"_a = nb::none(), "formats"_a = FormatNames(),
      "stream"_a = nb::none(), "[k, v, *pages'], K and V of each sequence made contiguous.");
  m.def("merge_states", &merge_states, "outs"_a, "lses"_a, nb::kw_only(), "stream"_a = nb::none(),
        "(out, lse) of the union of parts of a context.");
}

void bind_diagnostics(nb::module_& m) {
  m.def("route_counts", &route_counts,
        "How often each operation ran so far, and items of each kind: {name: {where: count}}.");
  m.def("buffer_copies", &buffer_copies,
        "Whole buffers copied so far because a write could not be done in place.");
  m.def(
      "data_address",
      [](const mx::array& a) { return reinterpret_cast<uintptr_t>(a.data<char>()); }, "a"_a,
      "Address of an evaluated array's memory.");
  m.def(
      "is_tracer", [](const mx::array& a) { return a.is_tracer(); }, "a"_a,
      "Whether the array stands for an input while mx.compile traces.");
  m.def(
      "is_stale",
      [](const mx::array& a) {
        return !a.is_tracer() && !a.has_primitive() && a.status() == mx::array::Status::unscheduled;
      },
      "a"_a, "Whether the array stood for an input of a trace that is over.");
  m.def(
      "is_pending",
      [](const mx::array& a) {
        return a.has_primitive() && a.status() == mx::array::Status::unscheduled;
      },
      "a"_a, "Whether nobody has asked for the array's values yet.");
  m.def(
      "set_host_launch",
      [](std::optional<nb::callable> launch, std::optional<mx::Stream> spared) {
        set_host_launch(launch ? python_launch(*launch) : metal::HostLaunch(),
                        spared ? spared->index : -1);
      },
      "launch"_a.none(), "spared"_a = nb::none(),
      "Send every operation on the CPU through the Metal launch code: `launch` gets the "
      "dispatches, one dict each. None: back to the CPU code. The CPU stream `spared` stays "
      "with the CPU code.");
  m.def("has_host_launch", &has_host_launch,
        "Whether operations on the CPU go through the Metal launch code.");
  m.def("set_node_work", &metal::set_node_work, "multiply_adds"_a,
        "Multiply-adds after which attention on kernels becomes another node; 0: as usual.");
  m.def(
      "pipeline_limits",
      [] {
        nb::dict limits;
        for (const auto& [name, threads] : metal::pipeline_limits()) {
          limits[nb::str(name.c_str())] = threads;
        }
        return limits;
      },
      "Most threads of a threadgroup, by pipeline made on the GPU so far.");
  m.def(
      "note_pipeline",
      [](int rows, int head_dim, int v_head_dim, mx::Dtype dtype, int max_threads,
         const FormatNames& names) {
        const cpu::DType type = cpu_dtype(dtype);
        const PageFormats formats = page_formats("note_pipeline", names);
        const metal::Body body =
            metal::choose_body(kVectorItem, rows, head_dim, v_head_dim, type, formats);
        metal::note_pipeline(
            metal::body_text(body, body.simdgroups, type, head_dim, v_head_dim, formats),
            max_threads);
      },
      "rows"_a, "head_dim"_a, "v_head_dim"_a, "dtype"_a, "max_threads"_a,
      "formats"_a = FormatNames(),
      "Note a limit for attention_body's pipeline as if a GPU had made it; 0: forget it.");
  m.def("gpu_cores", &metal::gpu_cores, "Cores of the GPU; 0: there is none.");
  m.def("cores_of_architecture", &metal::cores_of_architecture, "architecture"_a,
        "Cores of a GPU of this architecture, about.");
  m.def(
      "attention_body",
      [](int rows, int head_dim, int v_head_dim, mx::Dtype dtype, const FormatNames& formats) {
        const metal::Body body =
            metal::choose_body(kVectorItem, rows, head_dim, v_head_dim, cpu_dtype(dtype),
                               page_formats("attention_body", formats));
        return nb::make_tuple(body.kernel, body.rows);
      },
      "rows"_a, "head_dim"_a, "v_head_dim"_a, "dtype"_a, "formats"_a = FormatNames(),
      "(kernel, rows) of the Metal body that attends a GPU's items of at most `rows` rows per KV "
      "head.");
  m.def("set_num_threads", &cpu::set_num_threads, "n"_a, "Threads of the CPU backend, at least 1.");
  m.def("num_threads", &cpu::num_threads, "Threads of the CPU backend.");
  m.def("isa_names", &cpu::isa_names, "Instruction sets that this machine runs, the best last.");
  m.def("isa", &cpu::isa, "The instruction set in use.");
  m.def("set_isa", &cpu::set_isa, "name"_a,
        "Use the kernels of one of isa_names(), or of the best (\"\"). False: there are none.");
}

} // namespace paged_mlx
