#include "ops/dispatch.h"

#include <mutex>

namespace paged_mlx {

namespace {

std::mutex g_mutex;
metal::HostLaunch g_launch;
int g_spared = -1;

} // namespace

void set_host_launch(metal::HostLaunch launch, int spared) {
  const std::lock_guard lock(g_mutex);
  g_launch = std::move(launch);
  g_spared = spared;
}

bool has_host_launch() {
  const std::lock_guard lock(g_mutex);
  return bool(g_launch);
}

metal::HostLaunch host_launch(mx::Stream stream) {
  const std::lock_guard lock(g_mutex);
  return stream.index == g_spared ? metal::HostLaunch() : g_launch;
}

bool runs_kernels(mx::Stream stream) {
  return stream.device == mx::Device::gpu || host_launch(stream);
}

} // namespace paged_mlx
