// What the Metal path of paged_mlx uses of MLX's Metal device and of metal-cpp, on a machine
// without either. The declarations are those of MLX's header of this name; behind them stands
// device.cpp, which keeps MLX's rules and reports who breaks Metal's.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "mlx/array.h"
#include "mlx/stream.h"

namespace NS {
using UInteger = unsigned long;
}

namespace MTL {

enum DataType : NS::UInteger { DataTypeInt = 29, DataTypeBool = 53 };

struct Size {
  Size(NS::UInteger x, NS::UInteger y, NS::UInteger z) : width(x), height(y), depth(z) {}
  NS::UInteger width, height, depth;
};

struct Library {
  std::string name, text;
};

struct Constant {
  bool is_bool;
  int value;
};

struct ComputePipelineState {
  const Library* library;
  std::string kernel;
  std::map<int, Constant> constants;

  NS::UInteger maxTotalThreadsPerThreadgroup() const;
};

class CommandBuffer {
 public:
  void addCompletedHandler(std::function<void(CommandBuffer*)> handler);
  void commit();
  void complete(); // once what was encoded has run

  bool is_committed() const {
    return committed_;
  }

 private:
  bool committed_ = false;
  std::vector<std::function<void(CommandBuffer*)>> handlers_;
};

} // namespace MTL

namespace metal_contract {

using Memory = std::shared_ptr<mlx::core::array::Data>;

// A buffer as a kernel gets it. `memory` is the same number for the same allocation.
struct Bound {
  int memory;
  char* address;
  size_t nbytes;
  bool output; // registered so; else it is an input
  std::weak_ptr<mlx::core::array::Data> data;
};

struct Dispatch {
  const MTL::ComputePipelineState* pipeline;
  std::map<int, Bound> buffers;
  std::map<int, std::vector<char>> bytes;
  std::vector<NS::UInteger> groups, group;
  int stream;
  int encoder;    // the command encoder, unique
  int epoch;      // barriers before it in the encoder
  int concurrent; // dispatches of one number may run at once; -1: none
};

// What a node encoded, and the command buffer that MLX committed after it; null: none.
struct Encoded {
  std::vector<Dispatch> dispatches;
  std::shared_ptr<MTL::CommandBuffer> committed;
};

} // namespace metal_contract

namespace mlx::core::metal {

using MTLFCList = std::vector<std::tuple<const void*, MTL::DataType, NS::UInteger>>;

class CommandEncoder {
 public:
  explicit CommandEncoder(int stream);
  CommandEncoder(const CommandEncoder&) = delete;
  CommandEncoder& operator=(const CommandEncoder&) = delete;

  struct ConcurrentContext {
    ConcurrentContext(CommandEncoder& enc) : enc(enc) {
      enc.begin_concurrent();
    }
    ~ConcurrentContext() {
      enc.end_concurrent();
    }

   private:
    CommandEncoder& enc;
  };

  void set_input_array(const array& a, int idx, int64_t offset = 0);
  void set_output_array(array& a, int idx, int64_t offset = 0);
  void register_output_array(const array& a);
  void add_temporary(array arr);
  void set_compute_pipeline_state(MTL::ComputePipelineState* kernel);
  void dispatch_threadgroups(MTL::Size grid_dims, MTL::Size group_dims);
  void barrier();
  ConcurrentContext start_concurrent() {
    return ConcurrentContext(*this);
  }

  template <typename T>
  void set_bytes(const T* v, int n, int idx) {
    set_bytes_of(v, n * sizeof(T), idx);
  }

  void end_encoding();
  bool needs_commit() const;
  void commit(std::function<void()> completion = nullptr);
  MTL::CommandBuffer* get_command_buffer() const {
    return buffer_.get();
  }

  // The stand-in's own: what gpu::eval does around a node's evaluation.
  metal_contract::Encoded evaluate(
      const std::vector<array>& inputs,
      const std::vector<array>& outputs,
      const std::function<void()>& eval_gpu);

 private:
  using Memories = std::set<int>;

  void begin_concurrent();
  void end_concurrent();
  void set_bytes_of(const void* bytes, size_t size, int idx);
  void bind(const array& a, int idx, int64_t offset, bool output);
  void insert_barrier_if_needed();

  const int stream_;
  std::shared_ptr<MTL::CommandBuffer> buffer_;
  int buffer_ops_ = 0;
  size_t buffer_sizes_ = 0;
  bool evaluating_ = false;
  std::vector<metal_contract::Dispatch> encoded_; // by the node that is evaluated

  // Of the open command encoder.
  int encoder_ = -1;
  int epoch_ = 0;
  int concurrent_ = -1;
  bool needs_barrier_ = false;
  MTL::ComputePipelineState* pipeline_ = nullptr;
  std::map<int, metal_contract::Bound> bound_;     // since the pipeline was set
  std::map<int, std::vector<char>> bytes_;
  std::vector<array> temporaries_;
  Memories previous_inputs_, previous_outputs_, next_inputs_, next_outputs_, concurrent_outputs_;
  Memories all_inputs_, all_outputs_;

  std::map<int, int> written_by_; // memory: the last encoder that has it as an output
};

class Device {
 public:
  std::tuple<int, int> get_max_ops_mb_per_buffer() const;

  MTL::Library* get_library(
      const std::string& name,
      const std::function<std::string(void)>& builder);

  MTL::ComputePipelineState* get_kernel(
      const std::string& base_name,
      MTL::Library* mtl_lib,
      const std::string& hash_name = "",
      const MTLFCList& func_consts = {});

  bool has(const MTL::ComputePipelineState* pipeline) const;

 private:
  std::map<std::string, MTL::Library> libraries_;
  std::map<std::pair<const MTL::Library*, std::string>, MTL::ComputePipelineState> pipelines_;
};

Device& device(mlx::core::Device);
CommandEncoder& get_command_encoder(Stream s);

} // namespace mlx::core::metal
