#include "ops/attention.h"

#include <cmath>

#include "mlx/allocator.h"
#include "mlx/ops.h"

#include "metal/launch.h"
#include "ops/dtypes.h"
#include "ops/page_arrays.h"
#include "ops/page_rows.h"
#include "ops/parts.h"
#include "ops/primitive.h"
#include "shape_check.h"

namespace paged_mlx {

namespace {

constexpr const char* kOp = "paged_attention";

enum Input { kQ, kPages };         // then the plan and the options
enum Output { kOut, kLse, kNext }; // then the results of partitions, of a node that hands them on

ShapeCheck check_arrays(const mx::array& q, const std::vector<mx::array>& pages,
                        PageFormats formats) {
  ShapeCheck shape(kOp);
  shape("q", q, {"tokens", "num_q_heads", "head_dim"});
  check_pages(kOp, shape, q, pages, formats);
  return shape;
}

// [num_q_heads or 1, tokens, keys], bool as it is, anything additive as float32.
mx::array normal_mask(const mx::array& mask, const ShapeCheck& shape, mx::Stream s) {
  const int tokens = shape.at("tokens"), heads = shape.at("num_q_heads");
  const bool ok = (mask.ndim() == 2 && mask.shape(0) == tokens) ||
      (mask.ndim() == 3 && mask.shape(1) == tokens &&
       (mask.shape(0) == 1 || mask.shape(0) == heads));
  if (!ok) {
    fail(
        kOp,
        "mask must have shape [tokens, keys] or [num_q_heads or 1, tokens, keys], where tokens = " +
            std::to_string(tokens) + " and num_q_heads = " + std::to_string(heads) + " from q",
        shape_string(mask));
  }
  if (mask.dtype() != mx::bool_) {
    check_float(kOp, "mask (unless bool)", mask);
  }
  auto m = mask.ndim() == 2 ? mx::expand_dims(mask, 0, s) : mask;
  m = mask.dtype() == mx::bool_ ? m : mx::astype(m, mx::float32, s);
  return mx::contiguous(m, false, s);
}

int64_t head_stride(const mx::array& mask) {
  return mask.shape(0) == 1 ? 0 : int64_t(mask.shape(1)) * mask.shape(2);
}

PlanGeometry geometry_of(const ShapeCheck& shape, PageFormats formats,
                         const std::optional<mx::array>& mask) {
  return {shape.at("tokens"),
          shape.at("num_q_heads"),
          shape.at("num_kv_heads"),
          shape.at("page_size"),
          shape.at("num_pages"),
          mask && mask->ndim() > 0 ? mask->shape(-1) : -1,
          formats.has_open_pages() ? shape.at("num_open") : 0};
}

// One node; attention whose work is long is a chain of them.
class PagedAttention : public PagesPrimitive {
 public:
  PagedAttention(mx::Stream stream, AttentionOptions options, LayerArrays layer, Part part)
      : PagesPrimitive(stream), options_(options), layer_(layer), part_(part) {}

  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override {
    const auto& q = inputs[kQ];
    std::vector<mx::Shape> shapes = {{q.shape(0), q.shape(1), layer_.v_head_dim},
                                     {q.shape(0), q.shape(1)}};
    for (int i = kPages; i < plan_at(); i++) {
      shapes.push_back(inputs[i].shape());
    }
    for (auto& partial : partial_shapes(part_, q.shape(1), layer_.v_head_dim)) {
      shapes.push_back(std::move(partial));
    }
    return shapes;
  }
  bool is_equivalent(const mx::Primitive& other) const override {
    const auto& node = static_cast<const PagedAttention&>(other);
    return options_ == node.options_ && layer_ == node.layer_ && part_ == node.part_;
  }
  const char* name() const override {
    return "PagedAttention";
  }

 protected:
  void eval(const Arrays& inputs, Arrays& outputs) override;

