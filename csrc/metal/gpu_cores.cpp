#include "metal/gpu_cores.h"

#ifdef _METAL_
#include <CoreFoundation/CoreFoundation.h>
#include <IOKit/IOKitLib.h>

#include "mlx/backend/metal/device.h"
#include "mlx/device.h"
#endif

namespace paged_mlx::metal {

namespace {

struct SizeOfChip {
  char letter;
  int cores;
};

// The smaller variants: too few work items cost less than too many.
constexpr SizeOfChip kSizes[] = {
    {'p', 5},             // phones
    {'g', 8},             // plain chips; a Pro has some 16
    {'s', 30},            // Max
    {'c', 30}, {'d', 60}, // Ultra
};
constexpr int kUnknownCores = 8;

#ifdef _METAL_
int registry_cores() {
  const io_service_t gpu =
      IOServiceGetMatchingService(MACH_PORT_NULL, IOServiceMatching("AGXAccelerator"));
  if (!gpu) {
    return 0;
  }
  int cores = 0;
  const CFTypeRef value =
      IORegistryEntryCreateCFProperty(gpu, CFSTR("gpu-core-count"), kCFAllocatorDefault, 0);
  if (value) {
    if (CFGetTypeID(value) == CFNumberGetTypeID()) {
      CFNumberGetValue(static_cast<CFNumberRef>(value), kCFNumberIntType, &cores);
    }
    CFRelease(value);
  }
  IOObjectRelease(gpu);
  return cores;
}
#endif

} // namespace

int cores_of_architecture(const std::string& architecture) {
  for (const SizeOfChip& size : kSizes) {
    if (!architecture.empty() && architecture.back() == size.letter) {
      return size.cores;
    }
  }
  return kUnknownCores;
}

int gpu_cores() {
#ifdef _METAL_
  static const int cores = [] {
    const int counted = registry_cores();
    const auto gpu = mlx::core::Device(mlx::core::Device::gpu);
    return counted > 0 ? counted
                       : cores_of_architecture(mlx::core::metal::device(gpu).get_architecture());
  }();
  return cores;
#else
  return 0;
#endif
}

} // namespace paged_mlx::metal
