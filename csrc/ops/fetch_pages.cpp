#include "ops/fetch_pages.h"

#include <algorithm>

#include "mlx/allocator.h"
#include "mlx/ops.h"

#include "metal/launch.h"
#include "ops/page_arrays.h"
#include "ops/page_rows.h"
#include "shape_check.h"

namespace paged_mlx {

namespace {

constexpr const char* kOp = "fetch_pages";

enum Input { kPages, kWords, kTokens };

// A part of `words` as something to bind.
mx::array view(const mx::array& words, int begin, int count) {
  mx::array part({count}, words.dtype(), nullptr, {});
  part.copy_shared_buffer(words, {1}, {true, true, true}, count, begin);
  return part;
}

// Inputs as the Metal launch binds them: the words part by part, after the rest.
enum Part { kTables, kLens, kSlots, kStarts, kPageLens };

Arrays with_parts(Arrays inputs, const FetchTables& t) {
  const mx::array words = inputs[kWords];
  const int table = t.batch * t.max_pages;
  inputs.push_back(view(words, 0, table));
  inputs.push_back(view(words, t.context_lens(), t.batch));
  inputs.push_back(view(words, t.slots(), t.batch * t.num_tokens));
  if (t.ragged) {
    inputs.push_back(view(words, t.page_starts(), table));
    inputs.push_back(view(words, t.page_lens(), table));
  }
  return inputs;
}

// Its outputs are its first two inputs, once all inputs have been computed.
class After : public PagesPrimitive {
 public:
  using PagesPrimitive::PagesPrimitive;

  const char* name() const override {
    return "After";
  }

