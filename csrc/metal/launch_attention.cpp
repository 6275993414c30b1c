#include <algorithm>
#include <stdexcept>
#include <string>

#include "arguments.h"
#include "metal/launch.h"

namespace paged_mlx::metal {

namespace {

constexpr double kLog2E = 1.4426950408889634;

const PlanHeader& header(const AttendCall& call) {
  return *reinterpret_cast<const PlanHeader*>(call.words);
}

const PlanItem* items(const AttendCall& call) {
  return reinterpret_cast<const PlanItem*>(call.words + header(call).items);
}

int gqa_factor(const AttendCall& call) {
  return header(call).num_q_heads / header(call).num_kv_heads;
}

AttendArguments arguments_of(const AttendCall& call) {
  const PlanHeader& plan = header(call);
  AttendArguments a{};
  a.mask_head_stride = call.mask_head_stride;
  a.mask_token_stride = call.mask_token_stride;
  a.items = plan.items;
  a.row_tokens = plan.row_tokens;
  a.positions = plan.positions;
  a.row_ends = plan.row_ends;
  a.pages = plan.pages;
  a.page_starts = plan.page_starts;
  a.page_lens = plan.page_lens;
  a.merges = plan.merges;
  a.parts = plan.parts;
  a.num_merges = plan.num_merges;
  a.num_q_heads = plan.num_q_heads;
  a.num_kv_heads = plan.num_kv_heads;
  a.gqa_factor = gqa_factor(call);
  a.sliding_window = plan.sliding_window;
  const AttentionOptions& o = call.options;
  const double unit = o.mask == MaskKind::additive ? 1.0 : kLog2E; // of scores
  a.scale = o.softcap > 0 ? o.scale / o.softcap : float(o.scale * unit);
  a.softcap = float(o.softcap * unit);
  return a;
}

// Every function constant has a value, whatever the kernel uses.
void set_constants(Variant& variant, const AttendCall& call) {
  const PlanHeader& plan = header(call);
  variant.set(PAGED_MLX_CONSTANT_WINDOW, plan.sliding_window > 0)
      .set(PAGED_MLX_CONSTANT_SOFTCAP, call.options.softcap > 0)
      .set(PAGED_MLX_CONSTANT_ALIBI, call.options.alibi)
      .set(PAGED_MLX_CONSTANT_SINKS, call.options.sinks)
      .set(PAGED_MLX_CONSTANT_MASK, call.options.mask != MaskKind::none)
      .set(PAGED_MLX_CONSTANT_RAGGED, plan.page_starts != 0)
      .set(PAGED_MLX_CONSTANT_PAGE_SIZE, plan.page_size)
      .set(PAGED_MLX_CONSTANT_MASK_ADDS, call.options.mask == MaskKind::additive);
}

// The widest threadgroup that the pipeline takes; a kernel may be compiled for
// fewer simdgroups only.
Variant fitting_variant(Encoder& encoder, const AttendCall& call, const Body& body,
                        int& simdgroups) {
  for (simdgroups = body.simdgroups;; simdgroups /= 2) {
    Variant variant =
        body_text(body, simdgroups, call.dtype, call.head_dim, call.v_head_dim, call.formats);
    set_constants(variant, call);
    if (simdgroups == 1 || encoder.max_threads(variant) >= 32 * simdgroups) {
      return variant;
    }
  }
}

struct Partials {
  Buffer out, state;
};

Partials make_partials(Encoder& encoder, const AttendCall& call) {
  const PlanHeader& plan = header(call);
  if (call.partial_out) {
    return {call.partial_out, call.partial_state};
  }
  if (plan.num_partials == 0) {
    return {call.lse, call.lse}; // bound, never touched
  }
  const size_t rows = size_t(plan.num_partials) * plan.num_q_heads;
  return {encoder.temporary(rows * call.v_head_dim * sizeof(float)),
          encoder.temporary(rows * 2 * sizeof(float))};
}

void bind(Encoder& encoder, const AttendCall& call, const Partials& partials) {
  encoder.set_input(PAGED_MLX_BUFFER_PLAN, call.plan);
  encoder.set_input(PAGED_MLX_BUFFER_Q, call.q);
  encoder.set_pages(PAGED_MLX_BUFFER_K_PAGES, call.k_pages);
  encoder.set_pages(PAGED_MLX_BUFFER_V_PAGES, call.v_pages);
  if (call.formats.k != PageFormat::dense) {
    encoder.set_pages(PAGED_MLX_BUFFER_K_SCALES, call.k_scales.scales);
    encoder.set_pages(PAGED_MLX_BUFFER_K_BIASES, call.k_scales.biases);
  }
  if (call.formats.v != PageFormat::dense) {
    encoder.set_pages(PAGED_MLX_BUFFER_V_SCALES, call.v_scales.scales);
    encoder.set_pages(PAGED_MLX_BUFFER_V_BIASES, call.v_scales.biases);
  }
  encoder.set_output(PAGED_MLX_BUFFER_OUT, call.out);
  encoder.set_output(PAGED_MLX_BUFFER_LSE, call.lse);
  encoder.set_output(PAGED_MLX_BUFFER_PARTIAL_OUT, partials.out);
  encoder.set_output(PAGED_MLX_BUFFER_PARTIAL_STATE, partials.state);
  if (call.options.alibi) {
    encoder.set_input(PAGED_MLX_BUFFER_ALIBI, call.alibi_slopes);
  }
  if (call.options.sinks) {
    encoder.set_input(PAGED_MLX_BUFFER_SINKS, call.sinks);
  }
  if (call.options.mask != MaskKind::none) {
    encoder.set_input(PAGED_MLX_BUFFER_MASK, call.mask);
  }
}

// The call's part of the items [begin, end), which are of `kind`. The body is that of
// all of them, so that no bit depends on where the plan is cut.
void attend_items(Encoder& encoder, const AttendCall& call, const Partials& partials, PlanKind kind,
                  int begin, int end) {
  const int first = std::max(begin, call.items.begin);
  const int count = std::min(end, call.items.end) - first;
  if (count <= 0) {
    return;
  }
  int rows = 0;
  for (int i = begin; i < end; i++) {
    rows = std::max(rows, items(call)[i].row_count * gqa_factor(call));
  }
  const Body body =
      choose_body(kind, rows, call.head_dim, call.v_head_dim, call.dtype, call.formats);
  int simdgroups = 0;
  const Variant variant = fitting_variant(encoder, call, body, simdgroups);
  const size_t row_tiles = (rows + body.rows - 1) / body.rows;
  AttendArguments arguments = arguments_of(call);
  arguments.items = header(call).items + first * int(sizeof(PlanItem) / sizeof(int32_t));
  encoder.set_variant(variant);
  bind(encoder, call, partials);
  encoder.set_arguments(PAGED_MLX_BUFFER_ARGUMENTS, arguments);
  encoder.dispatch({size_t(arguments.num_kv_heads), size_t(count), row_tiles},
                   {size_t(32 * simdgroups)});
}

// Items of open pages are attended like those of a dense pool.
AttendCall on_open_pages(AttendCall call) {
  call.k_pages = call.open_k;
  call.v_pages = call.open_v;
  call.formats = {};
  return call;
}

void merge_partials(Encoder& encoder, const AttendCall& call, const Partials& partials) {
  const PlanHeader& plan = header(call);
  Variant variant;
  variant.kernel = "merge";
  const int most = call.v_head_dim <= 256 ? 8 : 4;
  variant.define("T", type_name(call.dtype))
      .define("DV", call.v_head_dim)
      .define("SIMDGROUPS", most);
  if (call.formats.rotates()) {
    variant.define("ROTATED", 1);
  }
  set_constants(variant, call);
  const int simdgroups = std::clamp(encoder.max_threads(variant) / 32, 1, most);
  encoder.set_variant(variant);
  encoder.set_arguments(PAGED_MLX_BUFFER_ARGUMENTS, arguments_of(call));
  encoder.set_input(PAGED_MLX_BUFFER_PLAN, call.plan);
  encoder.set_input(PAGED_MLX_BUFFER_PARTIAL_OUT, partials.out);
  encoder.set_input(PAGED_MLX_BUFFER_PARTIAL_STATE, partials.state);
  encoder.set_output(PAGED_MLX_BUFFER_OUT, call.out);
  encoder.set_output(PAGED_MLX_BUFFER_LSE, call.lse);
  if (call.options.sinks) {
    encoder.set_input(PAGED_MLX_BUFFER_SINKS, call.sinks);
  }
  encoder.dispatch({size_t(plan.num_merges) * plan.num_q_heads}, {size_t(32 * simdgroups)});
}

} // namespace

const char* type_name(DType dtype) {
  return dtype == DType::float32 ? "float" : dtype == DType::float16 ? "half" : "bfloat";
}

Variant body_text(const Body& body, int simdgroups, DType dtype, int head_dim, int v_head_dim,
                  PageFormats formats) {
  Variant variant;
  variant.kernel = body.kernel;
  variant.define("T", type_name(dtype))
      .define("D", head_dim)
      .define("DV", v_head_dim)
      .define("ROWS", body.rows)
      .define("SIMDGROUPS", simdgroups);
  if (!formats.dense()) {
    variant.define("K_FORMAT", int(formats.k)).define("V_FORMAT", int(formats.v));
  }
  return variant;
}

void attend(Encoder& encoder, const AttendCall& call) {
  const PlanHeader& plan = header(call);
  if (call.formats.rotates() && plan.num_merges != plan.num_tokens) {
    throw std::invalid_argument(
        "[paged_attention] plan must have no final results where V is rotated, since the merge "
        "rotates them back; got some: plan for these formats, on this device.");
  }
  const Partials partials = make_partials(encoder, call);
  encoder.add_work(share_of_node(call.words, call.items, call.head_dim + call.v_head_dim));
  encoder.begin_concurrent();
  const AttendCall open = on_open_pages(call);
  int begin = 0;
  for (const PlanKind kind : {kVectorItem, kTileItem, kWideItem}) {
    const int end = begin + plan.num_items[kind], first_open = end - plan.num_open_items[kind];
    attend_items(encoder, call, partials, kind, begin, first_open);
    attend_items(encoder, open, partials, kind, first_open, end);
    begin = end;
  }
  encoder.end_concurrent();
  if (plan.num_merges > 0 && call.items.end >= begin) {
    merge_partials(encoder, call, partials);
  }
}

} // namespace paged_mlx::metal
