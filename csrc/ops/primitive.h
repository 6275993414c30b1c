// How this library's nodes of MLX's graph run: on the CPU a task, on a GPU kernels, and
// in tests the same kernels on the host.
#pragma once

#include <vector>

#include "mlx/array.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/primitives.h"

#include "ops/dispatch.h"
#include "ops/routes.h"

namespace paged_mlx {

namespace mx = mlx::core;

using Arrays = std::vector<mx::array>;

// An operation of this library. It says once how it runs, in eval: it gives its outputs
// memory, and then calls run_kernels or run_on_cpu.
class PagesPrimitive : public mx::Primitive {
 public:
  using mx::Primitive::Primitive;

  void eval_cpu(const Arrays& inputs, Arrays& outputs) final {
    eval(inputs, outputs);
  }
  void eval_gpu(const Arrays& inputs, Arrays& outputs) final {
    eval(inputs, outputs);
  }

  // Whether an output lies in memory row by row, as kernels read pages.
  virtual bool is_row_contiguous(int output) const {
    return true;
  }

 protected:
  virtual void eval(const Arrays& inputs, Arrays& outputs) = 0;

  // Runs launch(encoder, in, out), as dispatch.h has it.
  template <typename Launch>
  void run_kernels(const Arrays& inputs, Arrays& outputs, Launch launch);

  // Runs task() when the inputs have been computed.
  template <typename Task>
  void run_on_cpu(const Arrays& inputs, Arrays& outputs, Task task);
};

template <typename Task>
void PagesPrimitive::run_on_cpu(const Arrays& inputs, Arrays& outputs, Task task) {
  static auto& calls = *new RouteCount(name()); // a Task is of one operation
  calls.add(Place::cpu);
  auto& encoder = mx::cpu::get_command_encoder(stream());
  for (const auto& input : inputs) {
    encoder.set_input_array(input);
  }
  for (auto& output : outputs) {
    encoder.set_output_array(output);
  }
  encoder.dispatch(std::move(task));
}

template <typename Launch>
void PagesPrimitive::run_kernels(const Arrays& inputs, Arrays& outputs, Launch launch) {
  static auto& calls = *new RouteCount(name());
  calls.add(place_of_kernels(device()));
  if (device() == mx::Device::gpu) {
    dispatch_on_gpu(name(), stream(), inputs, outputs, std::move(launch));
  } else {
    dispatch_on_host(stream(), inputs, outputs, std::move(launch));
  }
}

} // namespace paged_mlx
