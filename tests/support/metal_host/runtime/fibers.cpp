#include "fibers.h"

#include <sys/mman.h>

namespace {

constexpr uint64_t kStackBytes = 256 << 10;
// Wide enough that no array of a kernel's reaches across it.
constexpr uint64_t kGuardBytes = 4 << 20;
// Stacks start at different offsets, or all of them would compete for the same
// cache sets.
constexpr uint64_t kColour = 1088;
constexpr uint64_t kColourMask = 0x7fc0;

void* outside;

} // namespace

Fiber fibers[kMaxThreads];
Fiber* current;
uint32_t running_threadgroup[3];
uint32_t running_threadgroup_index;
bool aborted;

// metal_host_switch(void** save, void* to), and where a new fiber starts: its
// function is in rbx.
extern "C" void metal_host_switch(void** save, void* to);
extern "C" void metal_host_start_fiber();
asm(R"(
.text
.globl metal_host_switch
.type metal_host_switch, @function
metal_host_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.globl metal_host_start_fiber
.type metal_host_start_fiber, @function
metal_host_start_fiber:
  xorl %ebp, %ebp
  call *%rbx
  ud2
)");

void allocate_stacks() {
  for (Fiber& fiber : fibers) {
    char* memory = (char*)mmap(nullptr, kStackBytes + kGuardBytes, PROT_NONE,
                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    fiber.stack = memory + kGuardBytes;
    mprotect(fiber.stack, kStackBytes, PROT_READ | PROT_WRITE);
  }
}

bool is_stack_guard(const Fiber& fiber, uint64_t address) {
  const uint64_t stack = (uint64_t)fiber.stack;
  return stack - kGuardBytes <= address && address < stack;
}

void reset_fiber(int index, void (*main)()) {
  Fiber& fiber = fibers[index];
  const uint64_t colour = index * kColour & kColourMask;
  uint64_t* top = (uint64_t*)(((uint64_t)fiber.stack + kStackBytes - 256 - colour) & ~63ull);
  *--top = 0;
  *--top = 0;
  *--top = (uint64_t)metal_host_start_fiber; // popped by `ret`
  *--top = 0;                                // rbp
  *--top = (uint64_t)main;                   // rbx
  for (int i = 0; i < 4; i++) *--top = 0;    // r12 to r15
  fiber.stack_pointer = top;
  fiber.state = kRunnable;
  fiber.log.count = 0;
}

void enter_fibers(Fiber* first) {
  current = first;
  metal_host_switch(&outside, first->stack_pointer);
  current = nullptr;
}

void switch_fiber(Fiber* from, Fiber* to) {
  current = to;
  if (from != to) metal_host_switch(&from->stack_pointer, to->stack_pointer);
}

void leave_fibers() {
  current = nullptr;
  void* abandoned;
  metal_host_switch(&abandoned, outside);
  __builtin_unreachable();
}

void abort_launch() {
  aborted = true;
  leave_fibers();
}
