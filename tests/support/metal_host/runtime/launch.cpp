// A launch: every threadgroup of the grid in turn, and the calls by which the
// instrumented code of a kernel announces its accesses.
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <xmmintrin.h>

#include "coalescing.h"
#include "device_memory.h"
#include "fibers.h"
#include "options.h"
#include "scheduler.h"
#include "threadgroup_memory.h"

typedef void (*Kernel)(const MetalHostThread*);

Options options;

namespace {

constexpr unsigned kFlushDenormals = 0x8040; // FTZ and DAZ
constexpr int kSignals[] = {SIGSEGV, SIGBUS};

// While it lives, a wild access of a fiber ends the launch, not the process.
class SignalGuard {
public:
  SignalGuard() {
    static char* const stack = (char*)malloc(kStackBytes);
    stack_t alternate = {};
    alternate.ss_sp = stack;
    alternate.ss_size = kStackBytes;
    sigaltstack(&alternate, &old_stack_);
    struct sigaction action = {};
    action.sa_sigaction = handle;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    for (int i = 0; i < 2; i++) sigaction(kSignals[i], &action, &old_[i]);
  }
  ~SignalGuard() {
    for (int i = 0; i < 2; i++) sigaction(kSignals[i], &old_[i], nullptr);
    sigaltstack(&old_stack_, nullptr);
  }

private:
  enum { kStackBytes = 64 << 10 };

  static void handle(int signal_number, siginfo_t* info, void*) {
    if (!current) {
      signal(signal_number, SIG_DFL);
      return;
    }
    const uint64_t address = (uint64_t)info->si_addr;
    report(is_stack_guard(*current, address) ? kStackOverflow : kWildAccess, 0, address, 0, 0);
    sigset_t signals;
    sigemptyset(&signals);
    sigaddset(&signals, signal_number);
    sigprocmask(SIG_UNBLOCK, &signals, nullptr);
    abort_launch();
  }

  stack_t old_stack_;
  struct sigaction old_[2];
};

class DenormalGuard {
public:
  explicit DenormalGuard(bool flush) : old_(_mm_getcsr()) {
    if (flush) _mm_setcsr(old_ | kFlushDenormals);
  }
  ~DenormalGuard() { _mm_setcsr(old_); }

private:
  unsigned old_;
};

struct Grid {
  uint32_t threads[3];
  uint32_t group[3];
  uint32_t groups[3];

  explicit Grid(const LaunchArguments& a)
      : threads{(uint32_t)a.grid_x, (uint32_t)a.grid_y, (uint32_t)a.grid_z},
        group{(uint32_t)a.group_x, (uint32_t)a.group_y, (uint32_t)a.group_z} {
    for (int d = 0; d < 3; d++) groups[d] = (threads[d] + group[d] - 1) / group[d];
  }
  uint64_t num_groups() const { return (uint64_t)groups[0] * groups[1] * groups[2]; }
};

void* buffer_pointers[kNumBuffers];
void* threadgroup_pointers[kNumThreadgroupBuffers];

void bind_pointers() {
  for (int i = 0; i < kNumBuffers; i++) buffer_pointers[i] = bound[i].address;
  for (int i = 0; i < kNumThreadgroupBuffers; i++) threadgroup_pointers[i] = threadgroup_buffer(i);
}

// Puts the threads of a threadgroup in their places; returns how many there
// are (fewer at the ragged edge of a grid of threads).
int place_threads(const Grid& grid, const uint32_t position[3]) {
  uint32_t size[3];
  for (int d = 0; d < 3; d++) {
    const uint32_t left = grid.threads[d] - position[d] * grid.group[d];
    size[d] = left < grid.group[d] ? left : grid.group[d];
  }
  const int count = size[0] * size[1] * size[2];
  for (int i = 0; i < count; i++) {
    MetalHostThread& thread = fibers[i].thread;
    const uint32_t inside[3] = {i % size[0], i / size[0] % size[1], i / size[0] / size[1]};
    for (int d = 0; d < 3; d++) {
      thread.position_in_grid[d] = position[d] * grid.group[d] + inside[d];
      thread.position_in_threadgroup[d] = inside[d];
      thread.threadgroup_position[d] = position[d];
      thread.threads_per_threadgroup[d] = size[d];
      thread.threadgroups_per_grid[d] = grid.groups[d];
      thread.threads_per_grid[d] = grid.threads[d];
    }
    thread.index_in_threadgroup = i;
    thread.lane = i % kLanes;
    thread.simdgroup = i / kLanes;
    thread.num_simdgroups = (count + kLanes - 1) / kLanes;
    thread.buffers = buffer_pointers;
    thread.threadgroup_memory = threadgroup_pointers;
  }
  return count;
}

void run_grid(const Grid& grid, Kernel kernel) {
  for (uint64_t index = 0; index < grid.num_groups() && !aborted; index++) {
    const uint32_t position[3] = {(uint32_t)(index % grid.groups[0]),
                                  (uint32_t)(index / grid.groups[0] % grid.groups[1]),
                                  (uint32_t)(index / grid.groups[0] / grid.groups[1])};
    memcpy(running_threadgroup, position, sizeof position);
    running_threadgroup_index = (uint32_t)index;
    const int threads = place_threads(grid, position);
    launch_counters.threadgroups++;
    launch_counters.threads += threads;
    launch_counters.simdgroups += (threads + kLanes - 1) / kLanes;
    begin_threadgroup();
    run_threadgroup(threads, kernel);
  }
}

// Where every access of instrumented code arrives.
inline void on_access(uint64_t address, uint64_t bytes, bool is_store, void* from) {
  if (!current) return;
  const int slot = find_slot(address);
  if (slot < 0) {
    launch_counters.private_ops++;
  } else if (slot < kNumBuffers) {
    access_device(slot, address, (uint32_t)bytes, is_store, (uint64_t)from);
  } else {
    access_threadgroup(slot, address, (uint32_t)bytes, is_store, (uint64_t)from);
  }
}

} // namespace

