#include "ops/merge_states.h"

#include <cmath>
#include <limits>

#include "mlx/allocator.h"
#include "mlx/ops.h"

#include "metal/launch.h"
#include "ops/dtypes.h"
#include "ops/primitive.h"
#include "shape_check.h"

namespace paged_mlx {

namespace {

struct Part {
  const void* out;
  const float* lse;
};

// One row: weights exp(lse - max), an empty part (lse -inf) has none. A part whose lse is
// NaN or infinite makes the row NaN.
template <typename T>
void merge_row(const std::vector<Part>& parts, int64_t row, int64_t dim, T* out, float* lse) {
  constexpr float kNothing = -std::numeric_limits<float>::infinity();
  float most = kNothing;
  for (const Part& part : parts) {
    most = std::fmax(most, part.lse[row]);
  }
  std::vector<float> sum(dim, 0.0f);
  float total = 0;
  for (const Part& part : parts) {
    if (part.lse[row] == kNothing) {
      continue;
    }
    const float weight = std::exp(part.lse[row] - most);
    const T* from = static_cast<const T*>(part.out) + row * dim;
    total += weight;
    for (int64_t d = 0; d < dim; d++) {
      sum[d] += weight * static_cast<float>(from[d]);
    }
  }
  for (int64_t d = 0; d < dim; d++) {
    out[row * dim + d] = static_cast<T>(total == 0 ? 0.0f : sum[d] / total);
  }
  lse[row] = total == 0 ? kNothing : most + std::log(total);
}

auto merge_launch(const Arrays& inputs, const Arrays& outputs) {
  metal::MergeStatesCall call{};
  call.dtype = cpu_dtype(outputs[0].dtype());
  call.rows = outputs[1].size();
  call.dim = outputs[0].shape(2);
  return
      [call, count = int(inputs.size() / 2)](metal::Encoder& encoder, auto in, auto out) mutable {
        for (int i = 0; i < count; i++) {
          call.outs.push_back(in(i));
          call.lses.push_back(in(count + i));
        }
        call.out = out(0);
        call.lse = out(1);
        metal::merge_states(encoder, call);
      };
}

class MergeStates : public PagesPrimitive {
 public:
  using PagesPrimitive::PagesPrimitive;

  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override {
    return {inputs[0].shape(), inputs[inputs.size() / 2].shape()};
  }
  bool is_equivalent(const mx::Primitive&) const override {
    return true;
  }
  const char* name() const override {
    return "MergeStates";
  }

 protected:
  void eval(const Arrays& inputs, Arrays& outputs) override {
    for (auto& output : outputs) {
      output.set_data(mx::allocator::malloc(output.nbytes()));
    }
    if (runs_kernels(stream())) {
      return run_kernels(inputs, outputs, merge_launch(inputs, outputs));
    }
    switch (cpu_dtype(outputs[0].dtype())) {
      case cpu::DType::float32:
        return merge_on_cpu<float>(inputs, outputs);
      case cpu::DType::float16:
        return merge_on_cpu<mx::float16_t>(inputs, outputs);
      case cpu::DType::bfloat16:
        return merge_on_cpu<mx::bfloat16_t>(inputs, outputs);
    }
  }

 private:
  template <typename T>
  void merge_on_cpu(const Arrays& inputs, Arrays& outputs) {
    std::vector<Part> parts;
    const size_t count = inputs.size() / 2;
    for (size_t i = 0; i < count; i++) {
      parts.push_back({inputs[i].data<char>(), inputs[count + i].data<float>()});
    }
    run_on_cpu(inputs, outputs,
               [parts, out = outputs[0].data<T>(), lse = outputs[1].data<float>(),
                rows = int64_t(outputs[1].size()), dim = int64_t(outputs[0].shape(2))]() {
                 for (int64_t row = 0; row < rows; row++) {
                   merge_row<T>(parts, row, dim, out, lse);
                 }
               });
  }
};

} // namespace

std::vector<mx::array> merge_states(const std::vector<mx::array>& outs,
                                    const std::vector<mx::array>& lses, mx::StreamOrDevice s_) {
  const auto s = mx::to_stream(s_);
  if (outs.empty() || outs.size() != lses.size()) {
    fail("merge_states", "outs and lses must hold one array for each part, at least one",
         std::to_string(outs.size()) + " outs and " + std::to_string(lses.size()) + " lses");
  }
  ShapeCheck shape("merge_states");
  std::vector<mx::array> inputs;
  for (const auto& out : outs) {
    shape("outs", out, {"tokens", "num_q_heads", "v_head_dim"});
    check_float("merge_states", "outs", out);
    check_dtype("merge_states", "outs", out, outs[0].dtype(), "the dtype of the first");
    inputs.push_back(mx::contiguous(out, false, s));
  }
  for (const auto& lse : lses) {
    shape("lses", lse, {"tokens", "num_q_heads"});
    check_dtype("merge_states", "lses", lse, mx::float32, "log-sum-exp");
    inputs.push_back(mx::contiguous(lse, false, s));
  }
  return mx::array::make_arrays({outs[0].shape(), lses[0].shape()}, {outs[0].dtype(), mx::float32},
                                std::make_shared<MergeStates>(s), std::move(inputs));
}

} // namespace paged_mlx
