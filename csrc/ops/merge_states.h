// Joins attention over parts of a context.
#pragma once

#include <vector>

#include "mlx/array.h"
#include "mlx/primitives.h"
#include "mlx/utils.h"

namespace paged_mlx {

namespace mx = mlx::core;

// outs: arrays [tokens, num_q_heads, v_head_dim]; lses: float32 [tokens,
// num_q_heads], natural log. Returns {out, lse} of the union of the parts.
std::vector<mx::array> merge_states(
    const std::vector<mx::array>& outs,
    const std::vector<mx::array>& lses,
    mx::StreamOrDevice s = {});

class MergeStates : public mx::Primitive {
 public:
  explicit MergeStates(mx::Stream stream) : mx::Primitive(stream) {}

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  void eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override {
    return {inputs[0].shape(), inputs[inputs.size() / 2].shape()};
  }
  bool is_equivalent(const mx::Primitive&) const override {
    return true;
  }
  const char* name() const override {
    return "MergeStates";
  }
};

} // namespace paged_mlx
