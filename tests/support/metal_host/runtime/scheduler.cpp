#include "scheduler.h"

#include <stdlib.h>
#include <string.h>

#include "device_memory.h"
#include "fibers.h"
#include "options.h"
#include "threadgroup_memory.h"

namespace {

struct Simdgroup {
  uint32_t runnable; // lane masks
  uint32_t alive;
  int first; // fiber of lane 0
  int lanes;
  MetalHostRow rows[kLanes];

  uint32_t all_lanes() const { return lanes == kLanes ? ~0u : (1u << lanes) - 1; }
  Fiber& fiber(int lane) const { return fibers[first + lane]; }
};

Simdgroup simdgroups[kMaxSimdgroups];
int num_simdgroups;
int num_fibers;
void (*entry)(const MetalHostThread*);

Simdgroup& simdgroup_of(const Fiber& fiber) {
  return simdgroups[fiber.thread.simdgroup];
}

// One of the set bits, by the launch's order.
int pick(uint32_t mask) {
  if (options.order == kForward) return __builtin_ctz(mask);
  if (options.order == kReverse) return 31 - __builtin_clz(mask);
  options.order = (uint32_t)(options.order * 1664525u + 1013904223u) | kFirstSeed;
  for (uint32_t skip = (options.order >> 16) % __builtin_popcount(mask); skip; skip--) mask &= mask - 1;
  return __builtin_ctz(mask);
}

uint32_t simdgroups_with_work() {
  uint32_t mask = 0;
  for (int i = 0; i < num_simdgroups; i++) {
    if (simdgroups[i].runnable) mask |= 1u << i;
  }
  return mask;
}

void count_meeting(int kind) {
  LaunchCounters& counters = launch_counters;
  uint64_t* const by_kind[kNumMeetings] = {
      &counters.simdgroup_barriers, &counters.reduces,           &counters.shuffles,     &counters.scans,
      &counters.ballots,            &counters.matrix_multiplies, &counters.quad_reduces, &counters.quad_shuffles};
  ++*by_kind[kind];
}

// The waiting lanes of the place that comes first in the code.
uint32_t first_meeting(const Simdgroup& group) {
  uint64_t site = ~0ull;
  uint32_t lanes = 0;
  for (int lane = 0; lane < group.lanes; lane++) {
    const Fiber& fiber = group.fiber(lane);
    if (fiber.state != kAtSimdgroupMeeting || fiber.site > site) continue;
    if (fiber.site < site) lanes = 0;
    site = fiber.site;
    lanes |= 1u << lane;
  }
  return lanes;
}

void report_at(Fiber& fiber, FindingKind kind, uint64_t offset, uint64_t bytes, uint64_t other) {
  Fiber* const running = current;
  current = &fiber;
  report(kind, 0, offset, bytes, fiber.site, other);
  current = running;
}

// Lets the lanes of a meeting exchange what they brought and go on.
void hold_meeting(Simdgroup& group, uint32_t lanes) {
  Fiber& speaker = group.fiber(31 - __builtin_clz(lanes));
  if (lanes != group.all_lanes()) {
    launch_counters.partial_collectives++;
    report_at(speaker, kPartialCollective, lanes, __builtin_popcount(lanes), group.alive);
  }
  count_meeting(speaker.meeting);
  if (speaker.meeting != kMeetBarrier) {
    speaker.combine(group.rows, lanes);
  } else if (speaker.mem_flags & kMemThreadgroup) {
    order_simdgroup(speaker.thread.simdgroup);
  }
  for (uint32_t rest = lanes; rest; rest &= rest - 1) group.fiber(__builtin_ctz(rest)).state = kRunnable;
  group.runnable |= lanes;
}

// All that still run are at a threadgroup barrier: opens it. False: none are left.
bool open_barrier() {
  Fiber* speaker = nullptr;
  bool same_site = true;
  int returned = 0;
  for (int i = 0; i < num_fibers; i++) {
    Fiber& fiber = fibers[i];
    if (fiber.state == kReturned) returned++;
    if (fiber.state != kAtThreadgroupBarrier) continue;
    if (!speaker) speaker = &fiber;
    same_site = same_site && fiber.site == speaker->site;
  }
  if (!speaker) return false;
  if (!same_site) report_at(*speaker, kDivergentBarrier, 0, 0, 0);
  if (returned) report_at(*speaker, kBarrierAfterReturn, returned, 0, 0);
  launch_counters.threadgroup_barriers++;
  if (speaker->mem_flags & kMemThreadgroup) order_threadgroup();
  for (int i = 0; i < num_fibers; i++) {
    Fiber& fiber = fibers[i];
    if (fiber.state != kAtThreadgroupBarrier) continue;
    fiber.state = kRunnable;
    simdgroup_of(fiber).runnable |= 1u << fiber.thread.lane;
  }
  return true;
}

// The current fiber waits or has returned: on to another, which may be itself.
void reschedule() {
  Fiber* const me = current;
  Simdgroup* group = &simdgroup_of(*me);
  for (;;) {
    if (group->runnable) {
      switch_fiber(me, &group->fiber(pick(group->runnable)));
      return;
    }
    if (options.trace) count_accesses(group->first, group->lanes);
    if (const uint32_t lanes = first_meeting(*group)) {
      hold_meeting(*group, lanes);
      continue;
    }
    if (!simdgroups_with_work() && !open_barrier()) leave_fibers();
    group = &simdgroups[pick(simdgroups_with_work())];
  }
}

void wait_for_others(FiberState state, uint64_t site) {
  current->state = state;
  current->site = site;
  simdgroup_of(*current).runnable &= ~(1u << current->thread.lane);
  reschedule();
}

void fiber_main() {
  entry(&current->thread);
  Simdgroup& group = simdgroup_of(*current);
  group.alive &= ~(1u << current->thread.lane);
  wait_for_others(kReturned, 0);
  abort();
}

} // namespace

