#include "device_memory.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "coalescing.h"
#include "fibers.h"
#include "options.h"

namespace {

constexpr uint64_t kSlotBytes = 1ull << 32;
constexpr uint64_t kSlotMiddle = kSlotBytes / 2;
constexpr uint64_t kArenaBytes = kSlotBytes * kNumSlots;
constexpr uint64_t kSlackBytes = 64 << 10;
constexpr uint64_t kPageBytes = 4096;
constexpr uint64_t kKeptBytes = 64 << 20; // a larger slot is given back when it is emptied

enum ByteFlag : uint8_t { kLoaded = 1, kStored = 2, kNoLoad = 4, kNoStore = 8 };

struct Range {
  uint64_t begin = ~0ull;
  uint64_t end = 0;

  void add(uint64_t from, uint64_t to) {
    if (from < begin) begin = from;
    if (to > end) end = to;
  }
};

// What is known of the bytes of a buffer. Only `touched` may differ from zero.
struct Record {
  uint8_t* flags;         // per byte
  uint32_t* last_storer;  // per byte: threadgroup + 1 of an access's first byte
  uint32_t* last_loader;  // per 32 bytes: threadgroup + 1
  uint64_t capacity;
  Range touched;
  Range stored;
};

char* arena;
Record records[kNumBuffers];

template <class T> T* reserve(uint64_t count) {
  return (T*)mmap(nullptr, count * sizeof(T), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1,
                  0);
}

void release(Record& record) {
  if (record.capacity) {
    munmap(record.flags, record.capacity);
    munmap(record.last_storer, record.capacity * sizeof(uint32_t));
    munmap(record.last_loader, (record.capacity / 32 + 1) * sizeof(uint32_t));
  }
  record = {};
}

void allocate(Record& record, uint64_t capacity) {
  release(record);
  record.flags = reserve<uint8_t>(capacity);
  record.last_storer = reserve<uint32_t>(capacity);
  record.last_loader = reserve<uint32_t>(capacity / 32 + 1);
  record.capacity = capacity;
}

void forget(Record& record) {
  if (record.touched.end) {
    const uint64_t begin = record.touched.begin;
    const uint64_t bytes = record.touched.end - begin;
    memset(record.flags + begin, 0, bytes);
    memset(record.last_loader + begin / 32, 0, (bytes / 32 + 2) * sizeof(uint32_t));
  }
  if (record.stored.end) {
    memset(record.last_storer + record.stored.begin, 0,
           (record.stored.end - record.stored.begin) * sizeof(uint32_t));
  }
  record.touched = {};
  record.stored = {};
}

// Sets `mark` on n bytes of flags and returns the union of what was there.
template <class Word> uint64_t mark_word(uint8_t* flags, uint8_t mark) {
  Word word;
  memcpy(&word, flags, sizeof word);
  const Word marked = word | (Word)0x0101010101010101ull * mark;
  memcpy(flags, &marked, sizeof word);
  return word;
}
uint64_t mark_bytes(uint8_t* flags, uint32_t n, uint8_t mark) {
  uint64_t seen = 0;
  for (; n >= 8; n -= 8, flags += 8) seen |= mark_word<uint64_t>(flags, mark);
  if (n & 4) seen |= mark_word<uint32_t>(flags, mark), flags += 4;
  if (n & 2) seen |= mark_word<uint16_t>(flags, mark), flags += 2;
  if (n & 1) seen |= mark_word<uint8_t>(flags, mark);
  return seen;
}

void count_store(int slot, uint64_t offset, uint32_t bytes, uint64_t pc) {
  BufferCounters& counters = buffer_counters[slot];
  Record& record = records[slot];
  counters.store_bytes += bytes;
  counters.store_ops++;
  record.stored.add(offset, offset + bytes);
  const uint32_t me = running_threadgroup_index + 1;
  uint32_t& storer = record.last_storer[offset];
  if (storer && storer != me) {
    counters.overwrites++;
    report(kOverwrite, slot, offset, bytes, pc, storer - 1);
  }
  storer = me;
}

void count_load(int slot, uint64_t offset, uint32_t bytes) {
  BufferCounters& counters = buffer_counters[slot];
  counters.load_bytes += bytes;
  counters.load_ops++;
  simdgroup_load_ops[current->thread.simdgroup]++;
  const uint32_t me = running_threadgroup_index + 1;
  for (uint64_t segment = offset / 32; segment <= (offset + bytes - 1) / 32; segment++) {
    uint32_t& loader = records[slot].last_loader[segment];
    if (loader == me) continue;
    loader = me;
    counters.threadgroup_segments_32++;
  }
}

// A load just outside reads ones and goes on; anything else ends the launch.
void report_out_of_range(int slot, uint64_t offset, uint32_t bytes, bool is_store, uint64_t pc) {
  buffer_counters[slot].out_of_range++;
  report(is_store ? kOutOfRangeStore : kOutOfRangeLoad, slot, offset, bytes, pc);
  if (is_store || !slots[slot].is_slack(offset, bytes)) abort_launch();
}

} // namespace

Slot slots[kNumSlots];
Bound bound[kNumBuffers];

bool Slot::is_slack(uint64_t offset, uint64_t bytes) const {
  const int64_t at = (int64_t)offset;
  return mapped && at >= -(int64_t)kSlackBytes && at + (int64_t)bytes <= (int64_t)(size + kSlackBytes);
}

