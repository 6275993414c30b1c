#include "threadgroup_memory.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "device_memory.h"
#include "fibers.h"
#include "options.h"

namespace {

enum : uint16_t { kAtomicWriter = 0xffff };

// An epoch is a stretch between two threadgroup barriers; a step, between two
// points that order the lanes of a simdgroup. Both only ever grow, so a shadow
// needs no clearing.
struct Shadow {
  uint32_t write_epoch;
  uint32_t write_step;
  uint32_t write_pc; // from the start of the code
  uint32_t read_epoch;
  uint32_t read_step;
  uint16_t writer;
  uint16_t reader;
  uint16_t earlier_reader; // of another simdgroup than reader, where there is one
};

struct Region {
  Shadow* shadow;
  uint64_t capacity;
};

Region regions[kNumSlots - kFirstThreadgroupSlot];
uint32_t epoch;
uint32_t first_epoch; // of the running threadgroup
uint32_t last_step;
uint32_t step[kMaxSimdgroups];

// Variables of the kernel sit in the slot as they do in their section. A byte
// belongs to a variable once the variable was reached.
uint64_t section_begin;
uint8_t* is_variable;
uint64_t is_variable_capacity;

Region& region_of(int slot) {
  return regions[slot - kFirstThreadgroupSlot];
}

void place_region(int slot, uint64_t bytes) {
  place_slot(slot, bytes);
  Region& region = region_of(slot);
  if (bytes <= region.capacity) return;
  free(region.shadow);
  region.shadow = (Shadow*)calloc(bytes, sizeof(Shadow));
  region.capacity = bytes;
}

int simdgroup_of(uint16_t thread) {
  return thread / kLanes;
}

// One lane's view of one byte. Each method returns the thread it conflicts with
// and whether that is in its own simdgroup.
struct Conflict {
  bool found;
  bool same_simdgroup;
  uint16_t other;
  uint64_t other_pc;
};

Conflict conflict_with_writer(const Shadow& byte, uint16_t me) {
  if (byte.write_epoch != epoch || byte.writer == me || byte.writer == kAtomicWriter) return {};
  const uint64_t pc = options.code_base + byte.write_pc;
  if (simdgroup_of(byte.writer) != simdgroup_of(me)) return {true, false, byte.writer, pc};
  if (byte.write_step == step[simdgroup_of(me)]) return {true, true, byte.writer, pc};
  return {};
}

Conflict conflict_with_reader(const Shadow& byte, uint16_t me) {
  if (byte.read_epoch != epoch) return {};
  const bool reader_is_mine = simdgroup_of(byte.reader) == simdgroup_of(me);
  const uint16_t stranger = reader_is_mine ? byte.earlier_reader : byte.reader;
  if (simdgroup_of(stranger) != simdgroup_of(me)) return {true, false, stranger, 0};
  if (byte.reader != me && byte.read_step == step[simdgroup_of(me)]) return {true, true, byte.reader, 0};
  return {};
}

void report_conflict(const Conflict& conflict, int slot, uint64_t offset, uint32_t bytes, uint64_t pc) {
  if (!conflict.found) return;
  const FindingKind kind = conflict.same_simdgroup ? kSimdgroupRace : kThreadgroupRace;
  report(kind, slot, offset, bytes, pc, conflict.other, conflict.other_pc);
}

void note_read(Shadow& byte, uint16_t me) {
  if (byte.read_epoch != epoch) {
    byte.earlier_reader = me;
  } else if (simdgroup_of(byte.reader) != simdgroup_of(me)) {
    byte.earlier_reader = byte.reader;
  }
  byte.read_epoch = epoch;
  byte.reader = me;
  byte.read_step = step[simdgroup_of(me)];
}

void note_write(Shadow& byte, uint16_t me, uint64_t pc) {
  byte.write_epoch = epoch;
  byte.writer = me;
  byte.write_step = step[simdgroup_of(me)];
  byte.write_pc = (uint32_t)(pc - options.code_base);
}

// The first byte speaks for the access.
void watch(int slot, uint64_t offset, uint32_t bytes, bool is_store, uint64_t pc) {
  const uint16_t me = (uint16_t)current->thread.index_in_threadgroup;
  Shadow* shadow = region_of(slot).shadow + offset;
  if (is_store) {
    report_conflict(conflict_with_writer(*shadow, me), slot, offset, bytes, pc);
    report_conflict(conflict_with_reader(*shadow, me), slot, offset, bytes, pc);
    for (uint32_t i = 0; i < bytes; i++) note_write(shadow[i], me, pc);
    return;
  }
  if (shadow->write_epoch < first_epoch) {
    report(kUninitialised, slot, offset, bytes, pc);
  } else {
    report_conflict(conflict_with_writer(*shadow, me), slot, offset, bytes, pc);
  }
  for (uint32_t i = 0; i < bytes; i++) note_read(shadow[i], me);
}

} // namespace

