// K of whole pages is quantised by channel: of each channel of a page and head a scale and a
// bias, the least of its values, of codes of 4 bits.
//
//   pairs     [pages, 3]  int32: source page, target page, tokens of it
//   k_tokens  [pages, num_kv_heads, page_size, D]              T
//   k_pages   [num_pages, num_kv_heads, page_size, D / 8]      uint32, codes
//   k_scales, k_biases  [num_pages, num_kv_heads, D]           T
//
// Macros T, D. Grid, in threads: x over the channels of a head, eight a thread; y over KV
// heads; z over pairs.

#include "row_quads.h"

using namespace paged_mlx;

[[kernel]] void seal_keys(constant QuantisePagesArguments& arguments
                          [[buffer(PAGED_MLX_BUFFER_ARGUMENTS)]],
                          const device int* pairs [[buffer(PAGED_MLX_BUFFER_SLOTS)]],
                          const device PAGED_MLX_T* k_tokens [[buffer(PAGED_MLX_BUFFER_K_TOKENS)]],
                          device uint* k_pages [[buffer(PAGED_MLX_BUFFER_K_PAGES)]],
                          device PAGED_MLX_T* k_scales [[buffer(PAGED_MLX_BUFFER_K_SCALES)]],
                          device PAGED_MLX_T* k_biases [[buffer(PAGED_MLX_BUFFER_K_BIASES)]],
                          uint3 at [[thread_position_in_grid]]) {
  typedef PAGED_MLX_T T;
  constexpr int D = PAGED_MLX_D;
  const int word = at.x, heads = arguments.num_kv_heads, page_size = arguments.page_size;
  if (8 * word >= D) {
    return;
  }
  const int head = at.y, tokens = pairs[3 * at.z + 2];
  const device T* from = k_tokens + page_row(pairs[3 * at.z], head, 0, heads, page_size) * D;
  const long page = long(pairs[3 * at.z + 1]) * heads + head;

  Edges edges[8];
#pragma clang loop unroll(full)
  for (int j = 0; j < 8; j++) {
    edges[j] = {INFINITY, -INFINITY, true};
  }
  T token[8];
  for (int t = 0; t < tokens; t++) {
    load_elements<8>(from + long(t) * D + 8 * word, token);
#pragma clang loop unroll(full)
    for (int j = 0; j < 8; j++) {
      edges[j].join(float(token[j]));
    }
  }
  float scales[8], biases[8];
#pragma clang loop unroll(full)
  for (int j = 0; j < 8; j++) {
    const bool has_edges = edges[j].finite && tokens > 0;
    const float empty = tokens > 0 ? NAN : 0.0f; // a value that is not finite: the scale is NaN
    const T scale = T(has_edges ? (edges[j].high - edges[j].low) / 15 : empty);
    const T bias = T(has_edges ? edges[j].low : 0.0f);
    k_scales[page * D + 8 * word + j] = scale;
    k_biases[page * D + 8 * word + j] = bias;
    scales[j] = float(scale);
    biases[j] = float(bias);
  }
  for (int t = 0; t < page_size; t++) {
    uint codes = 0;
    if (t < tokens) {
      load_elements<8>(from + long(t) * D + 8 * word, token);
#pragma clang loop unroll(full)
      for (int j = 0; j < 8; j++) {
        const bool known = scales[j] > 0 && !is_not_finite(scales[j]);
        const float code = min(max(rint((float(token[j]) - biases[j]) / scales[j]), 0.0f), 15.0f);
        codes |= (known ? uint(code) : 0u) << (4 * j);
      }
    }
    k_pages[(page * page_size + t) * (D / 8) + word] = codes;
  }
}
