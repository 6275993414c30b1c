// The native module over the stand-in: that of the project, and what is the stand-in's.
#include "bindings/module.h"

#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "contract.h"
#include "mlx/version.h"
#include "ops/dispatch.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace metal_contract {

namespace {

nb::callable* g_launch = nullptr; // lives as long as the process, as a stream's thread may

nb::dict as_dict(const Dispatch& dispatch) {
  nb::dict constants, buffers, bound, bytes, d;
  for (const auto& [id, constant] : dispatch.pipeline->constants) {
    constants[nb::int_(id)] =
        constant.is_bool ? nb::object(nb::bool_(constant.value != 0)) : nb::object(nb::int_(constant.value));
  }
  for (const auto& [index, buffer] : dispatch.buffers) {
    buffers[nb::int_(index)] =
        nb::make_tuple(reinterpret_cast<uintptr_t>(buffer.address), buffer.nbytes);
    bound[nb::int_(index)] = nb::make_tuple(buffer.memory, buffer.output);
  }
  for (const auto& [index, data] : dispatch.bytes) {
    bytes[nb::int_(index)] = nb::bytes(data.data(), data.size());
  }
  d["kernel"] = dispatch.pipeline->kernel;
  d["library"] = dispatch.pipeline->library->name;
  d["text"] = dispatch.pipeline->library->text;
  d["constants"] = constants;
  d["buffers"] = buffers;
  d["bytes"] = bytes;
  d["groups"] = nb::tuple(nb::cast(dispatch.groups));
  d["group"] = nb::tuple(nb::cast(dispatch.group));
  d["bound"] = bound;
  d["stream"] = dispatch.stream;
  d["order"] = nb::make_tuple(dispatch.encoder, dispatch.epoch, dispatch.concurrent);
  return d;
}

} // namespace

void run(const Encoded& encoded) {
  for (const Dispatch& dispatch : encoded.dispatches) {
    std::vector<Memory> held;
    if (is_alive(dispatch, held)) {
      const nb::gil_scoped_acquire gil;
      (*g_launch)(as_dict(dispatch));
    }
  }
  if (encoded.committed) {
    encoded.committed->complete();
  }
}

} // namespace metal_contract

NB_MODULE(_ext, m) {
  m.attr("mlx_build_version") = std::to_string(MLX_VERSION_MAJOR) + "." +
      std::to_string(MLX_VERSION_MINOR) + "." + std::to_string(MLX_VERSION_PATCH);
  m.attr("mlx_version") = mlx::core::version(); // of the library that was loaded
  paged_mlx::bind_plan(m);
  paged_mlx::bind_operations(m);
  paged_mlx::bind_handles(m);
  paged_mlx::bind_diagnostics(m);
  nb::delattr(m, "set_host_launch");
  m.def(
      "set_host_launch",
      [](std::optional<nb::callable> launch, std::optional<mlx::core::Stream> spared) {
        if (launch) {
          metal_contract::g_launch = new nb::callable(*launch);
        }
        const auto run = [](const paged_mlx::metal::HostDispatch&) {}; // that there is one
        paged_mlx::set_host_launch(
            launch ? paged_mlx::metal::HostLaunch(run) : nullptr, spared ? spared->index : -1);
      },
      "launch"_a.none(),
      "spared"_a = nb::none());
  m.def(
      "contract_limits",
      [](int ops, int megabytes, int threads) { metal_contract::set_limits({ops, megabytes, threads}); },
      "ops"_a = 40,
      "megabytes"_a = 40,
      "threads"_a = 1024);
  m.def("contract_errors", &metal_contract::take_errors);
  m.def("contract_finish", &metal_contract::finish);
}
