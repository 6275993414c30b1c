#include "mlx/backend/cpu/encoder.h"
#include "mlx/ops.h"

#include "metal/launch.h"
#include "ops/gather_row.h"
#include "ops/launch.h"
#include "ops/pages.h"
#include "shape_check.h"

namespace paged_mlx {

namespace {

auto gather_launch(const std::vector<mx::array>& inputs, int length) {
  metal::GatherPagesCall call{};
  call.batch = inputs[2].shape(0);
  call.max_pages = inputs[2].shape(1);
  call.length = length;
  call.num_kv_heads = inputs[0].shape(1);
  call.page_size = inputs[0].shape(2);
  call.row = {row_bytes(inputs[0]), row_bytes(inputs[1])};
  return [call, ragged = inputs.size() > 4](metal::Encoder& encoder, auto in, auto out) mutable {
    call.k_pages = in(0);
    call.v_pages = in(1);
    call.tables = in(2);
    call.context_lens = in(3);
    call.page_starts = ragged ? in(4) : nullptr;
    call.page_lens = ragged ? in(5) : nullptr;
    call.k_out = out(0);
    call.v_out = out(1);
    metal::gather_pages(encoder, call);
  };
}

} // namespace

std::vector<mx::array> gather_pages(
    const mx::array& k_pages,
    const mx::array& v_pages,
    const mx::array& block_tables,
    const mx::array& context_lens,
    int length,
    const std::optional<mx::array>& page_starts,
    const std::optional<mx::array>& page_lens,
    mx::StreamOrDevice s_) {
  const auto s = mx::to_stream(s_);
  ShapeCheck shape("gather_pages");
  shape("k_pages", k_pages, {"num_pages", "num_kv_heads", "page_size", "head_dim"});
  shape("v_pages", v_pages, {"num_pages", "num_kv_heads", "page_size", "v_head_dim"});
  shape("block_tables", block_tables, {"batch", "max_pages"});
  shape("context_lens", context_lens, {"batch"});
  check_float("gather_pages", "k_pages", k_pages);
  check_dtype("gather_pages", "v_pages", v_pages, k_pages.dtype(), "the dtype of k_pages");
  check_dtype("gather_pages", "block_tables", block_tables, mx::int32, "page ids");
  check_dtype("gather_pages", "context_lens", context_lens, mx::int32, "lengths");
  std::vector<mx::array> inputs = {
      row_contiguous(k_pages, s), row_contiguous(v_pages, s), block_tables, context_lens};
  if (page_starts && page_lens) {
    shape("page_starts", *page_starts, {"batch", "max_pages"});
    shape("page_lens", *page_lens, {"batch", "max_pages"});
    inputs.push_back(*page_starts);
    inputs.push_back(*page_lens);
  }
  auto primitive = std::make_shared<GatherPages>(s, length);
  auto shapes = primitive->output_shapes(inputs);
  return mx::array::make_arrays(
      std::move(shapes),
      std::vector<mx::Dtype>(4, k_pages.dtype()),
      primitive,
      std::move(inputs));
}

std::vector<mx::Shape> GatherPages::output_shapes(const std::vector<mx::array>& inputs) {
  const auto &k = inputs[0], &v = inputs[1];
  const int batch = inputs[2].shape(0);
  return {
      {batch, k.shape(1), length_, k.shape(3)},
      {batch, v.shape(1), length_, v.shape(3)},
      k.shape(),
      v.shape()};
}

void GatherPages::allocate(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) const {
  outputs[0].set_data(mx::allocator::malloc(outputs[0].nbytes()));
  outputs[1].set_data(mx::allocator::malloc(outputs[1].nbytes()));
  outputs[2].copy_shared_buffer(inputs[0]);
  outputs[3].copy_shared_buffer(inputs[1]);
}

void GatherPages::eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  allocate(inputs, outputs);
  if (host_launch(stream())) {
    return dispatch_on_host(stream(), inputs, outputs, gather_launch(inputs, length_));
  }
  auto& encoder = mx::cpu::get_command_encoder(stream());
  for (const auto& input : inputs) {
    encoder.set_input_array(input);
  }
  encoder.set_output_array(outputs[0]);
  encoder.set_output_array(outputs[1]);
  const bool ragged = inputs.size() > 4;
  encoder.dispatch([k = inputs[0].data<char>(),
                    v = inputs[1].data<char>(),
                    tables = inputs[2].data<int32_t>(),
                    lens = inputs[3].data<int32_t>(),
                    page_starts = ragged ? inputs[4].data<int32_t>() : nullptr,
                    page_lens = ragged ? inputs[5].data<int32_t>() : nullptr,
                    k_out = outputs[0].data<char>(),
                    v_out = outputs[1].data<char>(),
                    batch = inputs[2].shape(0),
                    max_pages = inputs[2].shape(1),
                    length = length_,
                    heads = int64_t(inputs[0].shape(1)),
                    page_size = int64_t(inputs[0].shape(2)),
                    k_row = int64_t(row_bytes(inputs[0])),
                    v_row = int64_t(row_bytes(inputs[1]))]() {
    for (int64_t b = 0; b < batch; b++) {
      const int64_t at = b * max_pages;
      const GatherRow row{
          tables + at,
          page_starts ? page_starts + at : nullptr,
          page_lens ? page_lens + at : nullptr,
          max_pages,
          lens[b],
          length,
          heads,
          page_size};
      row(k, k_out + b * heads * length * k_row, k_row);
      row(v, v_out + b * heads * length * v_row, v_row);
    }
  });
}

void GatherPages::eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  allocate(inputs, outputs);
  dispatch_on_gpu("gather_pages", stream(), inputs, outputs, gather_launch(inputs, length_));
}

} // namespace paged_mlx
