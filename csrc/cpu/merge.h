// Joins the partial states of a token, in the order the plan lists them.
#pragma once

#include "cpu/rows.h"

namespace paged_mlx::cpu {
namespace {

template <typename X>
void merge_head(const Job& job, const PlanMerge& merge, int head, float* acc) {
  const int32_t* const parts = job.parts + merge.part_begin;
  auto at = [&](int i) { return int64_t(parts[i]) * job.num_q_heads + head; };
  float most = kNegInf;
  for (int i = 0; i < merge.part_count; i++) {
    const float m = job.partial_max[at(i)];
    most = m > most ? m : most;
  }
  memset(acc, 0, padded(job.v_head_dim) * sizeof(float));
  float sum = 0.0f;
  for (int i = 0; i < merge.part_count; i++) {
    const float part_sum = job.partial_sum[at(i)];
    if (job.partial_max[at(i)] == kNegInf && part_sum == 0.0f) {
      continue;
    }
    const float weight = exp2((job.partial_max[at(i)] - most) * exponent_unit(job));
    const float* const part = job.partial_acc + at(i) * job.partial_stride;
    sum += weight * part_sum;
    for (int d = 0; d < padded(job.v_head_dim); d += kLanes) {
      store(acc + d, fma(splat(weight), load(part + d), load(acc + d)));
    }
  }
  write_result<X>(job, merge.token, head, acc, most, sum);
}

template <typename X>
void merge_partials(const Job& job, int begin, int end, char* memory) {
  Scratch scratch{memory};
  float* const acc = scratch.take<float>(padded(job.v_head_dim));
  for (int i = begin; i < end; i++) {
    for (int head = 0; head < job.num_q_heads; head++) {
      merge_head<X>(job, job.merges[i], head, acc);
    }
  }
}

} // namespace
} // namespace paged_mlx::cpu
