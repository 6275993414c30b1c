// Rows of an item, the pages it walks, and what becomes of a row in the end.
//
// A row is one query head of one query token. Its softmax state is a running
// maximum, a sum of weights and an accumulator of values in lane order. The
// weight of a key is 2^((score - maximum) * log2 e): the difference is taken
// first, where it is exact for the keys that matter.
#pragma once

#include "arguments.h"
#include "cpu/job.h"
#include "cpu/page_codes.h"
#include "cpu/simd.h"

namespace paged_mlx::cpu {
namespace {

PAGED_MLX_INLINE int min_int(int a, int b) {
  return a < b ? a : b;
}
PAGED_MLX_INLINE int max_int(int a, int b) {
  return a > b ? a : b;
}
PAGED_MLX_INLINE int clamp_int(int x, int low, int high) {
  return min_int(max_int(x, low), high);
}

// Hands out aligned pieces of a worker's scratch.
struct Scratch {
  char* next;

  template <typename T>
  T* take(size_t count) {
    T* const at = reinterpret_cast<T*>(next);
    next += (count * sizeof(T) + 63) / 64 * 64;
    return at;
  }
};

// One row: who it is and which keys of the item it may see, [begin, end).
struct Row {
  int token;
  int head;
  int position;
  int begin;
  int end;
  int partial; // partial slot of its token, -1: final
};

PAGED_MLX_INLINE Row make_row(const Job& job, const PlanItem& item, int kv_head, int r) {
  const int t = r / job.gqa_factor;
  Row row;
  row.token = job.row_tokens[item.row_begin + t];
  row.head = kv_head * job.gqa_factor + r % job.gqa_factor;
  row.position = job.positions[row.token];
  row.begin = item.key_begin;
  if (job.sliding_window > 0) {
    row.begin = max_int(row.begin, row.position - job.sliding_window + 1);
  }
  row.end = item.page_count > 0 ? min_int(item.key_end, job.row_ends[row.token]) : row.begin;
  row.partial = item.partial < 0 ? -1 : item.partial + t;
  return row;
}

PAGED_MLX_INLINE int page_start(const Job& job, const PlanItem& item, int i) {
  return job.page_starts ? job.page_starts[item.page_begin + i]
                         : item.first_position + i * job.page_size;
}
PAGED_MLX_INLINE int page_len(const Job& job, const PlanItem& item, int i) {
  return job.page_starts ? job.page_lens[item.page_begin + i] : job.page_size;
}
// Row of the pool that holds slot 0 of page i of the item.
PAGED_MLX_INLINE int64_t first_row(const Job& job, const PlanItem& item, int i, int kv_head) {
  return page_row(job.pages[item.page_begin + i], kv_head, 0, job.num_kv_heads, job.page_size);
}

PAGED_MLX_INLINE const char* mask_row(const Job& job, const Row& row) {
  const int64_t at = row.head * job.mask->head_stride + row.token * job.mask->token_stride;
  const int64_t size = job.options.mask == MaskKind::boolean ? 1 : sizeof(float);
  return static_cast<const char*>(job.mask->data) + at * size;
}
// What the mask adds to the score of one key.
PAGED_MLX_INLINE float mask_bias(const Job& job, const char* mask, int key) {
  if (job.options.mask == MaskKind::boolean) {
    return mask[key] ? 0.0f : kNegInf;
  }
  return reinterpret_cast<const float*>(mask)[key];
}

// What a difference of two scores is multiplied by, to be an exponent of 2.
PAGED_MLX_INLINE float exponent_unit(const Job& job) {
  return job.score_unit * kLog2e;
}

// A dot product to a score, before masks: scale, softcap, ALiBi.
PAGED_MLX_INLINE Vec to_score(const Job& job, Vec dot, Vec slope, Vec distance) {
  Vec s = dot * splat(job.options.scale);
  if (job.options.softcap > 0) {
    const Vec cap = splat(job.options.softcap);
    s = cap * tanh(s / cap);
  }
  if (job.alibi_slopes) {
    s = fma(slope, distance, s);
  }
  return s;
}

// A row of q as DotProduct takes it.
template <typename X>
void pack_query(const Job& job, int64_t row, typename DotProduct<X>::Query* to) {
  const auto* const q = static_cast<const typename X::T*>(job.q) + row * job.head_dim;
  if constexpr (kAttendsCodes<X>) {
    if (job.k) { // q is of any dtype
      widen(job.dtype, at_element(job.dtype, job.q, row * job.head_dim), job.head_dim, to);
      return pad(to, job.head_dim);
    }
  }
  DotProduct<X>::pack_row(q, job.head_dim, to);
}

// out = acc / sum, and the log of the sum; the sink enters here, once.
template <typename X>
void write_result(const Job& job, int token, int head, const float* acc, float most, float sum) {
  alignas(64) float turned[padded(kMaxHeadDim)];
  if (job.rotated) {
    alignas(64) float ordered[padded(kMaxHeadDim)];
    to_memory_order<X>(acc, job.v_head_dim, ordered);
    rotate(ordered, job.v_head_dim, rotation_size(job.v_head_dim));
    to_lane_order<X>(ordered, job.v_head_dim, turned);
    acc = turned;
  }
  const int64_t row = int64_t(token) * job.num_q_heads + head;
  typename X::T* const out = static_cast<typename X::T*>(job.out) + row * job.v_head_dim;
  const bool nothing = most == kNegInf && sum == 0.0f;
  float weight = 1.0f;
  most *= job.score_unit;
  if (job.sinks && !nothing) {
    const float sink = job.sinks[head];
    const float top = sink > most ? sink : most;
    weight = exp2((most - top) * kLog2e);
    sum = sum * weight + exp2((sink - top) * kLog2e);
    most = top;
  }
  const Vec scale = splat(nothing ? 0.0f : weight), divisor = splat(nothing ? 1.0f : sum);
  for (int d = 0; d < job.v_head_dim; d += kPair) {
    const Pair v = {load(acc + d) * scale / divisor, load(acc + d + kLanes) * scale / divisor};
    if (d + kPair <= job.v_head_dim) {
      X::store2(out + d, v);
    } else {
      store2_part<X>(out + d, job.v_head_dim - d, v);
    }
  }
  if (job.lse) {
    job.lse[row] = nothing ? kNegInf : most + __builtin_logf(sum);
  }
}

// A row is done with its item: it is final, or one of several partial states.
template <typename X>
void finish_row(const Job& job, const Row& row, const float* acc, float most, float sum) {
  if (row.partial < 0) {
    write_result<X>(job, row.token, row.head, acc, most, sum);
    return;
  }
  const int64_t at = int64_t(row.partial) * job.num_q_heads + row.head;
  memcpy(job.partial_acc + at * job.partial_stride, acc, padded(job.v_head_dim) * sizeof(float));
  job.partial_max[at] = most;
  job.partial_sum[at] = sum;
}

// The same for what was attended in float32, of a call of any dtype.
template <typename X>
void finish_row_as(const Job& job, const Row& row, const float* acc, float most, float sum) {
  alignas(64) float lanes[padded(kMaxHeadDim)];
  to_lane_order<X>(acc, job.v_head_dim, lanes);
  finish_row<X>(job, row, lanes, most, sum);
}

template <typename X>
void finish_attended(const Job& job, const Row& row, const float* acc, float most, float sum) {
  if constexpr (kAttendsCodes<X>) {
    if (job.k && job.dtype == DType::float16) {
      return finish_row_as<Float16>(job, row, acc, most, sum);
    }
    if (job.k && job.dtype == DType::bfloat16) {
      return finish_row_as<BFloat16>(job, row, acc, most, sum);
    }
  }
  finish_row<X>(job, row, acc, most, sum);
}

} // namespace
} // namespace paged_mlx::cpu
