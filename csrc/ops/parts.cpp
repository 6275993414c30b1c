#include "ops/parts.h"

#include "ops/dispatch.h"
#include "plan_format.h"

namespace paged_mlx {

std::vector<Part> parts_of(const mx::array& plan, int dims, mx::Stream s) {
  if (plan.is_tracer() || !runs_kernels(s)) {
    return {{}};
  }
  const int32_t* const words = plan.data<int32_t>();
  const auto ranges = metal::cut_items(words, dims);
  const int num_partials =
      ranges.size() > 1 ? reinterpret_cast<const PlanHeader*>(words)->num_partials : 0;
  std::vector<Part> parts;
  for (const auto& range : ranges) {
    parts.push_back({range, num_partials});
  }
  return parts;
}

std::vector<mx::Shape> partial_shapes(const Part& part, int num_q_heads, int v_head_dim) {
  if (part.num_partials == 0) {
    return {};
  }
  return {{part.num_partials, num_q_heads, v_head_dim}, {part.num_partials, num_q_heads, 2}};
}

} // namespace paged_mlx
