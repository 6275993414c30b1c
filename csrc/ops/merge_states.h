// Joins attention over parts of a context.
#pragma once

#include <vector>

#include "mlx/array.h"
#include "mlx/utils.h"

namespace paged_mlx {

namespace mx = mlx::core;

// outs: arrays [tokens, num_q_heads, v_head_dim]; lses: float32 [tokens,
// num_q_heads], natural log. Returns {out, lse} of the union of the parts.
std::vector<mx::array> merge_states(const std::vector<mx::array>& outs,
                                    const std::vector<mx::array>& lses, mx::StreamOrDevice s = {});

} // namespace paged_mlx
