// K and V of each sequence, contiguous, out of quantised pages: scale * code + bias, V
// rotated back, in float32 and rounded once.
//
//   tables, context_lens, page_starts, page_lens, k_out, v_out: as in gather_pages.metal
//   k_pages, v_pages, k_scales, k_biases, v_scales, v_biases: as in attend_tile.metal
//   open_k, open_v  [num_open, num_kv_heads, page_size, D or DV]   T: pages of ids from
//                   num_sealed on, where K's channels have scales
//
// Macros T, D, DV, K_FORMAT, V_FORMAT; ROTATES: V is rotated. Grid: x over K and V of a row,
// a simdgroup each; y over positions; z over (sequence, KV head).

#include "row_quads.h"
#include "slot_lookup.h"

namespace paged_mlx {

// Row `at` of pages, of `page`, a page and head.
template <int FORMAT>
struct PageReader {
  template <typename T, int DIM>
  static void read(const device uchar* pages, PageScales<T> side, long at, long page,
                   thread RowQuads<T, DIM>& row) {
    const long first = FORMAT == PAGED_MLX_CHANNEL4 ? page * DIM : at * groups_of(DIM);
    const device uchar* codes = PageRows<T, FORMAT, group_size(DIM)>::template at<DIM>(pages, at);
    load_codes<FORMAT>(codes, PageScales<T>{side.scales + first, side.biases + first}, row);
  }
};
template <>
struct PageReader<PAGED_MLX_DENSE> {
  template <typename T, int DIM>
  static void read(const device T* pages, PageScales<T>, long at, long,
                   thread RowQuads<T, DIM>& row) {
    row.load(pages + at * DIM);
  }
};

} // namespace paged_mlx

using namespace paged_mlx;

#if PAGED_MLX_K_FORMAT == PAGED_MLX_CHANNEL4
#define PAGED_MLX_OPEN_PARAMETERS                                       \
  const device PAGED_MLX_T *open_k [[buffer(PAGED_MLX_BUFFER_OPEN_K)]], \
      const device PAGED_MLX_T *open_v [[buffer(PAGED_MLX_BUFFER_OPEN_V)]],
#define PAGED_MLX_OPEN(side) open_##side
#else
#define PAGED_MLX_OPEN_PARAMETERS
#define PAGED_MLX_OPEN(side) nullptr
#endif

[[kernel]] void dequantise_pages(
    constant DequantisePagesArguments& arguments [[buffer(PAGED_MLX_BUFFER_ARGUMENTS)]],
    const device int* tables [[buffer(PAGED_MLX_BUFFER_TABLES)]],
    const device int* context_lens [[buffer(PAGED_MLX_BUFFER_CONTEXT_LENS)]],
    const device PAGED_MLX_K_STORED* k_pages [[buffer(PAGED_MLX_BUFFER_K_PAGES)]],
    const device PAGED_MLX_V_STORED* v_pages [[buffer(PAGED_MLX_BUFFER_V_PAGES)]],
    PAGED_MLX_K_SCALE_PARAMETERS PAGED_MLX_V_SCALE_PARAMETERS PAGED_MLX_OPEN_PARAMETERS
        device PAGED_MLX_T* k_out [[buffer(PAGED_MLX_BUFFER_K_OUT)]],
    device PAGED_MLX_T* v_out [[buffer(PAGED_MLX_BUFFER_V_OUT)]],
    const device int* page_starts
    [[buffer(PAGED_MLX_BUFFER_PAGE_STARTS), function_constant(kRagged)]],
    const device int* page_lens [[buffer(PAGED_MLX_BUFFER_PAGE_LENS), function_constant(kRagged)]],
    uint3 group [[threadgroup_position_in_grid]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort num_simdgroups [[simdgroups_per_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
  typedef PAGED_MLX_T T;
  constexpr int D = PAGED_MLX_D, DV = PAGED_MLX_DV;
  const int position = group.y * num_simdgroups + simdgroup, heads = arguments.gather.num_kv_heads;
  if (position >= arguments.gather.length) {
    return;
  }
  const int sequence = group.z / heads, head = group.z % heads;
  const long table = long(sequence) * arguments.gather.max_pages;
  Slot slot = find_slot(position, context_lens[sequence], tables + table,
                        kRagged ? page_starts + table : tables,
                        kRagged ? page_lens + table : tables, arguments.gather);
  const bool is_open =
      PAGED_MLX_K_FORMAT == PAGED_MLX_CHANNEL4 && slot.page >= arguments.num_sealed;
  slot.page -= is_open ? arguments.num_sealed : 0;
  const long at = page_row(slot.page, head, slot.offset, heads, arguments.gather.page_size);
  const long page = long(slot.page) * heads + head;
  const long to = long(group.z) * arguments.gather.length + position;
  if (group.x == 0) {
    RowQuads<T, D> row(lane);
    row.clear();
    if (is_open) {
      PageReader<PAGED_MLX_DENSE>::read<T, D>(PAGED_MLX_OPEN(k), {}, at, page, row);
    } else if (slot.page >= 0) {
      PageReader<PAGED_MLX_K_FORMAT>::read<T, D>(k_pages, PAGED_MLX_K_SCALES, at, page, row);
    }
    row.store(k_out + to * D);
    return;
  }
  RowQuads<T, DV> row(lane);
  row.clear();
  if (is_open) {
    PageReader<PAGED_MLX_DENSE>::read<T, DV>(PAGED_MLX_OPEN(v), {}, at, page, row);
  } else if (slot.page >= 0) {
    PageReader<PAGED_MLX_V_FORMAT>::read<T, DV>(v_pages, PAGED_MLX_V_SCALES, at, page, row);
  }
  if (PAGED_MLX_ROTATES) {
    row.rotate();
  }
  row.store(v_out + to * DV);
}