 protected:
  void eval(const Arrays& inputs, Arrays& outputs) override {
    outputs[0].copy_shared_buffer(inputs[0]);
    outputs[1].copy_shared_buffer(inputs[1]);
  }
};

} // namespace

FetchedPages fetch_pages(const std::shared_ptr<const FetchTables>& tables, const mx::array& k_pages,
                         const mx::array& v_pages, const std::optional<mx::array>& k,
                         const std::optional<mx::array>& v, mx::StreamOrDevice s_) {
  const auto s = mx::to_stream(s_);
  ShapeCheck shape(kOp);
  check_page_shapes(kOp, shape, {k_pages, v_pages}, {});
  check_page_dtypes(kOp, {k_pages, v_pages}, {});
  const bool wants_tokens = tables->num_tokens > 0;
  if (k.has_value() != wants_tokens || v.has_value() != wants_tokens) {
    fail(kOp, "k and v must be given if the tables have new tokens, and only then", "others");
  }
  if (k) {
    check_tokens(kOp, shape, *k, *v, tables->batch, tables->num_tokens);
    check_not_traced(kOp, "k", *k, k_pages);
  }
  const auto has_read = std::make_shared<std::atomic<bool>>(false);
  auto node = [&](const mx::array& pages, const std::optional<mx::array>& tokens) {
    std::optional<mx::array> stored;
    if (tokens) {
      stored = for_kernels(mx::astype(*tokens, pages.dtype(), s), s);
    }
    return std::make_shared<GatherHandle>(s, tables, has_read, row_contiguous(pages, s),
                                          std::move(stored));
  };
  const auto k_node = node(k_pages, k), v_node = node(v_pages, v);
  return {mx::astype(GatherHandle::make(k_node), k ? k->dtype() : k_pages.dtype(), s),
          mx::astype(GatherHandle::make(v_node), v ? v->dtype() : v_pages.dtype(), s),
          {k_node, v_node, has_read, s}};
}

mx::array GatherHandle::make(const std::shared_ptr<GatherHandle>& node) {
  const FetchTables& t = *node->tables_;
  const mx::array& pages = node->pages_;
  std::vector<mx::array> inputs;
  inputs.reserve(3);
  inputs.push_back(pages);
  inputs.push_back(t.words);
  if (node->tokens_) {
    inputs.push_back(*node->tokens_);
  }
  return mx::array({t.batch, pages.shape(1), t.length - t.skip, pages.shape(3)}, pages.dtype(),
                   node, std::move(inputs));
}

const mx::array& GatherHandle::replace() {
  if (!replacement_) {
    replacement_ =
        make(std::make_shared<GatherHandle>(stream(), tables_, has_read_, pages_, tokens_));
  }
  return *replacement_;
}

bool GatherHandle::take_replacement(mx::array& out) const {
  if (!replacement_ || replacement_->status() == mx::array::Status::unscheduled) {
    return false;
  }
  out.copy_shared_buffer(*replacement_);
  return true;
}

// Memory for all columns; `out` is those that are not skipped.
mx::array GatherHandle::allocate(mx::array& out) const {
  const mx::Shape shape = {out.shape(0), out.shape(1), tables_->length, out.shape(3)};
  mx::array whole(shape, out.dtype(), nullptr, {});
  whole.set_data(mx::allocator::malloc(whole.nbytes()));
  if (tables_->skip == 0) {
    out.copy_shared_buffer(whole);
    return whole;
  }
  const bool one_run = shape[0] * shape[1] == 1;
  const int64_t skipped = int64_t(tables_->skip) * shape[3];
  out.copy_shared_buffer(
      whole, whole.strides(),
      {/*contiguous=*/one_run, /*row_contiguous=*/one_run, /*col_contiguous=*/false},
      whole.size() - skipped, skipped);
  return whole;
}

auto GatherHandle::launch(const Arrays& inputs) const {
  const mx::array& pages = inputs[kPages];
  metal::GatherPagesCall gather{};
  gather.batch = tables_->batch;
  gather.max_pages = tables_->max_pages;
  gather.length = tables_->length;
  gather.num_kv_heads = pages.shape(1);
  gather.page_size = pages.shape(2);
  gather.row = {row_bytes(pages), 0};
  metal::WritePagesCall write{};
  write.tokens = tables_->batch * tables_->num_tokens;
  write.num_kv_heads = gather.num_kv_heads;
  write.page_size = tables_->length;
  write.row = gather.row;
  const int parts = int(inputs.size());
  return [gather, write, parts, ragged = tables_->ragged](metal::Encoder& encoder, auto in,
                                                          auto out) mutable {
    gather.k_pages = gather.v_pages = in(kPages);
    gather.tables = in(parts + kTables);
    gather.context_lens = in(parts + kLens);
    gather.page_starts = ragged ? in(parts + kStarts) : nullptr;
    gather.page_lens = ragged ? in(parts + kPageLens) : nullptr;
    gather.k_out = gather.v_out = write.k_pages = out(0);
    metal::gather_pages(encoder, gather);
    if (write.tokens > 0) {
      write.k = in(kTokens);
      write.slots = in(parts + kSlots);
      metal::write_pages(encoder, write);
    }
  };
}

void GatherHandle::eval(const Arrays& inputs, Arrays& outputs) {
  if (take_replacement(outputs[0])) {
    return;
  }
  *has_read_ = true;
  Arrays whole = {allocate(outputs[0])};
  if (runs_kernels(stream())) {
    auto bound = inputs;
    if (tokens_ && device() == mx::Device::cpu) {
      bound[kTokens] = token_major(inputs[kTokens], stream());
    }
    return run_kernels(with_parts(std::move(bound), *tables_), whole, launch(inputs));
  }
  const FetchTables& t = *tables_;
  const mx::array& pages = inputs[kPages];
  const int32_t* const words = inputs[kWords].data<int32_t>();
  const PageGather gather{words,
                          words + t.context_lens(),
                          t.ragged ? words + t.page_starts() : nullptr,
                          t.ragged ? words + t.page_lens() : nullptr,
                          t.batch,
                          t.max_pages,
                          t.length,
                          pages.shape(1),
                          pages.shape(2)};
  std::vector<SlotWriter> writers; // the gather is seen as `batch` pages of `length` slots
  if (tokens_) {
    writers.emplace_back(inputs[kTokens], dense_side(whole[0]));
  }
  run_on_cpu(inputs, outputs,
             [gather, writers, from = dense_side(pages), to = whole[0].data<char>(),
              slots = words + t.slots()]() {
               gather.run(from, {}, to);
               write_slots(kOp, "slots", writers, slots);
             });
}

std::vector<mx::array> Fetch::settle(const mx::array& k_pages, const mx::array& v_pages) {
  std::vector<mx::array> inputs = {k_pages, v_pages};
  for (const auto& handle : {k, v}) {
    if (const auto node = handle.lock()) {
      inputs.push_back(node->replace());
    }
  }
  return mx::array::make_arrays({k_pages.shape(), v_pages.shape()},
                                {k_pages.dtype(), v_pages.dtype()}, std::make_shared<After>(stream),
                                std::move(inputs));
}

void Fetches::add(int layer, Fetch fetch) {
  if (fetches_.size() >= limit_) {
    std::erase_if(fetches_, [](const auto& entry) { return !entry.second.reads_pages(); });
    limit_ = 64 + 2 * fetches_.size();
  }
  fetches_.emplace_back(layer, std::move(fetch));
}

bool Fetches::read_pages() const {
  return std::any_of(fetches_.begin(), fetches_.end(),
                     [](const auto& entry) { return entry.second.reads_pages(); });
}

} // namespace paged_mlx
