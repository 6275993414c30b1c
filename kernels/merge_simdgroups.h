// The states of a threadgroup's simdgroups become one, through threadgroup
// memory, a window of columns at a time.
#ifndef PAGED_MLX_MERGE_SIMDGROUPS_H
#define PAGED_MLX_MERGE_SIMDGROUPS_H

#include "softmax.h"

namespace paged_mlx {

// Columns of a window: as many as 4 KiB hold, a power of two. It is used once, at
// the end, and its memory keeps other threadgroups off the core until then.
constexpr int window_columns(int simdgroups, int rows, int dim) {
  int columns = 512;
  while (simdgroups * rows * columns * 4 > 4096 && columns > 32) {
    columns /= 2;
  }
  return columns < dim ? columns : dim;
}

template <int SIMDGROUPS, int ROWS, int DV>
struct SimdgroupMerge {
  enum {
    kColumns = window_columns(SIMDGROUPS, ROWS, DV),
    kValues = SIMDGROUPS * ROWS * kColumns,
    kStates = SIMDGROUPS * ROWS * 2
  };

  threadgroup float* values; // [SIMDGROUPS, ROWS, kColumns]
  threadgroup float* states; // [SIMDGROUPS, ROWS, 2]
  int num_simdgroups;

  void put_state(int simdgroup, int row, SoftmaxState state) const {
    states[2 * (simdgroup * ROWS + row)] = state.most;
    states[2 * (simdgroup * ROWS + row) + 1] = state.sum;
  }

  threadgroup float* value(int simdgroup, int row, int column) const {
    return values + (simdgroup * ROWS + row) * kColumns + column;
  }

  SoftmaxState total(int row) const {
    SoftmaxState all;
    for (int s = 0; s < num_simdgroups; s++) {
      all.most = max(all.most, states[2 * (s * ROWS + row)]);
    }
    for (int s = 0; s < num_simdgroups; s++) {
      const float most = states[2 * (s * ROWS + row)];
      all.sum += states[2 * (s * ROWS + row) + 1] * weight_at(most - all.most);
    }
    return all;
  }

  // Thread `thread_index` of `num_threads` writes its share of the columns
  // [begin, begin + kColumns) of all rows, four at a time.
  template <typename T>
  void write_window(int begin, thread const RowReader& rows,
                    thread const ResultWriter<T, DV>& writer, int thread_index,
                    int num_threads) const {
    const int quads = min(int(kColumns), DV - begin) / 4;
    for (int i = thread_index; i < rows.num_rows * quads; i += num_threads) {
      const int row = i / quads, column = i % quads * 4;
      const SoftmaxState all = total(row);
      float sums[4] = {0, 0, 0, 0};
      for (int s = 0; s < num_simdgroups; s++) {
        const float weight = weight_at(states[2 * (s * ROWS + row)] - all.most);
        const threadgroup float* from = value(s, row, column);
#pragma clang loop unroll(full)
        for (int j = 0; j < 4; j++) {
          sums[j] += weight * from[j];
        }
      }
      const int token = rows.token(row), head = rows.head(row);
      const int slot = row / rows.arguments.gqa_factor;
      const float factor = finish(all.most, all.sum, writer.sink(head)).factor;
      writer.write_values(token, head, slot, begin + column, factor, sums);
      if (begin + column == 0) {
        writer.write_state(token, head, slot, all.most, all.sum);
      }
    }
  }
};

} // namespace paged_mlx

#endif
