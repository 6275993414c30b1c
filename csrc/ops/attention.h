// paged_attention as a node of MLX's graph.
#pragma once

#include <optional>
#include <vector>

#include "mlx/array.h"
#include "mlx/utils.h"

#include "ops/attention_checks.h"

namespace paged_mlx {

namespace mx = mlx::core;

// Checks shapes and dtypes. Throws std::invalid_argument in the one message form.
PlanGeometry attention_geometry(const mx::array& q, const std::vector<mx::array>& pages,
                                PageFormats formats);

// Inputs: q [tokens, num_q_heads, head_dim], the arrays of a layer's pages as page_format.h
// has them, plan int32 [words]. Then the options, as AttentionOptions has them: scale is
// 1 / sqrt(head_dim) unless given; alibi_slopes and sinks float [num_q_heads], mask
// [num_q_heads or 1, tokens, keys]. Everything is checked here, once, the plan too.
//
// Returns {out [tokens, num_q_heads, v_head_dim], lse float32 [tokens,
// num_q_heads], pages'...}: the primed pages share the buffers of the inputs and
// exist so that a later write can depend on this read.
std::vector<mx::array> paged_attention(const mx::array& q, const std::vector<mx::array>& pages,
                                       const mx::array& plan, std::optional<float> scale,
                                       std::optional<float> cap,
                                       const std::optional<mx::array>& alibi_slopes,
                                       const std::optional<mx::array>& sinks,
                                       const std::optional<mx::array>& mask, PageFormats formats,
                                       mx::StreamOrDevice s = {});

} // namespace paged_mlx
