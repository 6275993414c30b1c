// The host's half of dispatch.h, which includes it. A test puts another in its place: one that
// encodes for a GPU (tests/support/metal_contract).
#pragma once

#include "ops/dispatch.h"

namespace paged_mlx {

template <typename Launch>
void dispatch_on_host(mx::Stream stream, const std::vector<mx::array>& inputs,
                      std::vector<mx::array>& outputs, Launch launch) {
  auto& encoder = mx::cpu::get_command_encoder(stream);
  auto memory = [](const mx::array& a) {
    return metal::HostBuffer{const_cast<char*>(a.data<char>()), a.nbytes()};
  };
  std::vector<metal::HostBuffer> in, out;
  for (const auto& input : inputs) {
    encoder.set_input_array(input);
    in.push_back(memory(input));
  }
  for (auto& output : outputs) {
    encoder.set_output_array(output);
    out.push_back(memory(output));
  }
  encoder.dispatch([launch, in, out, run = host_launch(stream)]() {
    metal::HostEncoder host(run);
    auto bind = [&host](const metal::HostBuffer& m) { return host.buffer(m.address, m.nbytes); };
    Launch once = launch; // it fills in the bindings
    once(host, [&](int i) { return bind(in[i]); }, [&](int i) { return bind(out[i]); });
  });
}

} // namespace paged_mlx
