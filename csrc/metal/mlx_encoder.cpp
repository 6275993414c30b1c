#ifdef _METAL_

#include "metal/mlx_encoder.h"

#include <utility>

#include "metal/pipeline_limits.h"
#include "mlx/allocator.h"

namespace paged_mlx::metal {

namespace {

const mx::array& array_of(Buffer buffer) {
  return *static_cast<const mx::array*>(buffer);
}

// The same buffer, counted as so many elements. MLX commits a command buffer, once a node
// is done, when the buffers it binds add up to some 40M elements; ordering goes by buffer.
mx::array counted(const mx::array& a, size_t elements) {
  mx::array view({1}, a.dtype(), nullptr, {});
  view.copy_shared_buffer(a, {1}, {true, true, true}, elements);
  return view;
}

// A pool counts for one element, whatever its size.
mx::array one_element(const mx::array& a) {
  return counted(a, 1);
}

} // namespace

struct MlxEncoder::Concurrent {
  mx::metal::CommandEncoder::ConcurrentContext context;
};

MlxEncoder::MlxEncoder(mx::Stream stream)
    : device_(mx::metal::device(stream.device)), encoder_(mx::metal::get_command_encoder(stream)) {}

MlxEncoder::~MlxEncoder() = default;

// Compiles the variant, unless MLX has it: it keeps libraries by name, and
// pipelines by the name of their variant, for as long as the process lives.
MTL::ComputePipelineState* MlxEncoder::make_pipeline(const Variant& variant) {
  auto* library =
      device_.get_library(variant.library_name(), [&variant] { return variant.text(); });
  mx::metal::MTLFCList constants;
  std::list<bool> bools;
  for (const Constant& constant : variant.constants) {
    if (constant.is_bool) {
      bools.push_back(constant.value != 0);
      constants.emplace_back(&bools.back(), MTL::DataType::DataTypeBool, constant.id);
    } else {
      constants.emplace_back(&constant.value, MTL::DataType::DataTypeInt, constant.id);
    }
  }
  return device_.get_kernel(variant.kernel, library, variant.name(), constants);
}

MTL::ComputePipelineState* MlxEncoder::pipeline(const Variant& variant) {
  static VariantMap<MTL::ComputePipelineState*> made;
  return made.at(variant, [&] {
    auto* const pipeline = make_pipeline(variant);
    note_pipeline(variant, int(pipeline->maxTotalThreadsPerThreadgroup()));
    return pipeline;
  });
}

int MlxEncoder::max_threads(const Variant& variant) {
  return int(pipeline(variant)->maxTotalThreadsPerThreadgroup());
}

void MlxEncoder::set_variant(const Variant& variant) {
  encoder_.set_compute_pipeline_state(pipeline(variant));
}

void MlxEncoder::set_input(int index, Buffer buffer) {
  encoder_.set_input_array(array_of(buffer), index);
}

void MlxEncoder::set_output(int index, Buffer buffer) {
  const mx::array& whole = array_of(buffer);
  mx::array output = counted(whole, whole.data_size() + std::exchange(added_elements_, 0));
  encoder_.set_output_array(output, index);
}

// MLX fences a command encoder against the writers before it but not against
// the readers; a reader that is also an output is fenced.
void MlxEncoder::set_pages(int index, Buffer buffer) {
  const mx::array view = one_element(array_of(buffer));
  encoder_.set_input_array(view, index);
  encoder_.register_output_array(view);
}

void MlxEncoder::set_written_pages(int index, Buffer buffer) {
  mx::array view = one_element(array_of(buffer));
  encoder_.set_output_array(view, index);
}

void MlxEncoder::set_bytes(int index, const void* bytes, size_t size) {
  encoder_.set_bytes(static_cast<const char*>(bytes), int(size), index);
}

Buffer MlxEncoder::temporary(size_t bytes) {
  const int elements = int((bytes + 3) / 4);
  temporaries_.emplace_back(mx::allocator::malloc(size_t(elements) * 4), mx::Shape{elements},
                            mx::float32);
  encoder_.add_temporary(temporaries_.back());
  return &temporaries_.back();
}

void MlxEncoder::dispatch(Size groups, Size group) {
  encoder_.dispatch_threadgroups(MTL::Size(groups.x, groups.y, groups.z),
                                 MTL::Size(group.x, group.y, group.z));
}

void MlxEncoder::begin_concurrent() {
  concurrent_.reset(new Concurrent{encoder_.start_concurrent()});
}

void MlxEncoder::end_concurrent() {
  concurrent_.reset();
}

// Work is counted as elements: after a whole share MLX commits. An output counts where its
// buffer is new to the command encoder, as that of an attention's first node is; the next
// node finds a new encoder, since the one before it had its whole share.
void MlxEncoder::add_work(double share) {
  const size_t megabytes = std::get<1>(device_.get_max_ops_mb_per_buffer());
  added_elements_ = size_t(share * double((megabytes + 1) << 20));
}

} // namespace paged_mlx::metal

#endif
