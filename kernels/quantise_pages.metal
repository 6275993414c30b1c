// K and V go to their pages in the formats of these. Tokens go to slots; or tokens that lie
// in page shape go to pages, whose K another kernel quantises by channel.
//
//   places           [tokens]    int32: slots, -1 skips
//                    [pages, 3]  int32: source page, target page, tokens of it; FROM_PAGES
//   k_tokens         [tokens, num_kv_heads, D] or [pages, num_kv_heads, page_size, D]    T
//   v_tokens         alike, DV
//   k_pages, v_pages [num_pages, num_kv_heads, page_size, D or DV]   T, or codes
//   k_scales, ...    [num_pages, num_kv_heads, page_size, groups]    T, of a side of codes
//
// Macros T, D, DV, K_FORMAT, V_FORMAT; ROTATES: V is rotated first, and rounded to T;
// FROM_PAGES: V alone. Grid: x over KV heads, of K and then of V, in simdgroups; y over tokens.

#include "row_quads.h"

namespace paged_mlx {

// One row, from where it lies to its place in its format.
template <int FORMAT>
struct RowWriter {
  template <typename T, int DIM>
  static void write(thread const RowQuads<T, DIM>& row, device uchar* pages, device T* scales,
                    device T* biases, long at) {
    constexpr int kGroups = groups_of(DIM);
    constexpr int kBytes = FORMAT == PAGED_MLX_TOKEN8 ? DIM : DIM / 2;
    store_codes<FORMAT>(row, pages + at * kBytes, scales + at * kGroups, biases + at * kGroups);
  }
};
template <>
struct RowWriter<PAGED_MLX_DENSE> {
  template <typename T, int DIM>
  static void write(thread const RowQuads<T, DIM>& row, device T* pages, device T*, device T*,
                    long at) {
    row.store(pages + at * DIM);
  }
};

} // namespace paged_mlx

using namespace paged_mlx;

[[kernel]] void quantise_pages(
    constant QuantisePagesArguments& arguments [[buffer(PAGED_MLX_BUFFER_ARGUMENTS)]],
    const device int* places [[buffer(PAGED_MLX_BUFFER_SLOTS)]],
    const device PAGED_MLX_T* k_tokens [[buffer(PAGED_MLX_BUFFER_K_TOKENS)]],
    const device PAGED_MLX_T* v_tokens [[buffer(PAGED_MLX_BUFFER_V_TOKENS)]],
    device PAGED_MLX_K_STORED* k_pages [[buffer(PAGED_MLX_BUFFER_K_PAGES)]],
    device PAGED_MLX_V_STORED* v_pages [[buffer(PAGED_MLX_BUFFER_V_PAGES)]],
    device PAGED_MLX_T* k_scales [[buffer(PAGED_MLX_BUFFER_K_SCALES)]],
    device PAGED_MLX_T* k_biases [[buffer(PAGED_MLX_BUFFER_K_BIASES)]],
    device PAGED_MLX_T* v_scales [[buffer(PAGED_MLX_BUFFER_V_SCALES)]],
    device PAGED_MLX_T* v_biases [[buffer(PAGED_MLX_BUFFER_V_BIASES)]],
    uint3 group [[threadgroup_position_in_grid]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort num_simdgroups [[simdgroups_per_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
  typedef PAGED_MLX_T T;
  constexpr int D = PAGED_MLX_D, DV = PAGED_MLX_DV;
  const int heads = arguments.num_kv_heads, page_size = arguments.page_size;
  const int index = group.x * num_simdgroups + simdgroup, token = group.y;
  const bool is_key = !PAGED_MLX_FROM_PAGES && index < heads;
  const int head = is_key || PAGED_MLX_FROM_PAGES ? index : index - heads;
  if (head >= heads) {
    return;
  }
  int page, offset;
  long from = long(token) * heads + head;
  if (PAGED_MLX_FROM_PAGES) {
    const device int* place = places + 3 * (token / page_size);
    page = place[1];
    offset = token % page_size;
    from = page_row(place[0], head, offset, heads, page_size);
    if (offset >= place[2]) {
      return;
    }
  } else {
    const int slot = places[token];
    if (slot < 0) {
      return;
    }
    page = slot / page_size;
    offset = slot % page_size;
  }
  const long to = page_row(page, head, offset, heads, page_size);
  if (is_key) {
    RowQuads<T, D> row(lane);
    row.load(k_tokens + from * D);
    RowWriter<PAGED_MLX_K_FORMAT>::write(row, k_pages, k_scales, k_biases, to);
    return;
  }
  RowQuads<T, DV> row(lane);
  row.load(v_tokens + from * DV);
  if (PAGED_MLX_ROTATES) {
    row.rotate();
    row.round();
  }
  RowWriter<PAGED_MLX_V_FORMAT>::write(row, v_pages, v_scales, v_biases, to);
}
