#include "cpu/machine.h"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <set>
#include <string>
#include <thread>

#if defined(__linux__)
#include <sched.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace paged_mlx::cpu {

namespace {

#if defined(__linux__)

// Cores whose first hardware thread differs.
int cores_in_affinity_mask() {
  cpu_set_t mask;
  if (sched_getaffinity(0, sizeof(mask), &mask) != 0) {
    return int(std::thread::hardware_concurrency());
  }
  std::set<std::string> cores;
  for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
    if (!CPU_ISSET(cpu, &mask)) {
      continue;
    }
    std::ifstream file(
        "/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/thread_siblings_list");
    std::string siblings;
    cores.insert(std::getline(file, siblings) ? siblings : std::to_string(cpu));
  }
  return int(cores.size());
}

// Cores' worth of time that the cgroup grants, 0 when it sets no limit.
double cgroup_cores() {
  double quota = -1, period = 0;
  std::string text;
  if (std::ifstream file("/sys/fs/cgroup/cpu.max"); file >> text >> period) { // version 2
    quota = text == "max" ? -1 : std::stod(text);
  } else {
    std::ifstream quota_file("/sys/fs/cgroup/cpu/cpu.cfs_quota_us");
    std::ifstream period_file("/sys/fs/cgroup/cpu/cpu.cfs_period_us");
    if (!(quota_file >> quota && period_file >> period)) {
      return 0;
    }
  }
  return quota > 0 && period > 0 ? quota / period : 0;
}

#elif defined(__APPLE__)

int cores_in_affinity_mask() {
  int cores = 0;
  size_t size = sizeof(cores);
  // Performance cores where there are two kinds.
  if (sysctlbyname("hw.perflevel0.physicalcpu", &cores, &size, nullptr, 0) != 0) {
    sysctlbyname("hw.physicalcpu", &cores, &size, nullptr, 0);
  }
  return cores;
}

double cgroup_cores() {
  return 0;
}

#else

int cores_in_affinity_mask() {
  return int(std::thread::hardware_concurrency());
}

double cgroup_cores() {
  return 0;
}

#endif

} // namespace

int usable_cores() {
  const int cores = std::max(1, cores_in_affinity_mask());
  const double limit = cgroup_cores();
  return limit > 0 ? std::clamp(int(std::ceil(limit)), 1, cores) : cores;
}

} // namespace paged_mlx::cpu
