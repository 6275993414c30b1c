#include "ops/write_attend.h"

#include "mlx/allocator.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/ops.h"

#include "metal/launch.h"
#include "ops/launch.h"
#include "shape_check.h"

namespace paged_mlx {

namespace {

constexpr const char* kOp = "write_attend";

enum Input { kQ, kKPages, kVPages, kPlan, kK, kV, kSlots };
enum Output { kOut, kKNext, kVNext, kNumOutputs, kPartialOut = kNumOutputs, kPartialState };

int num_tokens(const mx::array& q) {
  return q.shape(0) * q.shape(2);
}

PlanGeometry geometry_of(const mx::array& q, const mx::array& k_pages) {
  return {
      num_tokens(q), q.shape(1), k_pages.shape(1), k_pages.shape(2), k_pages.shape(0), /*mask_keys=*/-1};
}

// Tokens lie as the next projection reads them, one after another.
void allocate_output(mx::array& out) {
  auto memory = mx::allocator::malloc(out.nbytes());
  if (out.ndim() != 4 || out.shape(1) == 1 || out.shape(2) == 1) {
    out.set_data(std::move(memory));
  } else {
    const mx::array::Flags gapless{/*contiguous=*/true, /*row_contiguous=*/false, /*col_contiguous=*/false};
    out.set_data(std::move(memory), out.size(), token_major_strides(out.shape()), gapless);
  }
}

// New tokens of one side, K or V, and the pages they go to.
struct Writer {
  TokenRows tokens;
  char* pages;
  int64_t page_size;

