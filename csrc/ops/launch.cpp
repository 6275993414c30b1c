#include "ops/launch.h"

#include <mutex>

namespace paged_mlx {

namespace {

std::mutex g_mutex;
metal::HostLaunch g_launch;

} // namespace

void set_host_launch(metal::HostLaunch launch) {
  const std::lock_guard lock(g_mutex);
  g_launch = std::move(launch);
}

metal::HostLaunch host_launch() {
  const std::lock_guard lock(g_mutex);
  return g_launch;
}

} // namespace paged_mlx
