#include "ops/routes.h"

#include <mutex>
#include <vector>

#include "plan_format.h"

namespace paged_mlx {

namespace {

std::mutex g_mutex;

std::vector<const RouteCount*>& all() {
  static auto& counts = *new std::vector<const RouteCount*>; // for threads that end last
  return counts;
}

} // namespace

RouteCount::RouteCount(const char* name) : name_(name) {
  const std::lock_guard lock(g_mutex);
  all().push_back(this);
}

void count_items(const int32_t* plan, Place place) {
  static auto* const kinds =
      new RouteCount[kNumPlanKinds]{"vector items", "tile items", "wide items"};
  static auto& merges = *new RouteCount("merges");
  const auto& header = *reinterpret_cast<const PlanHeader*>(plan);
  for (int kind = 0; kind < kNumPlanKinds; kind++) {
    kinds[kind].add(place, header.num_items[kind]);
  }
  merges.add(place, header.num_merges);
}

std::map<std::string, std::map<std::string, int64_t>> route_counts() {
  const std::lock_guard lock(g_mutex);
  std::map<std::string, std::map<std::string, int64_t>> found;
  for (const RouteCount* count : all()) {
    for (const auto& [place, name] :
         {std::pair{Place::cpu, "cpu"}, {Place::gpu, "gpu"}, {Place::host, "host"}}) {
      if (const int64_t n = (*count)[place]) {
        found[count->name()][name] += n;
      }
    }
  }
  return found;
}

} // namespace paged_mlx
