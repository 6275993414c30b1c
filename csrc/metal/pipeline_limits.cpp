#include "metal/pipeline_limits.h"

#include <mutex>
#include <unordered_map>

namespace paged_mlx::metal {

namespace {

std::mutex g_mutex;
std::unordered_map<Variant, int, VariantHash> g_limits;

// The lowest limit of the pipelines of one text; 0: none is made yet.
int limit_of_text(const Variant& text) {
  const std::lock_guard lock(g_mutex);
  int least = 0;
  for (const auto& [variant, limit] : g_limits) {
    if (text.has_text_of(variant) && (least == 0 || limit < least)) {
      least = limit;
    }
  }
  return least;
}

} // namespace

void note_pipeline(const Variant& variant, int max_threads) {
  const std::lock_guard lock(g_mutex);
  if (max_threads > 0) {
    g_limits[variant] = max_threads;
  } else {
    g_limits.erase(variant);
  }
}

std::map<std::string, int> pipeline_limits() {
  const std::lock_guard lock(g_mutex);
  std::map<std::string, int> limits;
  for (const auto& [variant, limit] : g_limits) {
    limits[variant.name()] = limit;
  }
  return limits;
}

int threadgroups_per_core(const Body& body, DType dtype, int head_dim, int v_head_dim,
                          PageFormats formats) {
  for (int simdgroups = body.simdgroups; simdgroups > 0; simdgroups /= 2) {
    const Variant text = body_text(body, simdgroups, dtype, head_dim, v_head_dim, formats);
    const int limit = limit_of_text(text);
    if (limit >= 32 * simdgroups) {
      return limit / (32 * simdgroups);
    }
  }
  return 0;
}

} // namespace paged_mlx::metal
