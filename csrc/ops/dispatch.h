// The way from a primitive's eval to the Metal launch code (csrc/metal/), on a
// GPU or, for the tests, on the host.
//
// A primitive describes its launch once, as a function (Encoder&, in, out) where
// in(i) and out(i) bind its i-th input and output. dispatch_on_gpu runs it with
// MLX's encoder; dispatch_on_host, in the place of the CPU code, with an encoder
// that hands each dispatch to the function of set_host_launch.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#include "mlx/array.h"
#include "mlx/backend/cpu/encoder.h"

#include "metal/host_encoder.h"
#include "metal/mlx_encoder.h"

namespace paged_mlx {

namespace mx = mlx::core;

// Null: the CPU code runs. Otherwise every operation on the CPU goes through
// the Metal launch code, and its dispatches to `launch`; but for those on the
// CPU stream with index `spared`.
void set_host_launch(metal::HostLaunch launch, int spared = -1);
bool has_host_launch();
metal::HostLaunch host_launch(mx::Stream stream);

// Whether kernels run what is on this stream.
bool runs_kernels(mx::Stream stream);

#ifdef _METAL_
template <typename Launch>
void dispatch_on_gpu(const char*, mx::Stream stream, const std::vector<mx::array>& inputs,
                     std::vector<mx::array>& outputs, Launch launch) {
  metal::MlxEncoder encoder(stream);
  launch(
      encoder, [&](int i) -> metal::Buffer { return &inputs[i]; },
      [&](int i) -> metal::Buffer { return &outputs[i]; });
}
#else
template <typename Launch>
void dispatch_on_gpu(const char* op, mx::Stream, const std::vector<mx::array>&,
                     std::vector<mx::array>&, Launch) {
  throw std::runtime_error(std::string("[") + op +
                           "] this build has no GPU backend: use stream=mx.cpu.");
}
#endif

} // namespace paged_mlx

#include "ops/dispatch_on_host.h"
