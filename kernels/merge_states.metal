// Joins finished results over the same rows: weights exp(lse - max). Only an lse of
// minus infinity is a part that saw nothing; a NaN or an infinity makes its row NaN.
//
//   out<b>      [rows, dim]  T       parts 0.. from PAGED_MLX_BUFFER_PART_OUTS on
//   lse<b>      [rows]       float   from PAGED_MLX_BUFFER_PART_LSES on
//   carried     [rows, dim + 1] float: the join of the parts of dispatches
//               before, its values and its lse
//
// More parts than a dispatch can bind are joined by several, through `carried`.
// Grid: one simdgroup per row. Macro T of prefix PAGED_MLX_.

#include "arguments.h"
#include "numbers.h"

namespace paged_mlx {

constant bool kHasCarried [[function_constant(PAGED_MLX_CONSTANT_HAS_CARRIED)]];
constant bool kIsLast [[function_constant(PAGED_MLX_CONSTANT_IS_LAST)]];

inline float part_weight(float lse, float most) {
  return is_minus_infinity(lse) ? kNoWeight : fast::exp2((lse - most) * kLog2E);
}

} // namespace paged_mlx

using namespace paged_mlx;

// clang-format off
#define PAGED_MLX_EACH_PART(X) \
  X(0, 3, 16) X(1, 4, 17) X(2, 5, 18) X(3, 6, 19) X(4, 7, 20) X(5, 8, 21) X(6, 9, 22) \
  X(7, 10, 23) X(8, 11, 24) X(9, 12, 25) X(10, 13, 26) X(11, 14, 27) X(12, 15, 28)
// clang-format on
#define PAGED_MLX_PART_PARAMETERS(i, o, l) \
  const device PAGED_MLX_T *out##i [[buffer(o)]], const device float *lse##i [[buffer(l)]],

[[kernel]] void merge_states(constant MergeStatesArguments& arguments
                             [[buffer(PAGED_MLX_BUFFER_ARGUMENTS)]],
                             device PAGED_MLX_T* out [[buffer(PAGED_MLX_BUFFER_MERGED_OUT)]],
                             device float* lse [[buffer(PAGED_MLX_BUFFER_MERGED_LSE)]],
                             PAGED_MLX_EACH_PART(PAGED_MLX_PART_PARAMETERS) device float* carried
                             [[buffer(PAGED_MLX_BUFFER_CARRIED)]],
                             uint3 group [[threadgroup_position_in_grid]],
                             ushort simdgroup [[simdgroup_index_in_threadgroup]],
                             ushort num_simdgroups [[simdgroups_per_threadgroup]],
                             ushort lane [[thread_index_in_simdgroup]]) {
  const long row = long(group.x) * num_simdgroups + simdgroup;
  if (row >= arguments.rows) {
    return;
  }
  const int dim = arguments.dim;
  device float* carry = carried + row * (dim + 1);

  float weights[PAGED_MLX_MERGE_PARTS];
#define PAGED_MLX_READ_LSE(i, o, l) \
  weights[i] = i < arguments.parts ? lse##i[row] : minus_infinity();
  PAGED_MLX_EACH_PART(PAGED_MLX_READ_LSE)
  float carried_weight = kHasCarried ? carry[dim] : minus_infinity();
  float most = kLowest;
  for (int i = 0; i < PAGED_MLX_MERGE_PARTS; i++) {
    most = max(most, weights[i]);
  }
  most = max(most, carried_weight);

  // A part that saw nothing has no weight, and its values are not read.
  float sum = 0;
  for (int i = 0; i < PAGED_MLX_MERGE_PARTS; i++) {
    weights[i] = part_weight(weights[i], most);
    sum += weights[i];
  }
  carried_weight = part_weight(carried_weight, most);
  sum += carried_weight;
  const float factor = sum == 0 ? 0 : 1 / sum;
  const float total = sum == 0 ? minus_infinity() : most + log2(sum) * kLn2;

  for (int column = lane; column < dim; column += 32) {
    const long at = row * dim + column;
    float value = is_no_weight(carried_weight) ? 0 : carried_weight * carry[column];
#define PAGED_MLX_ADD_PART(i, o, l)                       \
  if (!is_no_weight(weights[i])) {                        \
    value += weights[i] * static_cast<float>(out##i[at]); \
  }
    PAGED_MLX_EACH_PART(PAGED_MLX_ADD_PART)
    if (kIsLast) {
      out[at] = PAGED_MLX_T(value * factor);
    } else {
      carry[column] = value * factor;
    }
  }
  simdgroup_barrier(mem_flags::mem_device); // all have read what lane 0 overwrites
  if (lane == 0) {
    if (kIsLast) {
      lse[row] = total;
    } else {
      carry[dim] = total;
    }
  }
}
