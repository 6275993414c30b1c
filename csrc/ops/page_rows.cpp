#include "ops/page_rows.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "mlx/ops.h"

#include "arguments.h"
#include "cpu/dispatch.h"
#include "ops/primitive.h"
#include "shape_check.h"

namespace paged_mlx {

namespace {

// Whether the node that makes the array will leave it row by row.
bool made_row_contiguous(const mx::array& a) {
  if (!a.has_primitive()) {
    return false;
  }
  const auto* const own = dynamic_cast<const PagesPrimitive*>(&a.primitive());
  return own && own->is_row_contiguous(a.sibling_position());
}

} // namespace

mx::array row_contiguous(const mx::array& pages, mx::Stream s) {
  // Pages whose node has begun have their memory, though they may not be computed yet.
  const bool has_memory = !pages.is_tracer() && pages.status() != mx::array::Status::unscheduled;
  if (has_memory ? pages.flags().row_contiguous : made_row_contiguous(pages)) {
    return pages;
  }
  return mx::contiguous(pages, false, s);
}

void SlotWriter::write(int64_t token, int32_t slot) const {
  const int heads = tokens_.num_heads();
  const int page = slot / side_.page_size, offset = slot % side_.page_size;
  const char* const from = tokens_.token(token);
  const bool copies = side_.format == PageFormat::dense && !side_.rotated;
  for (int h = 0; h < heads; h++) {
    const int64_t row = page_row(page, h, offset, heads, side_.page_size);
    if (copies) {
      tokens_.copy(from, h, static_cast<char*>(side_.pages) + row * tokens_.row_bytes());
      continue;
    }
    float values[cpu::kMaxHeadDim]; // of the side's dtype
    tokens_.copy(from, h, reinterpret_cast<char*>(values));
    cpu::kernels().write_row(side_, row, values);
  }
}

void write_slots(const char* op, const char* name, const std::vector<SlotWriter>& writers,
                 const int32_t* slots) {
  for (int64_t t = 0; !writers.empty() && t < writers[0].num_tokens(); t++) {
    if (slots[t] >= writers[0].num_slots()) {
      fail(op,
           std::string(name) + " must be less than num_pages * page_size = " +
               std::to_string(writers[0].num_slots()),
           std::to_string(slots[t]));
    }
    for (const SlotWriter& writer : writers) {
      if (slots[t] >= 0) {
        writer.write(t, slots[t]);
      }
    }
  }
}

void PageGather::run(const cpu::PageSide& side, const cpu::PageSide& open, char* out) const {
  const int64_t row_bytes = side.dim * (side.dtype == cpu::DType::float32 ? 4 : 2);
  std::memset(out, 0, int64_t(batch) * num_kv_heads * length * row_bytes);
  for (int b = 0; b < batch; b++) {
    const int end = std::min(lens[b], length);
    int start = 0;
    for (int64_t i = 0; i < max_pages && start < end; i++) {
      const int64_t at = int64_t(b) * max_pages + i;
      start = page_starts ? page_starts[at] : int(i * page_size);
      const int count = std::min(page_lens ? page_lens[at] : page_size, end - start);
      const bool is_open = tables[at] >= num_sealed;
      const cpu::PageSide& from = is_open ? open : side;
      const int page = is_open ? tables[at] - num_sealed : tables[at];
      for (int h = 0; h < num_kv_heads && count > 0 && page >= 0; h++) {
        char* const to = out + page_row(b, h, start, num_kv_heads, length) * row_bytes;
        const int64_t row = page_row(page, h, 0, num_kv_heads, page_size);
        if (from.format == PageFormat::dense && !from.rotated) {
          std::memcpy(to, static_cast<const char*>(from.pages) + row * row_bytes,
                      count * row_bytes);
          continue;
        }
        for (int j = 0; j < count; j++) {
          cpu::kernels().read_row(from, row + j, to + j * row_bytes);
        }
      }
      start += std::max(0, count);
    }
  }
}

} // namespace paged_mlx