METAL_HOST_EXPORT int metal_host_start() {
  allocate_stacks();
  return reserve_arena();
}

// Runs what metal_host_bind bound. Returns 0 when the launch was cut short.
METAL_HOST_EXPORT int metal_host_launch(const LaunchArguments* arguments) {
  options = {arguments->order, arguments->trace != 0, arguments->race != 0, (uint32_t)arguments->ulp,
             arguments->code_base};
  aborted = false;
  memset(&launch_counters, 0, sizeof launch_counters);
  clear_findings();
  clear_places();
  begin_device_launch();
  begin_threadgroup_launch(&arguments->threadgroup_bytes_0, arguments->threadgroup_begin,
                           arguments->threadgroup_end);
  bind_pointers();
  {
    SignalGuard signals;
    DenormalGuard denormals(arguments->flush_denormals != 0);
    run_grid(Grid(*arguments), (Kernel)arguments->entry);
  }
  end_device_launch();
  return !aborted;
}

METAL_HOST_EXPORT void metal_host_atomic(const volatile void* address, int bytes, int kind) {
  const uint64_t pc = (uint64_t)__builtin_return_address(0);
  const int slot = find_slot((uint64_t)address);
  if (slot < 0) return;
  if (slot < kNumBuffers) {
    count_atomic(slot, (uint64_t)address, bytes, kind, pc);
  } else if (kind != kAtomicLoad) {
    mark_atomic_store(slot, (uint64_t)address, bytes);
  }
}

// The names by which the compiler's kernel address sanitizer calls.
#define METAL_HOST_ACCESSES(bytes)                                     \
  METAL_HOST_EXPORT void __asan_load##bytes##_noabort(uint64_t at) {   \
    on_access(at, bytes, false, __builtin_return_address(0));          \
  }                                                                    \
  METAL_HOST_EXPORT void __asan_store##bytes##_noabort(uint64_t at) {  \
    on_access(at, bytes, true, __builtin_return_address(0));           \
  }
METAL_HOST_ACCESSES(1)
METAL_HOST_ACCESSES(2)
METAL_HOST_ACCESSES(4)
METAL_HOST_ACCESSES(8)
METAL_HOST_ACCESSES(16)

METAL_HOST_EXPORT void __asan_loadN_noabort(uint64_t at, uint64_t bytes) {
  on_access(at, bytes, false, __builtin_return_address(0));
}
METAL_HOST_EXPORT void __asan_storeN_noabort(uint64_t at, uint64_t bytes) {
  on_access(at, bytes, true, __builtin_return_address(0));
}
METAL_HOST_EXPORT void __asan_handle_no_return() {}

METAL_HOST_EXPORT void* __asan_memcpy(void* to, const void* from, size_t bytes) {
  on_access((uint64_t)from, bytes, false, __builtin_return_address(0));
  on_access((uint64_t)to, bytes, true, __builtin_return_address(0));
  return memcpy(to, from, bytes);
}
METAL_HOST_EXPORT void* __asan_memmove(void* to, const void* from, size_t bytes) {
  on_access((uint64_t)from, bytes, false, __builtin_return_address(0));
  on_access((uint64_t)to, bytes, true, __builtin_return_address(0));
  return memmove(to, from, bytes);
}
METAL_HOST_EXPORT void* __asan_memset(void* to, int value, size_t bytes) {
  on_access((uint64_t)to, bytes, true, __builtin_return_address(0));
  return memset(to, value, bytes);
}
