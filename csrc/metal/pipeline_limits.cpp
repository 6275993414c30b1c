#include "metal/pipeline_limits.h"

#include <mutex>

namespace paged_mlx::metal {

namespace {

std::mutex g_mutex;
std::map<std::string, int> g_limits;

} // namespace

void note_pipeline(const std::string& name, int max_threads) {
  const std::lock_guard lock(g_mutex);
  g_limits[name] = max_threads;
}

std::map<std::string, int> pipeline_limits() {
  const std::lock_guard lock(g_mutex);
  return g_limits;
}

} // namespace paged_mlx::metal
