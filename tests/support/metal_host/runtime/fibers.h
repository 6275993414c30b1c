// One fiber per Metal thread of the running threadgroup: its own stack, and a
// switch that saves the callee-saved registers. x86-64, System V.
#pragma once
#include <stdint.h>

#include "../include/metal_host/thread.h"
#include "coalescing.h"

enum { kMaxThreads = 1024, kLanes = 32, kMaxSimdgroups = kMaxThreads / kLanes };

enum FiberState { kRunnable, kAtSimdgroupMeeting, kAtThreadgroupBarrier, kReturned };

struct Fiber {
  void* stack_pointer;
  char* stack;
  FiberState state;
  uint64_t site; // where the meeting it waits at returns to
  MetalHostCombine combine;
  int meeting;
  int mem_flags;
  MetalHostThread thread;
  AccessLog log;
};

extern Fiber fibers[kMaxThreads];
extern Fiber* current; // null outside a launch
extern uint32_t running_threadgroup[3];
extern uint32_t running_threadgroup_index;
extern bool aborted;

void allocate_stacks();
bool is_stack_guard(const Fiber& fiber, uint64_t address);

// A fiber that will call `main` when first switched to.
void reset_fiber(int index, void (*main)());
// From outside into `first`, until leave_fibers().
void enter_fibers(Fiber* first);
void switch_fiber(Fiber* from, Fiber* to);
[[noreturn]] void leave_fibers();
// Ends the launch: the finding that was just reported leaves nothing to go on with.
[[noreturn]] void abort_launch();