 private:
  // Where each optional input stands; -1: not given.
  struct OptionalInputs {
    int alibi, sinks, mask;
  };
  OptionalInputs optional_inputs() const {
    int next = plan_at() + 1;
    OptionalInputs at;
    at.alibi = options_.alibi ? next++ : -1;
    at.sinks = options_.sinks ? next++ : -1;
    at.mask = options_.mask != MaskKind::none ? next++ : -1;
    return at;
  }
  int plan_at() const {
    return kPages + layer_.count();
  }
  int partial_at() const { // among the outputs
    return kNext + layer_.count();
  }
  PlanGeometry geometry(const Arrays& inputs) const;
  auto launch(const Arrays& inputs);
  cpu::AttentionArgs cpu_args(const Arrays& inputs, Arrays& outputs) const;

  AttentionOptions options_;
  LayerArrays layer_; // of the inputs
  Part part_;
};

PlanGeometry PagedAttention::geometry(const Arrays& inputs) const {
  const auto &q = inputs[kQ], &k = inputs[kPages];
  const int mask = optional_inputs().mask;
  const int mask_keys = mask < 0 ? -1 : inputs[mask].shape(2);
  return {q.shape(0),
          q.shape(1),
          k.shape(1),
          k.shape(2),
          k.shape(0),
          mask_keys,
          layer_.num_open(inputs)};
}

auto PagedAttention::launch(const Arrays& inputs) {
  metal::AttendCall call{};
  call.dtype = cpu_dtype(inputs[kQ].dtype());
  call.words = inputs[plan_at()].data<int32_t>();
  call.head_dim = inputs[kQ].shape(2);
  call.v_head_dim = layer_.v_head_dim;
  call.options = options_;
  call.items = part_.items;
  const OptionalInputs at = optional_inputs();
  if (at.mask >= 0) {
    call.mask_head_stride = head_stride(inputs[at.mask]);
    call.mask_token_stride = inputs[at.mask].shape(2);
  }
  return [call, at, part = part_, layer = layer_, plan = plan_at(), partial = partial_at(),
          place = place_of_kernels(device()), geometry = geometry(inputs),
          words = inputs[plan_at()].size()](metal::Encoder& encoder, auto in, auto out) mutable {
    check_plan(kOp, call.words, words, geometry);
    if (part.is_last()) {
      count_items(call.words, place);
    }
    call.q = in(kQ);
    layer.bind(call, in);
    layer.bind_open(call, in);
    call.plan = in(plan);
    call.out = out(kOut);
    call.lse = out(kLse);
    call.alibi_slopes = at.alibi < 0 ? nullptr : in(at.alibi);
    call.sinks = at.sinks < 0 ? nullptr : in(at.sinks);
    call.mask = at.mask < 0 ? nullptr : in(at.mask);
    call.partial_out = part.num_partials ? out(partial) : nullptr;
    call.partial_state = part.num_partials ? out(partial + 1) : nullptr;
    metal::attend(encoder, call);
  };
}

cpu::AttentionArgs PagedAttention::cpu_args(const Arrays& inputs, Arrays& outputs) const {
  auto optional = [&](int i) { return i < 0 ? nullptr : inputs[i].data<float>(); };
  const OptionalInputs at = optional_inputs();
  cpu::AttentionArgs args{};
  args.dtype = cpu_dtype(inputs[kQ].dtype());
  args.q = inputs[kQ].data<char>();
  args.k = layer_.k_side(inputs);
  args.v = layer_.v_side(inputs);
  args.open_k = layer_.open_k_side(inputs);
  args.open_v = layer_.open_v_side(inputs);
  args.plan = inputs[plan_at()].data<int32_t>();
  args.out = outputs[kOut].data<char>();
  args.lse = outputs[kLse].data<float>();
  args.options = options_;
  args.alibi_slopes = optional(at.alibi);
  args.sinks = optional(at.sinks);
  if (at.mask >= 0) {
    const mx::array& mask = inputs[at.mask];
    args.mask = {mask.data<char>(), head_stride(mask), mask.shape(2)};
  }
  return args;
}

void PagedAttention::eval(const Arrays& inputs, Arrays& outputs) {
  take_memory(part_, inputs, outputs, {kNext, size_t(layer_.count())},
              [](mx::array& output) { output.set_data(mx::allocator::malloc(output.nbytes())); });
  if (runs_kernels(stream())) {
    return run_kernels(inputs, outputs, launch(inputs));
  }
  if (!part_.is_last()) { // made for kernels, but none run: the last node attends everything
    return;
  }
  // mx.compile may have put another plan in the place of the one that was checked.
  run_on_cpu(inputs, outputs,
             [args = cpu_args(inputs, outputs), geometry = geometry(inputs),
              words = inputs[plan_at()].size()]() {
               check_plan(kOp, args.plan, words, geometry);
               count_items(args.plan, Place::cpu);
               cpu::attend(args);
             });
}

} // namespace

PlanGeometry attention_geometry(const mx::array& q, const std::vector<mx::array>& pages,
                                PageFormats formats) {
  return geometry_of(check_arrays(q, pages, formats), formats, std::nullopt);
}

std::vector<mx::array> paged_attention(const mx::array& q, const std::vector<mx::array>& pages,
                                       const mx::array& plan, std::optional<float> scale,
                                       std::optional<float> cap,
                                       const std::optional<mx::array>& alibi_slopes,
                                       const std::optional<mx::array>& sinks,
                                       const std::optional<mx::array>& mask, PageFormats formats,
                                       mx::StreamOrDevice s_) {
  const auto s = mx::to_stream(s_);
  ShapeCheck shape = check_arrays(q, pages, formats);
  check_plan(kOp, plan, geometry_of(shape, formats, mask));
  AttentionOptions options;
  options.scale = scale.value_or(1.0f / std::sqrt(float(shape.at("head_dim"))));
  check_number(kOp, "scale", options.scale, false);
  if (cap) {
    check_number(kOp, "softcap", *cap, true);
    options.softcap = *cap;
  }
  std::vector<mx::array> inputs = {mx::contiguous(q, false, s)};
  inputs.reserve(5 + pages.size());
  for (const mx::array& array : pages) {
    inputs.push_back(row_contiguous(array, s));
  }
  inputs.push_back(plan);
  if (alibi_slopes) {
    options.alibi = true;
    inputs.push_back(per_head(kOp, "alibi_slopes", *alibi_slopes, shape, s));
  }
  if (sinks) {
    options.sinks = true;
    inputs.push_back(per_head(kOp, "sinks", *sinks, shape, s));
  }
  if (mask) {
    options.mask = mask->dtype() == mx::bool_ ? MaskKind::boolean : MaskKind::additive;
    inputs.push_back(normal_mask(*mask, shape, s));
  }
  const auto parts = parts_of(plan, shape.at("head_dim") + shape.at("v_head_dim"), s);
  const PagesAt at{kNext, pages.size()};
  const LayerArrays layer{formats, shape.at("head_dim"), shape.at("v_head_dim"), kPages};
  auto outputs = chain(parts, inputs, at, [&](const Part& part, auto part_inputs) {
    const auto node = std::make_shared<PagedAttention>(s, options, layer, part);
    std::vector<mx::Dtype> dtypes = {q.dtype(), mx::float32};
    for (const mx::array& array : pages) {
      dtypes.push_back(array.dtype());
    }
    auto shapes = node->output_shapes(part_inputs);
    dtypes.resize(shapes.size(), mx::float32);
    return mx::array::make_arrays(std::move(shapes), dtypes, node, std::move(part_inputs));
  });
  outputs.erase(outputs.begin() + kNext + pages.size(), outputs.end());
  return outputs;
}

} // namespace paged_mlx
