// Joins the partial results of a token that several items attended.
//
// Grid: one threadgroup per (merge, query head), heads fastest, of at most SIMDGROUPS
// simdgroups, which share the parts. Macros T, DV and SIMDGROUPS of prefix PAGED_MLX_; ROTATED
// where V is: the result is rotated back, in float32, before it is rounded.

#include "rotation.h"
#include "softmax.h"

using namespace paged_mlx;

[[kernel, max_total_threads_per_threadgroup(32 * PAGED_MLX_SIMDGROUPS)]] void merge(
    constant AttendArguments& arguments [[buffer(PAGED_MLX_BUFFER_ARGUMENTS)]],
    const device int* plan [[buffer(PAGED_MLX_BUFFER_PLAN)]],
    device PAGED_MLX_T* out [[buffer(PAGED_MLX_BUFFER_OUT)]],
    device float* lse [[buffer(PAGED_MLX_BUFFER_LSE)]],
    device float* partial_out [[buffer(PAGED_MLX_BUFFER_PARTIAL_OUT)]],
    device float* partial_state [[buffer(PAGED_MLX_BUFFER_PARTIAL_STATE)]],
    const device float* sinks [[buffer(PAGED_MLX_BUFFER_SINKS), function_constant(kHasSinks)]],
    uint3 group [[threadgroup_position_in_grid]],
    ushort thread_index [[thread_index_in_threadgroup]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort num_simdgroups [[simdgroups_per_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
  constexpr int DV = PAGED_MLX_DV, kQuads = DV / 4;
  constexpr int kLaneQuads = (kQuads + 31) / 32; // quads lane, lane + 32, ... of a row
  threadgroup float4 joined[PAGED_MLX_SIMDGROUPS * kQuads];
  const int num_q_heads = arguments.num_q_heads;
  const int head = group.x % num_q_heads;
  const PlanMerge merge =
      reinterpret_cast<const device PlanMerge*>(plan + arguments.merges)[group.x / num_q_heads];
  const device int* parts = plan + arguments.parts + merge.part_begin;
  const device float2* states = reinterpret_cast<const device float2*>(partial_state);
  const ResultWriter<PAGED_MLX_T, DV> writer{out,   lse,         partial_out, partial_state,
                                             sinks, num_q_heads, -1};

  // Each simdgroup joins the maxima and sums of all parts.
  SoftmaxState all;
  for (int p = lane; p < merge.part_count; p += 32) {
    const float2 part = states[writer.element(parts[p], head)];
    all.raise(max(all.most, part.x));
    all.sum += part.y * weight_at(part.x - all.most);
  }
  all.raise(simd_max(all.most));
  all.sum = simd_sum(all.sum);

  // It adds the values of its own parts, the lanes knowing one of them each.
  float4 sums[kLaneQuads] = {};
  const int end = merge.part_count * (simdgroup + 1) / num_simdgroups;
  for (int first = merge.part_count * simdgroup / num_simdgroups; first < end; first += 32) {
    const int slot = parts[min(first + lane, end - 1)];
    const float weight = weight_at(states[writer.element(slot, head)].x - all.most);
    for (int p = 0; p < min(32, end - first); p++) {
      const device float4* values = reinterpret_cast<const device float4*>(partial_out) +
          writer.element(simd_shuffle(slot, p), head) * kQuads;
      const float part_weight = simd_shuffle(weight, p);
#pragma clang loop unroll(full)
      for (int i = 0; i < kLaneQuads; i++) {
        const int quad = lane + 32 * i;
        sums[i] += quad < kQuads ? part_weight * values[quad] : float4(0);
      }
    }
  }
#pragma clang loop unroll(full)
  for (int i = 0; i < kLaneQuads; i++) {
    if (lane + 32 * i < kQuads) {
      joined[simdgroup * kQuads + lane + 32 * i] = sums[i];
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  const float factor = finish(all.most, all.sum, writer.sink(head)).factor;
#ifdef PAGED_MLX_ROTATED
  if (simdgroup == 0) {
    float4 totals[kLaneQuads] = {};
#pragma clang loop unroll(full)
    for (int i = 0; i < kLaneQuads; i++) {
      for (int s = 0; lane + 32 * i < kQuads && s < num_simdgroups; s++) {
        totals[i] += joined[s * kQuads + lane + 32 * i];
      }
    }
    rotate_quads<DV>(totals, lane);
#pragma clang loop unroll(full)
    for (int i = 0; i < kLaneQuads; i++) {
      const float values[4] = {totals[i].x, totals[i].y, totals[i].z, totals[i].w};
      if (lane + 32 * i < kQuads) {
        writer.write_values(merge.token, head, 0, 4 * (lane + 32 * i), factor, values);
      }
    }
  }
#else
  for (int quad = thread_index; quad < kQuads; quad += 32 * num_simdgroups) {
    float4 total = 0;
    for (int s = 0; s < num_simdgroups; s++) {
      total += joined[s * kQuads + quad];
    }
    const float values[4] = {total.x, total.y, total.z, total.w};
    writer.write_values(merge.token, head, 0, 4 * quad, factor, values);
  }
#endif
  if (thread_index == 0) {
    writer.write_state(merge.token, head, 0, all.most, all.sum);
  }
}
