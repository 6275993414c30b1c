#include <atomic>
#include <mutex>

#include "contract.h"

namespace metal_contract {

namespace {

constexpr int kMaxBuffers = 31;
constexpr size_t kMaxBytes = 4096;
constexpr uint8_t kUnwritten = 0xff; // scratch memory that nobody wrote reads as NaN

std::recursive_mutex g_mutex;
Limits g_limits;
std::vector<std::string> g_errors;
std::map<int, std::vector<int>> g_waits; // of each command encoder

// The number of an allocation. Addresses are used again, these are not.
int number_of(const Memory& data) {
  static std::map<std::weak_ptr<mlx::core::array::Data>, int, std::owner_less<>> numbers;
  return numbers.try_emplace(data, int(numbers.size())).first->second;
}

} // namespace

void set_limits(const Limits& limits) {
  const std::lock_guard lock(g_mutex);
  g_limits = limits;
}

std::vector<std::string> take_errors() {
  const std::lock_guard lock(g_mutex);
  return std::exchange(g_errors, {});
}

void report(const std::string& error) {
  const std::lock_guard lock(g_mutex);
  g_errors.push_back(error);
}

bool is_alive(const Dispatch& dispatch, std::vector<Memory>& held) {
  for (const auto& [index, bound] : dispatch.buffers) {
    held.push_back(bound.data.lock());
    if (!held.back()) {
      report(
          "buffer " + std::to_string(index) + " of " + dispatch.pipeline->kernel +
          " is freed before its command buffer completes");
      return false;
    }
  }
  return true;
}

} // namespace metal_contract

namespace MTL {

using metal_contract::report;

NS::UInteger ComputePipelineState::maxTotalThreadsPerThreadgroup() const {
  return metal_contract::g_limits.threads;
}

void CommandBuffer::addCompletedHandler(std::function<void(CommandBuffer*)> handler) {
  if (committed_) {
    report("a completion handler is added to a command buffer that is committed");
    return;
  }
  handlers_.push_back(std::move(handler));
}

void CommandBuffer::commit() {
  if (committed_) {
    report("a command buffer is committed twice");
  }
  committed_ = true;
}

void CommandBuffer::complete() {
  for (const auto& handler : std::exchange(handlers_, {})) {
    handler(this);
  }
}

} // namespace MTL

