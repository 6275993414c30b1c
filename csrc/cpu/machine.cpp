#include "cpu/machine.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <set>
#include <string>
#include <thread>

#if defined(__linux__)
#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace paged_mlx::cpu {

namespace {

#if defined(__linux__)

// Advises the system on the units of memory that lie wholly in [begin, begin + bytes).
void advise(void* begin, size_t bytes, size_t unit, int advice) {
  const auto at = reinterpret_cast<uintptr_t>(begin);
  const uintptr_t first = (at + unit - 1) / unit * unit;
  const uintptr_t end = (at + bytes) / unit * unit;
  if (first < end) {
    madvise(reinterpret_cast<void*>(first), end - first, advice);
  }
}

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
    std::ifstream file("/sys/devices/system/cpu/cpu" + std::to_string(cpu) +
                       "/topology/thread_siblings_list");
    std::string siblings;
    cores.insert(std::getline(file, siblings) ? siblings : std::to_string(cpu));
  }
  return int(cores.size());
}

// Cores' worth of time in a quota and its period, in microseconds; 0: no limit.
double cores_of(const std::string& quota, double period) {
  const double microseconds = quota == "max" ? -1 : std::strtod(quota.c_str(), nullptr);
  return microseconds > 0 && period > 0 ? microseconds / period : 0;
}

// The least that the cgroup of this process, or one that it is in, grants. `path`
// begins with a slash, `read` tells what the cgroup in a folder grants.
template <typename Read>
double least_of_cgroups(const std::string& root, std::string path, Read read) {
  double least = 0;
  for (;;) {
    const double cores = read(root + path);
    if (cores > 0 && (least == 0 || cores < least)) {
      least = cores;
    }
    if (path.empty() || path == "/") {
      return least;
    }
    path.erase(path.rfind('/'));
  }
}

// Cores' worth of time that the cgroups grant, 0 when they set no limit.
double cgroup_cores() {
  double least = 0;
  std::ifstream groups("/proc/self/cgroup"); // hierarchy:controllers:path
  for (std::string line; std::getline(groups, line);) {
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (second == std::string::npos) {
      continue;
    }
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const std::string path = line.substr(second + 1);
    double cores = 0;
    if (controllers.empty()) { // version 2
      cores = least_of_cgroups("/sys/fs/cgroup", path, [](const std::string& folder) {
        std::ifstream file(folder + "/cpu.max");
        std::string quota;
        double period = 0;
        return file >> quota >> period ? cores_of(quota, period) : 0;
      });
    } else if (("," + controllers + ",").find(",cpu,") != std::string::npos) {
      cores = least_of_cgroups("/sys/fs/cgroup/cpu", path, [](const std::string& folder) {
        std::ifstream quota_file(folder + "/cpu.cfs_quota_us");
        std::ifstream period_file(folder + "/cpu.cfs_period_us");
        std::string quota;
        double period = 0;
        return quota_file >> quota && period_file >> period ? cores_of(quota, period) : 0;
      });
    }
    if (cores > 0 && (least == 0 || cores < least)) {
      least = cores;
    }
  }
  return least;
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

void use_huge_pages(void* begin, size_t bytes) {
#if defined(__linux__)
  advise(begin, bytes, kHugePage, MADV_HUGEPAGE);
#else
  (void)begin;
  (void)bytes;
#endif
}

void give_back(void* begin, size_t bytes) {
#if defined(__linux__)
  advise(begin, bytes, size_t(sysconf(_SC_PAGESIZE)), MADV_DONTNEED);
#else
  (void)begin;
  (void)bytes;
#endif
}

} // namespace paged_mlx::cpu
