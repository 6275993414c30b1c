// Formats of pages: how K, or V, of a token lies in its page. Plain data, no MLX: operations,
// launch code and the CPU's kernels share it.
//
//   dense     the elements themselves
//   token8    codes of 8 bits; a scale and a bias for each token, head and group of channels
//   token4    codes of 4 bits alike, of channels that are rotated first
//   channel4  codes of 4 bits; a scale and a bias for each channel of a page and head, over pages
//             that are full or sealed. Pages that are not, open pages, stay dense, K and V of them.
#pragma once

#include "arguments.h" // group_size, rotation_size

namespace paged_mlx {

enum class PageFormat { dense, token8, token4, channel4 };

struct PageFormats {
  PageFormat k = PageFormat::dense;
  PageFormat v = PageFormat::dense;

  bool operator==(const PageFormats&) const = default;
  bool dense() const {
    return k == PageFormat::dense && v == PageFormat::dense;
  }
  // Whether a layer has pages that are not sealed, in arrays of their own.
  bool has_open_pages() const {
    return k == PageFormat::channel4;
  }
  // Whether V, and so what attention gives, is rotated.
  bool rotates() const {
    return v == PageFormat::token4;
  }
};

// Bits of a code; 0: there are none.
constexpr int code_bits(PageFormat format) {
  return format == PageFormat::dense ? 0 : format == PageFormat::token8 ? 8 : 4;
}

// Arrays of a side: the pages, or codes, scales and biases.
constexpr int num_arrays(PageFormat format) {
  return format == PageFormat::dense ? 1 : 3;
}

// Arrays of a layer: those of K, those of V, then K and V of the open pages.
constexpr int num_arrays(PageFormats formats) {
  return num_arrays(formats.k) + num_arrays(formats.v) +
      (formats.k == PageFormat::channel4 ? 2 : 0);
}

} // namespace paged_mlx