bool reserve_arena() {
  arena = (char*)mmap(nullptr, kArenaBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (arena == MAP_FAILED) {
    arena = nullptr;
    return false;
  }
  for (int slot = 0; slot < kNumSlots; slot++) slots[slot].base = arena + slot * kSlotBytes + kSlotMiddle;
  return true;
}

int find_slot(uint64_t address) {
  const uint64_t offset = address - (uint64_t)arena;
  return offset < kArenaBytes ? (int)(offset / kSlotBytes) : -1;
}

namespace {

void empty_slot(int index) {
  Slot& slot = slots[index];
  if (slot.mapped <= kKeptBytes) {
    place_slot(index, 0);
    return;
  }
  mmap(slot.base - kSlackBytes, slot.mapped + 2 * kSlackBytes, PROT_NONE,
       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  slot.mapped = slot.size = 0;
  release(records[index]);
}

} // namespace

char* place_slot(int index, uint64_t size) {
  Slot& slot = slots[index];
  const uint64_t needed = (size + kPageBytes - 1) & ~(kPageBytes - 1);
  if (needed > slot.mapped) {
    mmap(slot.base - kSlackBytes, needed + 2 * kSlackBytes, PROT_READ | PROT_WRITE,
         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    memset(slot.base - kSlackBytes, 0xff, kSlackBytes);
    memset(slot.base + size, 0xff, needed - size + kSlackBytes);
    slot.mapped = needed;
  } else if (size < slot.size) {
    memset(slot.base + size, 0xff, slot.size - size);
  }
  slot.size = size;
  if (index >= kNumBuffers) return slot.base;
  if (records[index].capacity < size) {
    allocate(records[index], needed);
  } else {
    forget(records[index]);
  }
  return slot.base;
}

void begin_device_launch() {
  memset(buffer_counters, 0, sizeof buffer_counters);
}

void end_device_launch() {
  for (int slot = 0; slot < kNumBuffers; slot++) {
    const Record& record = records[slot];
    for (uint64_t i = record.touched.begin; i < record.touched.end; i++) {
      buffer_counters[slot].unique_load_bytes += record.flags[i] & kLoaded ? 1 : 0;
      buffer_counters[slot].unique_store_bytes += record.flags[i] & kStored ? 1 : 0;
    }
  }
}

void access_device(int slot, uint64_t address, uint32_t bytes, bool is_store, uint64_t pc) {
  const uint64_t offset = slots[slot].offset_of(address);
  if (__builtin_expect(!slots[slot].holds(offset, bytes), 0)) {
    report_out_of_range(slot, offset, bytes, is_store, pc);
    return;
  }
  Record& record = records[slot];
  record.touched.add(offset, offset + bytes);
  const uint64_t seen = mark_bytes(record.flags + offset, bytes, is_store ? kStored : kLoaded);
  if (__builtin_expect((seen & 0x0101010101010101ull * (is_store ? kNoStore : kNoLoad)) != 0, 0)) {
    buffer_counters[slot].forbidden++;
    report(is_store ? kForbiddenStore : kForbiddenLoad, slot, offset, bytes, pc);
  }
  if (is_store) {
    count_store(slot, offset, bytes, pc);
  } else {
    count_load(slot, offset, bytes);
  }
  if (options.trace) current->log.push({pc, address, bytes, (uint16_t)slot, is_store});
}

METAL_HOST_EXPORT void* metal_host_place(int slot, uint64_t size) {
  return place_slot(slot, size);
}

METAL_HOST_EXPORT void metal_host_bind(int index, void* address, uint64_t size) {
  bound[index] = {address, size};
}

METAL_HOST_EXPORT void metal_host_unbind() {
  for (int slot = 0; slot < kNumBuffers; slot++) {
    bound[slot] = {slots[slot].base, 0};
    if (slots[slot].size) empty_slot(slot);
  }
}

METAL_HOST_EXPORT void metal_host_forbid(int slot, uint64_t begin, uint64_t end, int loads, int stores) {
  Record& record = records[slot];
  const uint8_t mark = (loads ? kNoLoad : 0) | (stores ? kNoStore : 0);
  for (uint64_t i = begin; i < end; i++) record.flags[i] |= mark;
  if (begin < end) record.touched.add(begin, end);
}

// The bytes of a slot that were stored to, as [begin, end); empty when end is 0.
METAL_HOST_EXPORT void metal_host_stored_range(int slot, uint64_t* begin, uint64_t* end) {
  *begin = records[slot].stored.begin;
  *end = records[slot].stored.end;
}

METAL_HOST_EXPORT int metal_host_holds(int index, uint64_t bytes) {
  const Bound& buffer = bound[index];
  if (buffer.size >= bytes) return 1;
  if (buffer.size) report(kOutOfRangeLoad, index, 0, bytes, (uint64_t)__builtin_return_address(0));
  return 0;
}

void count_atomic(int slot, uint64_t address, uint32_t bytes, int kind, uint64_t pc) {
  const uint64_t offset = slots[slot].offset_of(address);
  if (!slots[slot].holds(offset, bytes)) {
    report_out_of_range(slot, offset, bytes, true, pc);
    return;
  }
  Record& record = records[slot];
  buffer_counters[slot].atomics++;
  record.touched.add(offset, offset + bytes);
  if (kind != kAtomicLoad) record.stored.add(offset, offset + bytes);
  mark_bytes(record.flags + offset, bytes,
             kind == kAtomicLoad ? kLoaded : kind == kAtomicStore ? kStored : kLoaded | kStored);
}
