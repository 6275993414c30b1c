// Joins the partial results of a token that several items attended.
//
// Grid: one simdgroup per (merge, query head), heads fastest; threadgroups may
// hold any number of simdgroups. Macros T and DV of prefix PAGED_MLX_.

#include "softmax.h"

using namespace paged_mlx;

[[kernel]] void merge(
    constant AttendArguments& arguments [[buffer(PAGED_MLX_BUFFER_ARGUMENTS)]],
    const device int* plan [[buffer(PAGED_MLX_BUFFER_PLAN)]],
    device PAGED_MLX_T* out [[buffer(PAGED_MLX_BUFFER_OUT)]],
    device float* lse [[buffer(PAGED_MLX_BUFFER_LSE)]],
    device float* partial_out [[buffer(PAGED_MLX_BUFFER_PARTIAL_OUT)]],
    device float* partial_state [[buffer(PAGED_MLX_BUFFER_PARTIAL_STATE)]],
    const device float* sinks [[buffer(PAGED_MLX_BUFFER_SINKS), function_constant(kHasSinks)]],
    uint3 group [[threadgroup_position_in_grid]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort num_simdgroups [[simdgroups_per_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
  constexpr int DV = PAGED_MLX_DV;
  const int num_q_heads = arguments.num_q_heads;
  const long row = long(group.x) * num_simdgroups + simdgroup;
  if (row >= long(arguments.num_merges) * num_q_heads) {
    return;
  }
  const int head = row % num_q_heads;
  const device PlanMerge& merge =
      reinterpret_cast<const device PlanMerge*>(plan + arguments.merges)[row / num_q_heads];
  const device int* parts = plan + arguments.parts + merge.part_begin;
  const ResultWriter<PAGED_MLX_T, DV> writer{
      out, lse, partial_out, partial_state, sinks, num_q_heads, -1};

  float most = kLowest, sum = 0;
  for (int p = lane; p < merge.part_count; p += 32) {
    most = max(most, partial_state[2 * writer.element(parts[p], head)]);
  }
  most = simd_max(most);
  for (int p = lane; p < merge.part_count; p += 32) {
    const long at = writer.element(parts[p], head);
    sum += partial_state[2 * at + 1] * weight_at(partial_state[2 * at] - most);
  }
  sum = simd_sum(sum);

  const float factor = finish(most, sum, writer.sink(head)).factor;
  for (int column = 4 * lane; column < DV; column += 128) {
    float sums[4] = {0, 0, 0, 0};
    for (int p = 0; p < merge.part_count; p++) {
      const long at = writer.element(parts[p], head);
      const float weight = weight_at(partial_state[2 * at] - most);
      const float4 values =
          *reinterpret_cast<const device float4*>(partial_out + at * DV + column);
      for (int i = 0; i < 4; i++) {
        sums[i] += weight * values[i];
      }
    }
    writer.write_values(merge.token, head, 0, column, factor, sums);
  }
  if (lane == 0) {
    writer.write_state(merge.token, head, 0, most, sum);
  }
}
