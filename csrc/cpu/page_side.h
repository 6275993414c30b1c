// K, or V, of a layer's pages as the CPU's kernels read and write them: plain data.
#pragma once

#include <cstdint>

#include "page_format.h"

namespace paged_mlx::cpu {

enum class DType { float32, float16, bfloat16 };

// Rows are those of `page_row` in kernels/arguments.h, whatever the format.
struct PageSide {
  PageFormat format = PageFormat::dense;
  DType dtype = DType::float32; // of dense pages, of scales and biases, and of what is written
  int dim = 0;
  int num_pages = 0, page_size = 1;
  bool rotated = false;   // what is written is rotated first, what is read rotated back
  void* pages = nullptr;  // dense pages, or codes
  void* scales = nullptr; // with codes, and biases
  void* biases = nullptr;
};

} // namespace paged_mlx::cpu