uint64_t simdgroup_load_ops[kMaxSimdgroups];

void run_threadgroup(int num_threads, void (*kernel)(const MetalHostThread*)) {
  entry = kernel;
  num_fibers = num_threads;
  num_simdgroups = (num_threads + kLanes - 1) / kLanes;
  memset(simdgroup_load_ops, 0, sizeof simdgroup_load_ops);
  for (int i = 0; i < num_simdgroups; i++) {
    Simdgroup& group = simdgroups[i];
    group.first = i * kLanes;
    group.lanes = num_threads - group.first < kLanes ? num_threads - group.first : kLanes;
    group.alive = group.runnable = group.all_lanes();
  }
  for (int i = 0; i < num_threads; i++) reset_fiber(i, fiber_main);
  const Simdgroup& first = simdgroups[pick(simdgroups_with_work())];
  enter_fibers(&first.fiber(pick(first.runnable)));
  for (uint64_t loads : simdgroup_load_ops) {
    if (loads > launch_counters.most_loads_in_a_simdgroup) launch_counters.most_loads_in_a_simdgroup = loads;
  }
}

// The entry points that kernels call; see include/metal_host/thread.h.
METAL_HOST_EXPORT METAL_HOST_MEETING void metal_host_collective(MetalHostCombine combine, void* row, int in_bytes,
                                                               int out_bytes, int kind) {
  const uint64_t site = (uint64_t)__builtin_return_address(0);
  char* const mine = simdgroup_of(*current).rows[current->thread.lane];
  memcpy(mine, row, in_bytes);
  current->combine = combine;
  current->meeting = kind;
  wait_for_others(kAtSimdgroupMeeting, site);
  memcpy(row, mine, out_bytes);
}

METAL_HOST_EXPORT METAL_HOST_MEETING void metal_host_simdgroup_barrier(int mem_flags) {
  const uint64_t site = (uint64_t)__builtin_return_address(0);
  current->meeting = kMeetBarrier;
  current->mem_flags = mem_flags;
  wait_for_others(kAtSimdgroupMeeting, site);
}

METAL_HOST_EXPORT METAL_HOST_MEETING void metal_host_threadgroup_barrier(int mem_flags) {
  const uint64_t site = (uint64_t)__builtin_return_address(0);
  current->mem_flags = mem_flags;
  wait_for_others(kAtThreadgroupBarrier, site);
}

METAL_HOST_EXPORT unsigned metal_host_lane() {
  return current->thread.lane;
}

METAL_HOST_EXPORT unsigned metal_host_active_lanes() {
  return simdgroup_of(*current).alive;
}