  void operator()(int64_t token, int64_t slot) const {
    const int64_t page = slot / page_size, offset = slot % page_size;
    for (int64_t h = 0; h < tokens.num_heads(); h++) {
      const int64_t row = (page * tokens.num_heads() + h) * page_size + offset;
      tokens.copy(token, h, pages + row * tokens.row_bytes());
    }
  }
};

void write(const std::vector<Writer>& writers, const int32_t* slots, int64_t num_slots) {
  for (int64_t t = 0; !writers.empty() && t < writers[0].tokens.num_tokens(); t++) {
    if (slots[t] >= num_slots) {
      fail(
          kOp,
          "slots must be less than num_pages * page_size = " + std::to_string(num_slots),
          std::to_string(slots[t]));
    }
    for (const Writer& writer : writers) {
      if (slots[t] >= 0) {
        writer(t, slots[t]);
      }
    }
  }
}

} // namespace

std::vector<mx::array> write_attend(
    const mx::array& q,
    const mx::array& k_pages,
    const mx::array& v_pages,
    const mx::array& plan,
    const std::optional<NewTokens>& tokens,
    float scale,
    const std::optional<mx::array>& sinks,
    mx::StreamOrDevice s_) {
  const auto s = mx::to_stream(s_);
  ShapeCheck shape(kOp);
  shape("q", q, {"q_batch", "num_q_heads", "q_tokens", "head_dim"});
  check_pages(kOp, shape, q, k_pages, v_pages);
  check_not_traced(kOp, "q", q, k_pages);
  check_number(kOp, "scale", scale, false);
  check_plan(kOp, plan, geometry_of(q, k_pages));
  const WriteAttend::Options options{scale, tokens.has_value(), sinks.has_value()};
  std::vector<mx::array> inputs = {
      for_kernels(q, s), row_contiguous(k_pages, s), row_contiguous(v_pages, s), plan};
  inputs.reserve(8);
  if (tokens) {
    const auto& [k, v, slots] = *tokens;
    check_tokens(kOp, shape, k, v, k.shape(0), k.shape(2));
    check_not_traced(kOp, "k", k, k_pages);
    check_dtype(kOp, "slots", slots, mx::int32, "slot numbers");
    if (slots.ndim() != 1 || slots.shape(0) != k.shape(0) * k.shape(2)) {
      fail(kOp, "slots must have one number for each token of k, " + shape_string(k), shape_string(slots));
    }
    inputs.push_back(for_kernels(mx::astype(k, k_pages.dtype(), s), s));
    inputs.push_back(for_kernels(mx::astype(v, k_pages.dtype(), s), s));
    inputs.push_back(slots);
  }
  if (sinks) {
    inputs.push_back(per_head(kOp, "sinks", *sinks, shape, s));
  }
  const auto parts = parts_of(plan, q.shape(3) + v_pages.shape(3), s);
  auto outputs = chain(parts, inputs, kKNext, [&](const Part& part, auto part_inputs) {
    const auto node = std::make_shared<WriteAttend>(s, options, part);
    std::vector<mx::Dtype> dtypes(kNumOutputs, q.dtype());
    auto shapes = node->output_shapes(part_inputs);
    dtypes.resize(shapes.size(), mx::float32);
    return mx::array::make_arrays(std::move(shapes), dtypes, node, std::move(part_inputs));
  });
  outputs.erase(outputs.begin() + kNumOutputs, outputs.end());
  return outputs;
}

std::vector<mx::Shape> WriteAttend::output_shapes(const std::vector<mx::array>& inputs) {
  const auto &q = inputs[kQ], &v_pages = inputs[kVPages];
  std::vector<mx::Shape> shapes = {
      {q.shape(0), q.shape(1), q.shape(2), v_pages.shape(3)}, inputs[kKPages].shape(), v_pages.shape()};
  for (auto& partial : partial_shapes(part_, q.shape(1), v_pages.shape(3))) {
    shapes.push_back(std::move(partial));
  }
  return shapes;
}

bool WriteAttend::writes() const {
  return options_.tokens && part_.is_first();
}

// Where the sinks stand among the inputs; -1: there are none.
int WriteAttend::sinks_at() const {
  return !options_.sinks ? -1 : options_.tokens ? kSlots + 1 : kK;
}

// The launch as a function of an encoder and of what binds inputs and outputs.
auto WriteAttend::launch(const std::vector<mx::array>& inputs) const {
  const auto &q = inputs[kQ], &k_pages = inputs[kKPages], &v_pages = inputs[kVPages];
  metal::WritePagesCall write{};
  write.tokens = writes() ? inputs[kSlots].shape(0) : 0;
  write.num_kv_heads = k_pages.shape(1);
  write.page_size = k_pages.shape(2);
  write.row = {row_bytes(k_pages), row_bytes(v_pages)};
  metal::AttendCall attend{};
  attend.dtype = cpu_dtype(q.dtype());
  attend.words = inputs[kPlan].data<int32_t>();
  attend.head_dim = q.shape(3);
  attend.v_head_dim = v_pages.shape(3);
  attend.scale = options_.scale;
  attend.items = part_.items;
  const size_t lse_bytes = size_t(num_tokens(q)) * q.shape(1) * sizeof(float);
  return [write,
          attend,
          lse_bytes,
          part = part_,
          sinks = sinks_at(),
          geometry = geometry_of(q, k_pages),
          words = inputs[kPlan].size()](metal::Encoder& encoder, auto in, auto out) mutable {
    check_plan(kOp, attend.words, words, geometry);
    attend.k_pages = write.k_pages = out(kKNext);
    attend.v_pages = write.v_pages = out(kVNext);
    if (write.tokens > 0) {
      write.k = in(kK);
      write.v = in(kV);
      write.slots = in(kSlots);
      metal::write_pages(encoder, write);
    }
    attend.q = in(kQ);
    attend.plan = in(kPlan);
    attend.out = out(kOut);
    attend.lse = encoder.temporary(lse_bytes);
    attend.sinks = sinks < 0 ? nullptr : in(sinks);
    attend.partial_out = part.num_partials ? out(kPartialOut) : nullptr;
    attend.partial_state = part.num_partials ? out(kPartialState) : nullptr;
    metal::attend(encoder, attend);
  };
}

void WriteAttend::eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  take_memory(part_, inputs, outputs, kKNext, allocate_output);
  auto bound = inputs;
  bound[kQ] = token_major(inputs[kQ], stream());
  if (host_launch(stream())) {
    for (int i = kK; i <= kV && writes(); i++) {
      bound[i] = token_major(inputs[i], stream());
    }
    return dispatch_on_host(stream(), bound, outputs, launch(inputs));
  }
  if (!part_.is_last()) { // made for kernels, but none run: the last node does everything
    return;
  }
  cpu::AttentionArgs args{};
  args.dtype = cpu_dtype(inputs[kQ].dtype());
  args.q = bound[kQ].data<char>();
  args.k_pages = inputs[kKPages].data<char>();
  args.v_pages = inputs[kVPages].data<char>();
  args.plan = inputs[kPlan].data<int32_t>();
  args.out = outputs[kOut].data<char>();
  args.head_dim = inputs[kQ].shape(3);
  args.v_head_dim = inputs[kVPages].shape(3);
  args.scale = options_.scale;
  args.sinks = sinks_at() < 0 ? nullptr : inputs[sinks_at()].data<float>();
  const int64_t page_size = inputs[kKPages].shape(2);
  const int32_t* slots = nullptr;
  std::vector<Writer> writers;
  if (options_.tokens) {
    writers.push_back({TokenRows(inputs[kK]), outputs[kKNext].data<char>(), page_size});
    writers.push_back({TokenRows(inputs[kV]), outputs[kVNext].data<char>(), page_size});
    slots = inputs[kSlots].data<int32_t>();
  }
  auto& encoder = mx::cpu::get_command_encoder(stream());
  for (const auto& input : inputs) {
    encoder.set_input_array(input);
  }
  for (auto& output : outputs) {
    encoder.set_output_array(output);
  }
  encoder.dispatch([args,
                    writers,
                    slots,
                    num_slots = inputs[kKPages].shape(0) * page_size,
                    geometry = geometry_of(inputs[kQ], inputs[kKPages]),
                    words = inputs[kPlan].size()]() {
    check_plan(kOp, args.plan, words, geometry);
    write(writers, slots, num_slots);
    cpu::attend(args);
  });
}

void WriteAttend::eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  take_memory(part_, inputs, outputs, kKNext, allocate_output);
  dispatch_on_gpu(kOp, stream(), inputs, outputs, launch(inputs));
}

} // namespace paged_mlx
