// In the place of the project's own: a node is encoded by the code for a GPU, at once, as
// MLX's gpu::eval does it; what it encoded runs when the stream comes to it.
#pragma once

#include "contract.h"

namespace metal_contract {

void run(const Encoded& encoded);

} // namespace metal_contract

namespace paged_mlx {

template <typename Launch>
void dispatch_on_host(
    mx::Stream stream,
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs,
    Launch launch) {
  auto& encoder = mx::cpu::get_command_encoder(stream);
  for (const auto& input : inputs) {
    encoder.set_input_array(input);
  }
  for (auto& output : outputs) {
    encoder.set_output_array(output);
  }
  auto encoded = mx::metal::get_command_encoder(stream).evaluate(inputs, outputs, [&] {
    dispatch_on_gpu("stand-in", stream, inputs, outputs, launch);
  });
  encoder.dispatch([encoded = std::move(encoded)]() { metal_contract::run(encoded); });
}

} // namespace paged_mlx
