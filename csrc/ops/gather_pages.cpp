#include "mlx/allocator.h"
#include "mlx/ops.h"

#include "metal/launch.h"
#include "ops/dtypes.h"
#include "ops/page_arrays.h"
#include "ops/page_rows.h"
#include "ops/pages.h"
#include "ops/primitive.h"
#include "shape_check.h"

namespace paged_mlx {

namespace {

auto gather_launch(const Arrays& inputs, const LayerArrays& layer, cpu::DType dtype, int length) {
  const int tables = layer.count();
  metal::GatherPagesCall call{};
  call.batch = inputs[tables].shape(0);
  call.max_pages = inputs[tables].shape(1);
  call.length = length;
  call.num_kv_heads = inputs[0].shape(1);
  call.page_size = inputs[0].shape(2);
  call.row = {row_bytes(inputs[0]), row_bytes(inputs[layer.v()])};
  call.dtype = dtype;
  call.head_dim = layer.head_dim;
  call.v_head_dim = layer.v_head_dim;
  call.num_sealed = inputs[0].shape(0);
  return [call, layer, tables, ragged = int(inputs.size()) > tables + 2](
             metal::Encoder& encoder, auto in, auto out) mutable {
    layer.bind(call, in);
    layer.bind_open(call, in);
    call.tables = in(tables);
    call.context_lens = in(tables + 1);
    call.page_starts = ragged ? in(tables + 2) : nullptr;
    call.page_lens = ragged ? in(tables + 3) : nullptr;
    call.k_out = out(0);
    call.v_out = out(1);
    metal::gather_pages(encoder, call);
  };
}

class GatherPages : public PagesPrimitive {
 public:
  GatherPages(mx::Stream stream, LayerArrays layer, int length)
      : PagesPrimitive(stream), layer_(layer), length_(length) {}

  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override {
    const int batch = inputs[layer_.count()].shape(0), heads = inputs[0].shape(1);
    std::vector<mx::Shape> shapes = {{batch, heads, length_, layer_.head_dim},
                                     {batch, heads, length_, layer_.v_head_dim}};
    for (int i = 0; i < layer_.count(); i++) {
      shapes.push_back(inputs[i].shape());
    }
    return shapes;
  }
  bool is_equivalent(const mx::Primitive& other) const override {
    const auto& node = static_cast<const GatherPages&>(other);
    return layer_ == node.layer_ && length_ == node.length_;
  }
  const char* name() const override {
    return "GatherPages";
  }

 protected:
  void eval(const Arrays& inputs, Arrays& outputs) override {
    for (int i = 0; i < layer_.count(); i++) {
      outputs[2 + i].copy_shared_buffer(inputs[i]);
    }
    for (int side : {0, 1}) {
      outputs[side].set_data(mx::allocator::malloc(outputs[side].nbytes()));
    }
    if (runs_kernels(stream())) {
      return run_kernels(inputs, outputs,
                         gather_launch(inputs, layer_, cpu_dtype(outputs[0].dtype()), length_));
    }
    const mx::array* const tables = inputs.data() + layer_.count();
    const bool ragged = inputs.size() > size_t(layer_.count()) + 2;
    const PageGather gather{tables[0].data<int32_t>(),
                            tables[1].data<int32_t>(),
                            ragged ? tables[2].data<int32_t>() : nullptr,
                            ragged ? tables[3].data<int32_t>() : nullptr,
                            tables[0].shape(0),
                            tables[0].shape(1),
                            length_,
                            inputs[0].shape(1),
                            inputs[0].shape(2),
                            layer_.formats.has_open_pages() ? inputs[0].shape(0) : INT32_MAX};
    run_on_cpu(inputs, outputs,
               [gather, k = layer_.k_side(inputs), v = layer_.v_side(inputs),
                open_k = layer_.open_k_side(inputs), open_v = layer_.open_v_side(inputs),
                k_out = outputs[0].data<char>(), v_out = outputs[1].data<char>()]() {
                 gather.run(k, open_k, k_out);
                 gather.run(v, open_v, v_out);
               });
  }

 private:
  LayerArrays layer_; // of the inputs
  int length_;
};

} // namespace

std::vector<mx::array> gather_pages(const std::vector<mx::array>& pages,
                                    const mx::array& block_tables, const mx::array& context_lens,
                                    int length, const std::optional<mx::array>& page_starts,
                                    const std::optional<mx::array>& page_lens, PageFormats formats,
                                    mx::StreamOrDevice s_) {
  const auto s = mx::to_stream(s_);
  ShapeCheck shape("gather_pages");
  check_page_shapes("gather_pages", shape, pages, formats);
  shape("block_tables", block_tables, {"batch", "max_pages"});
  shape("context_lens", context_lens, {"batch"});
  const mx::Dtype dtype = check_page_dtypes("gather_pages", pages, formats);
  check_dtype("gather_pages", "block_tables", block_tables, mx::int32, "page ids");
  check_dtype("gather_pages", "context_lens", context_lens, mx::int32, "lengths");
  std::vector<mx::array> inputs;
  std::vector<mx::Dtype> dtypes = {dtype, dtype};
  for (const mx::array& array : pages) {
    inputs.push_back(row_contiguous(array, s));
    dtypes.push_back(array.dtype());
  }
  inputs.push_back(row_contiguous(block_tables, s));
  inputs.push_back(row_contiguous(context_lens, s));
  if (page_starts && page_lens) {
    shape("page_starts", *page_starts, {"batch", "max_pages"});
    shape("page_lens", *page_lens, {"batch", "max_pages"});
    inputs.push_back(row_contiguous(*page_starts, s));
    inputs.push_back(row_contiguous(*page_lens, s));
  }
  const LayerArrays layer{formats, shape.at("head_dim"), shape.at("v_head_dim")};
  auto primitive = std::make_shared<GatherPages>(s, layer, length);
  auto shapes = primitive->output_shapes(inputs);
  return mx::array::make_arrays(std::move(shapes), dtypes, primitive, std::move(inputs));
}

} // namespace paged_mlx
