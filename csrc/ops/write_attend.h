// Writes a step's K and V into their pages and attends, as one node of the graph.
#pragma once

#include <optional>
#include <vector>

#include "mlx/array.h"
#include "mlx/primitives.h"
#include "mlx/utils.h"

#include "ops/attention.h"
#include "ops/token_rows.h"

namespace paged_mlx {

// New tokens and their slots in the pages.
struct NewTokens {
  mx::array k;     // [batch, num_kv_heads, tokens, head_dim]
  mx::array v;     // [batch, num_kv_heads, tokens, v_head_dim]
  mx::array slots; // int32 [batch * tokens]; -1 skips a token
};

// q [q_batch, num_q_heads, q_tokens, head_dim], its tokens those of the plan. q, k
// and v may have any strides. `tokens` go to the pages first, so that the plan may
// name them; without them the call only attends. sinks: float [num_q_heads].
//
// Returns {out [q_batch, num_q_heads, q_tokens, v_head_dim], k_pages', v_pages'}.
// The pages are written in place: for the linear versions of a pool.
std::vector<mx::array> write_attend(
    const mx::array& q,
    const mx::array& k_pages,
    const mx::array& v_pages,
    const mx::array& plan,
    const std::optional<NewTokens>& tokens,
    float scale,
    const std::optional<mx::array>& sinks,
    mx::StreamOrDevice s = {});

// One node; attention whose work is long is a chain of them, and the first one writes.
class WriteAttend : public mx::Primitive {
 public:
  struct Options {
    float scale;
    bool tokens, sinks;

    bool operator==(const Options&) const = default;
  };

  WriteAttend(mx::Stream stream, Options options, Part part)
      : mx::Primitive(stream), options_(options), part_(part) {}

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  void eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override;
  bool is_equivalent(const mx::Primitive& other) const override {
    const auto& node = static_cast<const WriteAttend&>(other);
    return options_ == node.options_ && part_ == node.part_;
  }
  const char* name() const override {
    return "WriteAttend";
  }

 private:
  auto launch(const std::vector<mx::array>& inputs) const;
  int sinks_at() const;
  bool writes() const;

  Options options_;
  Part part_;
};

} // namespace paged_mlx
