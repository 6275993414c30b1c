// How often each operation ran and where, and which bodies attended: nobody has to believe that a
// fast path did not decline. Counted where the choice is made, by an addition.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <map>
#include <string>

#include "mlx/device.h"

namespace paged_mlx {

enum class Place { cpu, gpu, host }; // host: Metal kernels, run by the tests on the CPU

inline Place place_of_kernels(const mlx::core::Device& device) {
  return device == mlx::core::Device::gpu ? Place::gpu : Place::host;
}

// Of one kind of work. Lives as long as the process; those of one name are added up.
class RouteCount {
 public:
  RouteCount(const char* name);
  RouteCount(const RouteCount&) = delete;

  void add(Place place, int64_t n = 1) {
    counts_[int(place)].fetch_add(n, std::memory_order_relaxed);
  }
  int64_t operator[](Place place) const {
    return counts_[int(place)].load(std::memory_order_relaxed);
  }
  const std::string& name() const {
    return name_;
  }

 private:
  const std::string name_;
  std::array<std::atomic<int64_t>, 3> counts_{};
};

// The items of a plan, by kind, and its merges, which a node attends there.
void count_items(const int32_t* plan, Place place);

// name -> where -> how often, so far; without zeros.
std::map<std::string, std::map<std::string, int64_t>> route_counts();

} // namespace paged_mlx
