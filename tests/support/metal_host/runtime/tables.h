// Every row of numbers that the runtime exchanges with Python. A row is a list
// of uint64; the names travel with the numbers, so the lists below are the only
// place where a counter or a field is named.
#pragma once
#include <stdint.h>

enum { kNumBuffers = 31, kNumThreadgroupBuffers = 8 };

// Per buffer. An op is one access of one lane. A simdgroup load is the accesses
// of a simdgroup's lanes at one place of the code; segments are the distinct
// aligned 32 or 128 bytes that it touches. "merged" counts the same after
// joining a lane's adjacent accesses up to 16 bytes.
#define METAL_HOST_BUFFER_COUNTERS(X)                                          \
  X(load_bytes) X(load_ops) X(store_bytes) X(store_ops) X(atomics)             \
  X(simdgroup_loads) X(load_segments_32) X(load_segments_128)                  \
  X(simdgroup_stores) X(store_segments_32) X(store_segments_128)               \
  X(merged_loads) X(merged_load_segments_32) X(merged_load_segments_128)       \
  X(merged_stores) X(merged_store_segments_32) X(merged_store_segments_128)    \
  X(threadgroup_segments_32) /* distinct in a threadgroup, summed over them */ \
  X(unique_load_bytes) X(unique_store_bytes)                                   \
  X(out_of_range) X(forbidden) X(overwrites)

#define METAL_HOST_LAUNCH_COUNTERS(X)                                          \
  X(threadgroups) X(simdgroups) X(threads)                                     \
  X(threadgroup_barriers) X(simdgroup_barriers)                                \
  X(reduces) X(shuffles) X(scans) X(ballots) X(matrix_multiplies)              \
  X(quad_reduces) X(quad_shuffles) X(partial_collectives)                      \
  X(threadgroup_load_bytes) X(threadgroup_load_ops)                            \
  X(threadgroup_store_bytes) X(threadgroup_store_ops)                          \
  X(threadgroup_memory_bytes) X(most_loads_in_a_simdgroup) X(private_ops)

#define METAL_HOST_FINDING_FIELDS(X)                                           \
  X(kind) X(buffer) X(offset) X(bytes) X(thread) X(other) X(count)             \
  X(threadgroup_x) X(threadgroup_y) X(threadgroup_z) X(pc) X(other_pc)

// Device traffic of one place of the code.
#define METAL_HOST_PLACE_FIELDS(X)                                             \
  X(pc) X(buffer) X(is_store) X(bytes) X(ops) X(simdgroup_ops)                 \
  X(segments_32) X(segments_128)

#define METAL_HOST_LAUNCH_ARGUMENTS(X)                                         \
  X(entry) X(code_base) X(threadgroup_begin) X(threadgroup_end)                \
  X(grid_x) X(grid_y) X(grid_z) X(group_x) X(group_y) X(group_z)               \
  X(threadgroup_bytes_0) X(threadgroup_bytes_1) X(threadgroup_bytes_2)         \
  X(threadgroup_bytes_3) X(threadgroup_bytes_4) X(threadgroup_bytes_5)         \
  X(threadgroup_bytes_6) X(threadgroup_bytes_7)                                \
  X(order) X(trace) X(race) X(flush_denormals) X(ulp)

#define METAL_HOST_FIELD(name) uint64_t name;
struct BufferCounters { METAL_HOST_BUFFER_COUNTERS(METAL_HOST_FIELD) };
struct LaunchCounters { METAL_HOST_LAUNCH_COUNTERS(METAL_HOST_FIELD) };
struct Finding { METAL_HOST_FINDING_FIELDS(METAL_HOST_FIELD) };
struct Place { METAL_HOST_PLACE_FIELDS(METAL_HOST_FIELD) };
struct LaunchArguments { METAL_HOST_LAUNCH_ARGUMENTS(METAL_HOST_FIELD) };
#undef METAL_HOST_FIELD

extern BufferCounters buffer_counters[kNumBuffers];
extern LaunchCounters launch_counters;

// What can be found: whether the launch counts as failed, how it is called, and
// what its fields are about (result.py writes the details from that).
#define METAL_HOST_FINDINGS(X)                                                         \
  X(kOutOfRangeLoad, true, "out-of-range load", "device")                              \
  X(kOutOfRangeStore, true, "out-of-range store", "device")                            \
  X(kForbiddenLoad, true, "forbidden load", "device")                                  \
  X(kForbiddenStore, true, "forbidden store", "device")                                \
  X(kOverwrite, false, "two threadgroups store to the same address", "device")         \
  X(kThreadgroupRace, true, "threadgroup data race", "race")                           \
  X(kSimdgroupRace, false, "race inside a simdgroup", "race")                          \
  X(kUninitialised, true, "read of uninitialised threadgroup memory", "threadgroup")   \
  X(kThreadgroupOutOfRange, true, "threadgroup memory out of range", "threadgroup")    \
  X(kDivergentBarrier, true, "divergent threadgroup_barrier", "place")                 \
  X(kBarrierAfterReturn, false, "threadgroup_barrier after threads returned", "count") \
  X(kPartialCollective, false, "simdgroup function not reached by every lane", "lanes") \
  X(kWildAccess, true, "wild access", "address")                                       \
  X(kStackOverflow, true, "thread stack overflow", "address")

enum FindingKind {
#define METAL_HOST_ENUMERATOR(name, fatal, text, about) name,
  METAL_HOST_FINDINGS(METAL_HOST_ENUMERATOR)
#undef METAL_HOST_ENUMERATOR
  kNumFindingKinds
};

// Adds a finding at `pc`, or counts it when it is known from there.
// buffer: a buffer slot or a threadgroup slot; other: a thread, a lane mask or a
// threadgroup, by kind.
void report(FindingKind kind, int buffer, uint64_t offset, uint64_t bytes, uint64_t pc, uint64_t other = 0,
            uint64_t other_pc = 0);
void clear_findings();

#define METAL_HOST_EXPORT extern "C" __attribute__((visibility("default")))