namespace mlx::core::metal {

using metal_contract::Bound;
using metal_contract::Dispatch;
using metal_contract::g_limits;
using metal_contract::g_mutex;
using metal_contract::number_of;
using metal_contract::report;

CommandEncoder::CommandEncoder(int stream)
    : stream_(stream), buffer_(std::make_shared<MTL::CommandBuffer>()) {}

// A kernel may use what was bound for it alone.
void CommandEncoder::set_compute_pipeline_state(MTL::ComputePipelineState* kernel) {
  if (!kernel || !device(mlx::core::Device::gpu).has(kernel)) {
    report("a pipeline is used that does not exist");
    kernel = nullptr;
  }
  pipeline_ = kernel;
  bound_.clear();
  bytes_.clear();
}

void CommandEncoder::bind(const array& a, int idx, int64_t offset, bool output) {
  if (encoder_ < 0) {
    static int encoders = 0;
    encoder_ = encoders++;
    epoch_ = 0;
  }
  if (idx < 0 || idx >= metal_contract::kMaxBuffers) {
    report("buffer " + std::to_string(idx) + " is bound; Metal has " + std::to_string(metal_contract::kMaxBuffers));
  }
  const int64_t begin = a.offset() + offset;
  auto buffer = a.buffer();
  bytes_.erase(idx);
  bound_[idx] = Bound{
      number_of(a.data_shared_ptr()),
      static_cast<char*>(buffer.raw_ptr()) + begin,
      a.buffer_size() - size_t(begin),
      output,
      a.data_shared_ptr()};
}

void CommandEncoder::set_input_array(const array& a, int idx, int64_t offset) {
  const std::lock_guard lock(g_mutex);
  const int memory = number_of(a.data_shared_ptr());
  if (all_inputs_.insert(memory).second) {
    buffer_sizes_ += a.data_size();
  }
  next_inputs_.insert(memory);
  needs_barrier_ = needs_barrier_ || previous_outputs_.count(memory);
  bind(a, idx, offset, false);
}

void CommandEncoder::set_output_array(array& a, int idx, int64_t offset) {
  const std::lock_guard lock(g_mutex);
  set_input_array(a, idx, offset);
  register_output_array(a);
  bound_[idx].output = true;
}

void CommandEncoder::register_output_array(const array& a) {
  const std::lock_guard lock(g_mutex);
  const int memory = number_of(a.data_shared_ptr());
  all_outputs_.insert(memory);
  if (concurrent_ >= 0) {
    concurrent_outputs_.insert(memory);
  } else {
    next_outputs_.insert(memory);
    needs_barrier_ = needs_barrier_ || previous_inputs_.count(memory);
  }
}

void CommandEncoder::add_temporary(array arr) {
  std::fill_n(arr.data<uint8_t>(), arr.nbytes(), metal_contract::kUnwritten);
  temporaries_.push_back(std::move(arr));
}

void CommandEncoder::set_bytes_of(const void* bytes, size_t size, int idx) {
  if (size > metal_contract::kMaxBytes) {
    report(std::to_string(size) + " bytes are set; Metal takes " + std::to_string(metal_contract::kMaxBytes));
  }
  if (idx < 0 || idx >= metal_contract::kMaxBuffers) {
    report("bytes are set as buffer " + std::to_string(idx) + "; Metal has " + std::to_string(metal_contract::kMaxBuffers));
  }
  const char* from = static_cast<const char*>(bytes);
  bound_.erase(idx);
  bytes_[idx].assign(from, from + size);
}

void CommandEncoder::begin_concurrent() {
  static int contexts = 0;
  const std::lock_guard lock(g_mutex);
  concurrent_ = contexts++;
}

void CommandEncoder::end_concurrent() {
  concurrent_ = -1;
  previous_outputs_.merge(concurrent_outputs_);
  concurrent_outputs_.clear();
}

void CommandEncoder::barrier() {
  epoch_++;
}

// What came before a barrier needs none again.
void CommandEncoder::insert_barrier_if_needed() {
  if (needs_barrier_) {
    barrier();
    needs_barrier_ = false;
    previous_inputs_.clear();
    previous_outputs_.clear();
  }
  previous_inputs_.merge(next_inputs_);
  previous_outputs_.merge(next_outputs_);
  next_inputs_.clear();
  next_outputs_.clear();
}

void CommandEncoder::dispatch_threadgroups(MTL::Size grid, MTL::Size group) {
  insert_barrier_if_needed();
  buffer_ops_++;
  if (!pipeline_) {
    report("a dispatch has no pipeline");
    return;
  }
  if (group.width * group.height * group.depth > pipeline_->maxTotalThreadsPerThreadgroup()) {
    report("a threadgroup of " + pipeline_->kernel + " has more threads than its pipeline takes");
  }
  encoded_.push_back(Dispatch{
      pipeline_,
      bound_,
      bytes_,
      {grid.width, grid.height, grid.depth},
      {group.width, group.height, group.depth},
      stream_,
      encoder_,
      epoch_,
      concurrent_});
}

// A command encoder waits for those that had one of its buffers as an output.
void CommandEncoder::end_encoding() {
  const std::lock_guard lock(g_mutex);
  if (evaluating_) {
    report("a command encoder is ended inside an evaluation");
  }
  if (encoder_ < 0) {
    return;
  }
  for (const array& temporary : temporaries_) {
    all_inputs_.erase(number_of(temporary.data_shared_ptr()));
    all_outputs_.erase(number_of(temporary.data_shared_ptr()));
  }
  std::set<int> waits;
  for (int memory : all_inputs_) {
    if (const auto by = written_by_.find(memory); by != written_by_.end()) {
      waits.insert(by->second);
    }
  }
  for (int memory : all_outputs_) {
    written_by_[memory] = encoder_;
  }
  metal_contract::g_waits[encoder_].assign(waits.begin(), waits.end());
  buffer_->addCompletedHandler([held = std::move(temporaries_)](MTL::CommandBuffer*) {});
  temporaries_.clear();
  encoder_ = -1;
  needs_barrier_ = false;
  concurrent_ = -1;
  pipeline_ = nullptr;
  bound_.clear();
  bytes_.clear();
  for (auto* memories :
       {&previous_inputs_, &previous_outputs_, &next_inputs_, &next_outputs_, &concurrent_outputs_,
        &all_inputs_, &all_outputs_}) {
    memories->clear();
  }
}

bool CommandEncoder::needs_commit() const {
  return buffer_ops_ > g_limits.ops || (buffer_sizes_ >> 20) > size_t(g_limits.megabytes);
}

void CommandEncoder::commit(std::function<void()>) {
  if (evaluating_) {
    report("a command buffer is committed inside an evaluation");
  }
  const std::lock_guard lock(g_mutex);
  buffer_->commit();
  buffer_ = std::make_shared<MTL::CommandBuffer>();
  buffer_ops_ = 0;
  buffer_sizes_ = 0;
}

metal_contract::Encoded CommandEncoder::evaluate(
    const std::vector<array>& inputs,
    const std::vector<array>& outputs,
    const std::function<void()>& eval_gpu) {
  const std::lock_guard lock(g_mutex);
  const auto buffer = buffer_;
  encoded_.clear();
  evaluating_ = true;
  try {
    eval_gpu();
  } catch (...) {
    evaluating_ = false;
    throw;
  }
  evaluating_ = false;
  std::set<int> held;
  for (const auto* arrays : {&inputs, &outputs, const_cast<const std::vector<array>*>(&temporaries_)}) {
    for (const array& a : *arrays) {
      held.insert(number_of(a.data_shared_ptr()));
    }
  }
  for (const Dispatch& dispatch : encoded_) {
    for (const auto& [index, bound] : dispatch.buffers) {
      if (!held.count(bound.memory)) {
        report(
            "buffer " + std::to_string(index) + " of " + dispatch.pipeline->kernel +
            " is neither an input nor an output of its node, nor a temporary: nobody holds it until its command buffer completes");
      }
    }
  }
  if (needs_commit()) {
    end_encoding();
    commit();
    return {std::exchange(encoded_, {}), buffer};
  }
  buffer->addCompletedHandler([](MTL::CommandBuffer*) {});
  return {std::exchange(encoded_, {}), nullptr};
}

std::tuple<int, int> Device::get_max_ops_mb_per_buffer() const {
  return {g_limits.ops, g_limits.megabytes};
}

// Like MLX's: by its name alone.
MTL::Library* Device::get_library(
    const std::string& name,
    const std::function<std::string(void)>& builder) {
  auto found = libraries_.find(name);
  if (found == libraries_.end()) {
    found = libraries_.emplace(name, MTL::Library{name, builder()}).first;
  }
  return &found->second;
}

MTL::ComputePipelineState* Device::get_kernel(
    const std::string& base_name,
    MTL::Library* library,
    const std::string& hash_name,
    const MTLFCList& func_consts) {
  const auto key = std::make_pair(library, hash_name);
  auto found = pipelines_.find(key);
  if (found == pipelines_.end()) {
    MTL::ComputePipelineState made{library, base_name, {}};
    for (const auto& [value, type, id] : func_consts) {
      const bool is_bool = type == MTL::DataTypeBool;
      made.constants[int(id)] = {
          is_bool, is_bool ? *static_cast<const bool*>(value) : *static_cast<const int*>(value)};
    }
    found = pipelines_.emplace(key, std::move(made)).first;
  }
  return &found->second;
}

bool Device::has(const MTL::ComputePipelineState* pipeline) const {
  for (const auto& [key, made] : pipelines_) {
    if (&made == pipeline) {
      return true;
    }
  }
  return false;
}

Device& device(mlx::core::Device) {
  static Device device;
  return device;
}

namespace {

std::map<int, CommandEncoder>& encoders() {
  static std::map<int, CommandEncoder> encoders;
  return encoders;
}

} // namespace

CommandEncoder& get_command_encoder(Stream s) {
  const std::lock_guard lock(g_mutex);
  return encoders().try_emplace(s.index, s.index).first->second;
}

} // namespace mlx::core::metal

namespace metal_contract {

std::map<int, std::vector<int>> finish() {
  const std::lock_guard lock(g_mutex);
  for (auto& [index, encoder] : mlx::core::metal::encoders()) {
    encoder.end_encoding();
    encoder.commit(); // all of it has run: what it held goes with it
  }
  return std::exchange(g_waits, {});
}

} // namespace metal_contract
