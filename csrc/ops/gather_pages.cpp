#include "mlx/allocator.h"
#include "mlx/ops.h"

#include "metal/launch.h"
#include "ops/page_arrays.h"
#include "ops/page_rows.h"
#include "ops/pages.h"
#include "ops/primitive.h"
#include "shape_check.h"

namespace paged_mlx {

namespace {

auto gather_launch(const Arrays& inputs, int length) {
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

class GatherPages : public PagesPrimitive {
 public:
  GatherPages(mx::Stream stream, int length) : PagesPrimitive(stream), length_(length) {}

  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override {
    const auto &k = inputs[0], &v = inputs[1];
    const int batch = inputs[2].shape(0);
    return {{batch, k.shape(1), length_, k.shape(3)},
            {batch, v.shape(1), length_, v.shape(3)},
            k.shape(),
            v.shape()};
  }
  bool is_equivalent(const mx::Primitive& other) const override {
    return length_ == static_cast<const GatherPages&>(other).length_;
  }
  const char* name() const override {
    return "GatherPages";
  }

 protected:
  void eval(const Arrays& inputs, Arrays& outputs) override {
    for (int side : {0, 1}) {
      outputs[side].set_data(mx::allocator::malloc(outputs[side].nbytes()));
      outputs[2 + side].copy_shared_buffer(inputs[side]);
    }
    if (runs_kernels(stream())) {
      return run_kernels(inputs, outputs, gather_launch(inputs, length_));
    }
    const bool ragged = inputs.size() > 4;
    const PageGather gather{inputs[2].data<int32_t>(),
                            inputs[3].data<int32_t>(),
                            ragged ? inputs[4].data<int32_t>() : nullptr,
                            ragged ? inputs[5].data<int32_t>() : nullptr,
                            inputs[2].shape(0),
                            inputs[2].shape(1),
                            length_,
                            inputs[0].shape(1),
                            inputs[0].shape(2)};
    run_on_cpu(inputs, outputs,
               [gather, k = inputs[0].data<char>(), v = inputs[1].data<char>(),
                k_out = outputs[0].data<char>(), v_out = outputs[1].data<char>(),
                k_row = row_bytes(inputs[0]), v_row = row_bytes(inputs[1])]() {
                 gather.run(k, k_out, k_row);
                 gather.run(v, v_out, v_row);
               });
  }

 private:
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
  const auto &k_pages = pages[0], &v_pages = pages[1];
  shape("block_tables", block_tables, {"batch", "max_pages"});
  shape("context_lens", context_lens, {"batch"});
  check_page_dtypes("gather_pages", pages, formats);
  check_dtype("gather_pages", "block_tables", block_tables, mx::int32, "page ids");
  check_dtype("gather_pages", "context_lens", context_lens, mx::int32, "lengths");
  std::vector<mx::array> inputs = {row_contiguous(k_pages, s), row_contiguous(v_pages, s),
                                   block_tables, context_lens};
  if (page_starts && page_lens) {
    shape("page_starts", *page_starts, {"batch", "max_pages"});
    shape("page_lens", *page_lens, {"batch", "max_pages"});
    inputs.push_back(*page_starts);
    inputs.push_back(*page_lens);
  }
  auto primitive = std::make_shared<GatherPages>(s, length);
  auto shapes = primitive->output_shapes(inputs);
  return mx::array::make_arrays(std::move(shapes), std::vector<mx::Dtype>(4, k_pages.dtype()),
                                primitive, std::move(inputs));
}

} // namespace paged_mlx