void begin_threadgroup_launch(const uint64_t* buffer_bytes, uint64_t variables_begin, uint64_t variables_end) {
  for (int i = 0; i < kNumThreadgroupBuffers; i++) place_region(kFirstThreadgroupSlot + i, buffer_bytes[i]);
  section_begin = variables_begin & ~63ull;
  const uint64_t bytes = variables_begin ? variables_end - section_begin : 0;
  place_region(kVariablesSlot, bytes);
  if (bytes > is_variable_capacity) {
    free(is_variable);
    is_variable = (uint8_t*)malloc(bytes);
    is_variable_capacity = bytes;
  }
  if (bytes) memset(is_variable, 0, bytes);
}

void begin_threadgroup() {
  for (int slot = kFirstThreadgroupSlot; slot < kNumSlots; slot++) {
    if (slots[slot].size) memset(slots[slot].base, 0xff, slots[slot].size);
  }
  first_epoch = ++epoch;
  for (int i = 0; i < kMaxSimdgroups; i++) order_simdgroup(i);
}

void order_threadgroup() {
  epoch++;
  for (int i = 0; i < kMaxSimdgroups; i++) order_simdgroup(i);
}

void order_simdgroup(int simdgroup) {
  step[simdgroup] = ++last_step;
}

void* threadgroup_buffer(int index) {
  return slots[kFirstThreadgroupSlot + index].base;
}

void access_threadgroup(int slot, uint64_t address, uint32_t bytes, bool is_store, uint64_t pc) {
  const uint64_t offset = slots[slot].offset_of(address);
  bool inside = slots[slot].holds(offset, bytes);
  if (inside && slot == kVariablesSlot) inside = is_variable[offset] && is_variable[offset + bytes - 1];
  if (!inside) {
    report(kThreadgroupOutOfRange, slot, offset, bytes, pc);
    if (!slots[slot].is_slack(offset, bytes)) abort_launch();
    return;
  }
  if (is_store) {
    launch_counters.threadgroup_store_bytes += bytes;
    launch_counters.threadgroup_store_ops++;
  } else {
    launch_counters.threadgroup_load_bytes += bytes;
    launch_counters.threadgroup_load_ops++;
  }
  if (options.race) watch(slot, offset, bytes, is_store, pc);
}

void mark_atomic_store(int slot, uint64_t address, uint32_t bytes) {
  const uint64_t offset = slots[slot].offset_of(address);
  if (!slots[slot].holds(offset, bytes)) return;
  for (uint32_t i = 0; i < bytes; i++) {
    Shadow& byte = region_of(slot).shadow[offset + i];
    byte.write_epoch = epoch;
    byte.writer = kAtomicWriter;
  }
}

METAL_HOST_EXPORT void* metal_host_threadgroup_variable(void* variable, unsigned long bytes) {
  const uint64_t offset = (uint64_t)variable - section_begin;
  if (!is_variable[offset]) {
    memset(is_variable + offset, 1, bytes);
    launch_counters.threadgroup_memory_bytes += bytes;
  }
  return slots[kVariablesSlot].base + offset;
}
