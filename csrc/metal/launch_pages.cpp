#include <algorithm>

#include "arguments.h"
#include "metal/launch.h"

namespace paged_mlx::metal {

namespace {

constexpr int kThreads = 256;
constexpr size_t kMaxGroups = 1 << 20; // of one grid dimension

// The widest unit that divides all of these sizes, in bytes.
int unit_of(std::initializer_list<int64_t> sizes) {
  int unit = 16;
  for (int64_t size : sizes) {
    while (unit > 1 && size % unit != 0) {
      unit /= 2;
    }
  }
  return unit;
}

Variant mover(const char* kernel, int unit) {
  const char* type = unit == 16 ? "uint4"
      : unit == 8               ? "uint2"
      : unit == 4               ? "uint"
      : unit == 2               ? "ushort"
                                : "uchar";
  Variant variant;
  variant.kernel = kernel;
  variant.define("UNIT", type);
  return variant;
}

// One thread per unit in x.
void dispatch_units(Encoder& encoder, const Variant& variant, int64_t units, size_t y, size_t z) {
  const size_t threads = std::min(kThreads, encoder.max_threads(variant));
  encoder.dispatch({(size_t(units) + threads - 1) / threads, y, z}, {threads});
}

// The kernels that quantise and that read what is quantised.
Variant of_formats(const char* kernel, DType dtype, int head_dim, int v_head_dim,
                   PageFormats formats) {
  Variant variant;
  variant.kernel = kernel;
  variant.define("T", type_name(dtype))
      .define("D", head_dim)
      .define("DV", v_head_dim)
      .define("K_FORMAT", int(formats.k))
      .define("V_FORMAT", int(formats.v));
  return variant;
}

// What is written beside the codes of a side; where there are none, the pages are bound, and
// never touched.
void set_written_scales(Encoder& encoder, int first, const ScaleBuffers& side, Buffer pages) {
  encoder.set_written_pages(first, side.scales ? side.scales : pages);
  encoder.set_written_pages(first + 1, side.biases ? side.biases : pages);
}

// Rows go to pages, each by a simdgroup.
void quantise_rows(Encoder& encoder, const WritePagesCall& call, PageFormats stored,
                   bool from_pages, bool rotates) {
  Variant variant =
      of_formats("quantise_pages", call.dtype, call.head_dim, call.v_head_dim, stored);
  variant.define("ROTATES", rotates).define("FROM_PAGES", from_pages);
  const size_t simdgroups = std::clamp(encoder.max_threads(variant) / 32, 1, 4);
  encoder.set_variant(variant);
  encoder.set_arguments(PAGED_MLX_BUFFER_ARGUMENTS,
                        QuantisePagesArguments{call.num_kv_heads, call.page_size});
  encoder.set_input(PAGED_MLX_BUFFER_SLOTS, call.slots);
  if (from_pages) {
    encoder.set_pages(PAGED_MLX_BUFFER_K_TOKENS, call.k);
    encoder.set_pages(PAGED_MLX_BUFFER_V_TOKENS, call.v);
  } else {
    encoder.set_input(PAGED_MLX_BUFFER_K_TOKENS, call.k);
    encoder.set_input(PAGED_MLX_BUFFER_V_TOKENS, call.v);
  }
  encoder.set_written_pages(PAGED_MLX_BUFFER_K_PAGES, call.k_pages);
  encoder.set_written_pages(PAGED_MLX_BUFFER_V_PAGES, call.v_pages);
  set_written_scales(encoder, PAGED_MLX_BUFFER_K_SCALES, call.k_scales, call.k_pages);
  set_written_scales(encoder, PAGED_MLX_BUFFER_V_SCALES, call.v_scales, call.v_pages);
  const size_t rows = size_t(call.num_kv_heads) * (from_pages ? 1 : 2);
  encoder.dispatch({(rows + simdgroups - 1) / simdgroups, size_t(call.tokens)}, {32 * simdgroups});
}

} // namespace

void write_pages(Encoder& encoder, const WritePagesCall& call) {
  if (!call.formats.dense()) {
    if (call.tokens > 0 && call.num_kv_heads > 0) {
      PageFormats stored = call.formats;
      if (stored.has_open_pages()) {
        stored = {};
      }
      quantise_rows(encoder, call, stored, false, call.formats.rotates());
    }
    return;
  }
  const int v_row = call.v ? call.row.v : 0;
  if (call.tokens == 0 || call.num_kv_heads * (call.row.k + v_row) == 0) {
    return;
  }
  const int unit = unit_of({call.row.k, v_row});
  const WritePagesArguments arguments{call.num_kv_heads, call.page_size, call.row.k / unit,
                                      v_row / unit};
  const Variant variant = mover("write_pages", unit);
  encoder.set_variant(variant);
  encoder.set_arguments(PAGED_MLX_BUFFER_ARGUMENTS, arguments);
  encoder.set_input(PAGED_MLX_BUFFER_SLOTS, call.slots);
  encoder.set_input(PAGED_MLX_BUFFER_K_TOKENS, call.k);
  encoder.set_input(PAGED_MLX_BUFFER_V_TOKENS, call.v ? call.v : call.k);
  encoder.set_written_pages(PAGED_MLX_BUFFER_K_PAGES, call.k_pages);
  encoder.set_written_pages(PAGED_MLX_BUFFER_V_PAGES, call.v ? call.v_pages : call.k_pages);
  const int64_t units = int64_t(call.num_kv_heads) * (arguments.k_row + arguments.v_row);
  dispatch_units(encoder, variant, units, call.tokens, 1);
}

void seal_pages(Encoder& encoder, const SealPagesCall& call) {
  if (call.num_pairs == 0 || call.num_kv_heads == 0) {
    return;
  }
  Variant variant;
  variant.kernel = "seal_keys";
  variant.define("T", type_name(call.dtype)).define("D", call.head_dim);
  const size_t threads = std::min(kThreads, encoder.max_threads(variant));
  encoder.set_variant(variant);
  encoder.set_arguments(PAGED_MLX_BUFFER_ARGUMENTS,
                        QuantisePagesArguments{call.num_kv_heads, call.page_size});
  encoder.set_input(PAGED_MLX_BUFFER_SLOTS, call.pairs);
  encoder.set_pages(PAGED_MLX_BUFFER_K_TOKENS, call.k); // open pages, which are written again
  encoder.set_written_pages(PAGED_MLX_BUFFER_K_PAGES, call.k_pages);
  set_written_scales(encoder, PAGED_MLX_BUFFER_K_SCALES, call.k_scales, call.k_pages);
  const size_t words = call.head_dim / 8, wide = std::min(words, threads);
  encoder.dispatch({(words + wide - 1) / wide, size_t(call.num_kv_heads), size_t(call.num_pairs)},
                   {wide});

  WritePagesCall values{};
  values.k = values.v = call.v;
  values.k_pages = values.v_pages = call.v_pages;
  values.slots = call.pairs;
  values.tokens = call.num_pairs * call.page_size;
  values.num_kv_heads = call.num_kv_heads;
  values.page_size = call.page_size;
  values.dtype = call.dtype;
  values.head_dim = values.v_head_dim = call.v_head_dim;
  values.v_scales = call.v_scales;
  quantise_rows(encoder, values, {PageFormat::dense, call.formats.v}, true,
                call.formats.rotates() && !call.rotated);
}

void copy_pages(Encoder& encoder, const CopyPagesCall& call) {
  if (call.num_pairs == 0) {
    return;
  }
  int unit = 16;
  for (int64_t bytes : call.page_bytes) {
    unit = unit_of({unit, bytes});
  }
  const Variant variant = mover("copy_pages", unit);
  for (size_t first = 0; first < call.pools.size(); first += PAGED_MLX_COPY_POOLS) {
    const size_t count = std::min<size_t>(PAGED_MLX_COPY_POOLS, call.pools.size() - first);
    CopyPagesArguments arguments{};
    int64_t most = 0;
    encoder.set_variant(variant);
    for (size_t i = 0; i < PAGED_MLX_COPY_POOLS; i++) {
      const size_t pool = first + std::min(i, count - 1);
      arguments.page_units[i] = call.page_bytes[pool] / unit;
      most = std::max<int64_t>(most, arguments.page_units[i]);
      encoder.set_written_pages(PAGED_MLX_BUFFER_POOLS + int(i), call.pools[pool]);
    }
    encoder.set_arguments(PAGED_MLX_BUFFER_ARGUMENTS, arguments);
    encoder.set_input(PAGED_MLX_BUFFER_PAIRS, call.pairs);
    if (most > 0) {
      dispatch_units(encoder, variant, most, call.num_pairs, count);
    }
  }
}

namespace {

void bind_tables(Encoder& encoder, const GatherPagesCall& call) {
  encoder.set_input(PAGED_MLX_BUFFER_TABLES, call.tables);
  encoder.set_input(PAGED_MLX_BUFFER_CONTEXT_LENS, call.context_lens);
  encoder.set_pages(PAGED_MLX_BUFFER_K_PAGES, call.k_pages);
  encoder.set_pages(PAGED_MLX_BUFFER_V_PAGES, call.v_pages);
  encoder.set_output(PAGED_MLX_BUFFER_K_OUT, call.k_out);
  encoder.set_output(PAGED_MLX_BUFFER_V_OUT, call.v_out);
  if (call.page_starts) {
    encoder.set_input(PAGED_MLX_BUFFER_PAGE_STARTS, call.page_starts);
    encoder.set_input(PAGED_MLX_BUFFER_PAGE_LENS, call.page_lens);
  }
}

void dequantise(Encoder& encoder, const GatherPagesCall& call) {
  Variant variant =
      of_formats("dequantise_pages", call.dtype, call.head_dim, call.v_head_dim, call.formats);
  variant.define("ROTATES", call.formats.rotates())
      .set(PAGED_MLX_CONSTANT_RAGGED, call.page_starts != nullptr);
  const size_t simdgroups = std::clamp(encoder.max_threads(variant) / 32, 1, 4);
  encoder.set_variant(variant);
  encoder.set_arguments(
      PAGED_MLX_BUFFER_ARGUMENTS,
      DequantisePagesArguments{
          {call.max_pages, call.length, call.num_kv_heads, call.page_size, 0, 0}, call.num_sealed});
  bind_tables(encoder, call);
  if (call.formats.k != PageFormat::dense) {
    encoder.set_pages(PAGED_MLX_BUFFER_K_SCALES, call.k_scales.scales);
    encoder.set_pages(PAGED_MLX_BUFFER_K_BIASES, call.k_scales.biases);
  }
  if (call.formats.v != PageFormat::dense) {
    encoder.set_pages(PAGED_MLX_BUFFER_V_SCALES, call.v_scales.scales);
    encoder.set_pages(PAGED_MLX_BUFFER_V_BIASES, call.v_scales.biases);
  }
  if (call.formats.has_open_pages()) {
    encoder.set_pages(PAGED_MLX_BUFFER_OPEN_K, call.open_k);
    encoder.set_pages(PAGED_MLX_BUFFER_OPEN_V, call.open_v);
  }
  encoder.dispatch({2, (size_t(call.length) + simdgroups - 1) / simdgroups,
                    size_t(call.batch) * call.num_kv_heads},
                   {32 * simdgroups});
}

} // namespace

void gather_pages(Encoder& encoder, const GatherPagesCall& call) {
  if (!call.formats.dense()) {
    if (call.length > 0 && call.batch > 0 && call.num_kv_heads > 0) {
      dequantise(encoder, call);
    }
    return;
  }
  const int unit = unit_of({call.row.k, call.row.v});
  const GatherPagesArguments arguments{call.max_pages, call.length,       call.num_kv_heads,
                                       call.page_size, call.row.k / unit, call.row.v / unit};
  const size_t units = arguments.k_row + arguments.v_row;
  if (units == 0 || call.length == 0 || call.batch == 0 || call.num_kv_heads == 0) {
    return;
  }
  Variant variant = mover("gather_pages", unit);
  variant.set(PAGED_MLX_CONSTANT_RAGGED, call.page_starts != nullptr);
  encoder.set_variant(variant);
  encoder.set_arguments(PAGED_MLX_BUFFER_ARGUMENTS, arguments);
  bind_tables(encoder, call);
  const size_t most = std::min(kThreads, encoder.max_threads(variant));
  const size_t wide = std::min(units, most), high = most / wide;
  encoder.dispatch({(units + wide - 1) / wide, (size_t(call.length) + high - 1) / high,
                    size_t(call.batch) * call.num_kv_heads},
                   {wide, high});
}

void copy_buffer(Encoder& encoder, Buffer from, Buffer to, int64_t bytes) {
  if (bytes == 0) {
    return;
  }
  const int unit = unit_of({bytes});
  const int64_t units = bytes / unit;
  const Variant variant = mover("copy_buffer", unit);
  const size_t threads = std::min(kThreads, encoder.max_threads(variant));
  const size_t groups = (size_t(units) + threads - 1) / threads;
  encoder.set_variant(variant);
  encoder.set_bytes(PAGED_MLX_BUFFER_ARGUMENTS, &units, sizeof(units));
  encoder.set_pages(PAGED_MLX_BUFFER_K_PAGES, from);
  encoder.set_written_pages(PAGED_MLX_BUFFER_V_PAGES, to);
  encoder.dispatch({std::min(groups, kMaxGroups), (groups + kMaxGroups - 1) / kMaxGroups, 1},
                   {threads});
}

void merge_states(Encoder& encoder, const MergeStatesCall& call) {
  if (call.rows == 0) {
    return;
  }
  const size_t parts = call.outs.size();
  const bool carries = parts > PAGED_MLX_MERGE_PARTS;
  const Buffer carried = carries
      ? encoder.temporary(size_t(call.rows) * (call.dim + 1) * sizeof(float))
      : call.lse; // bound, never touched
  for (size_t first = 0; first < parts; first += PAGED_MLX_MERGE_PARTS) {
    const size_t count = std::min<size_t>(PAGED_MLX_MERGE_PARTS, parts - first);
    Variant variant;
    variant.kernel = "merge_states";
    variant.define("T", type_name(call.dtype));
    variant.set(PAGED_MLX_CONSTANT_HAS_CARRIED, first > 0)
        .set(PAGED_MLX_CONSTANT_IS_LAST, first + count == parts);
    const int simdgroups = std::clamp(encoder.max_threads(variant) / 32, 1, 4);
    encoder.set_variant(variant);
    encoder.set_arguments(PAGED_MLX_BUFFER_ARGUMENTS,
                          MergeStatesArguments{call.rows, call.dim, int(count)});
    for (size_t i = 0; i < PAGED_MLX_MERGE_PARTS; i++) {
      const size_t part = first + std::min(i, count - 1);
      encoder.set_input(PAGED_MLX_BUFFER_PART_OUTS + int(i), call.outs[part]);
      encoder.set_input(PAGED_MLX_BUFFER_PART_LSES + int(i), call.lses[part]);
    }
    if (first > 0) {
      encoder.set_input(PAGED_MLX_BUFFER_CARRIED, carried);
    }
    encoder.set_output(PAGED_MLX_BUFFER_CARRIED, carried);
    encoder.set_output(PAGED_MLX_BUFFER_MERGED_OUT, call.out);
    encoder.set_output(PAGED_MLX_BUFFER_MERGED_LSE, call.lse);
    const size_t rows = call.rows;
    encoder.dispatch({(rows + simdgroups - 1) / simdgroups}, {size_t(32 * simdgroups)});
  }
}

} // namespace paged_mlx::metal
