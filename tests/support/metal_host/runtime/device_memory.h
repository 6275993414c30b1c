// Device memory: every buffer alone in its own 4 GiB of reserved addresses, so
// that the address of an access says which buffer was meant, however wrong the
// index. Threadgroup memory lives in slots of the same arena.
#pragma once
#include <stdint.h>

#include "tables.h"

enum {
  kFirstThreadgroupSlot = kNumBuffers,
  // Slot of the `threadgroup` variables that kernels declare.
  kVariablesSlot = kFirstThreadgroupSlot + kNumThreadgroupBuffers,
  kNumSlots
};

struct Slot {
  char* base;
  uint64_t size;

  uint64_t offset_of(uint64_t address) const { return address - (uint64_t)base; }
  bool holds(uint64_t offset, uint64_t bytes) const { return offset <= size && bytes <= size - offset; }
  // Whether memory is there to absorb an access outside the bounds.
  bool is_slack(uint64_t offset, uint64_t bytes) const;
  uint64_t mapped;
};

extern Slot slots[kNumSlots];

// False when the addresses cannot be reserved.
bool reserve_arena();
// Slot of an address, -1 outside the arena.
int find_slot(uint64_t address);
// A slot of `size` bytes surrounded by ones (NaN in every float type); the
// bytes themselves are left as they were.
char* place_slot(int slot, uint64_t size);

// What the kernel is given for each [[buffer(n)]].
struct Bound {
  void* address;
  uint64_t size;
};
extern Bound bound[kNumBuffers];

void begin_device_launch();
void end_device_launch(); // unique bytes

// Checks and counts one access of the current thread to a device buffer.
void access_device(int slot, uint64_t address, uint32_t bytes, bool is_store, uint64_t pc);
void count_atomic(int slot, uint64_t address, uint32_t bytes, int kind, uint64_t pc);

// Lane-level loads of each simdgroup of the running threadgroup.
extern uint64_t simdgroup_load_ops[];
