// Writes a step's K and V into their pages and attends, as one node of the graph.
#pragma once

#include <optional>
#include <vector>

#include "mlx/array.h"
#include "mlx/utils.h"

namespace paged_mlx {

namespace mx = mlx::core;

// q [q_batch, num_q_heads, q_tokens, head_dim], its tokens those of the plan. k [batch,
// num_kv_heads, tokens, head_dim] and v [batch, num_kv_heads, tokens, v_head_dim] go to
// `slots` of the pages first, int32 [batch * tokens], -1 skips a token, so that the plan may
// name them; without the three the call only attends. q, k and v may have any strides.
// sinks: float [num_q_heads].
//
// Returns {out [q_batch, num_q_heads, q_tokens, v_head_dim], k_pages', v_pages'}.
// The pages are written in place: for the linear versions of a pool.
std::vector<mx::array> write_attend(const mx::array& q, const mx::array& k_pages,
                                    const mx::array& v_pages, const mx::array& plan,
                                    const std::optional<mx::array>& k,
                                    const std::optional<mx::array>& v,
                                    const std::optional<mx::array>& slots, float scale,
                                    const std::optional<mx::array>& sinks,
                                    mx::StreamOrDevice s = {});

} // namespace paged_mlx
