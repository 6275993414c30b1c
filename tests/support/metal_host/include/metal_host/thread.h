// What a kernel and the runtime say to each other. Included by both, so it
// includes nothing.
#ifndef METAL_HOST_THREAD_H
#define METAL_HOST_THREAD_H

// Where one Metal thread stands, and what is bound.
struct MetalHostThread {
  unsigned position_in_grid[3];
  unsigned position_in_threadgroup[3];
  unsigned threadgroup_position[3];
  unsigned threads_per_threadgroup[3];
  unsigned threadgroups_per_grid[3];
  unsigned threads_per_grid[3];
  unsigned index_in_threadgroup;
  unsigned lane;
  unsigned simdgroup;
  unsigned num_simdgroups;
  void** buffers;            // by [[buffer(n)]]
  void** threadgroup_memory; // by [[threadgroup(n)]]
};

// A collective: every lane leaves its argument in its row, one call combines
// the rows of the lanes in `mask`, every lane takes its row back.
enum { kMetalHostRowBytes = 128 };
#ifndef METAL_HOST_ADDRESS_SPACES
typedef char MetalHostRow[kMetalHostRowBytes];
typedef void (*MetalHostCombine)(MetalHostRow* rows, unsigned mask);
#endif

// Kinds of meetings of a simdgroup; the runtime counts them apart.
enum MetalHostMeeting {
  kMeetBarrier,
  kMeetReduce,
  kMeetShuffle,
  kMeetScan,
  kMeetBallot,
  kMeetMultiply,
  kMeetQuadReduce,
  kMeetQuadShuffle,
  kNumMeetings
};

enum { kMemThreadgroup = 2 }; // mem_flags::mem_threadgroup
enum MetalHostAtomic { kAtomicLoad, kAtomicStore, kAtomicUpdate };

// Entry points of the runtime. A meeting is known by the address it returns to,
// so each must stay one call in the kernel's code.
#ifdef METAL_HOST_OPAQUE
#define METAL_HOST_MEETING __attribute__((noinline, convergent))
#else
#define METAL_HOST_MEETING __attribute__((noinline, convergent, noduplicate))
#endif
extern "C" {
#ifndef METAL_HOST_ADDRESS_SPACES
METAL_HOST_MEETING void metal_host_collective(MetalHostCombine combine, void* row, int in_bytes, int out_bytes, int kind);
#endif
METAL_HOST_MEETING void metal_host_simdgroup_barrier(int mem_flags);
METAL_HOST_MEETING void metal_host_threadgroup_barrier(int mem_flags);
unsigned metal_host_lane();
unsigned metal_host_active_lanes();
void metal_host_atomic(const volatile void* address, int bytes, int kind);
// The place in the threadgroup arena of a `threadgroup` variable of a kernel.
void* metal_host_threadgroup_variable(void* variable, unsigned long bytes);
// Whether buffer `index` holds `bytes`; reports it when not.
int metal_host_holds(int index, unsigned long bytes);
}

#endif
