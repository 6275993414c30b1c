#include "ops/launch.h"

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

} // namespace paged_mlx
