#include "coalescing.h"

#include <stdlib.h>
#include <string.h>

#include "fibers.h"

namespace {

enum { kMaxMergedBytes = 16, kMergeWindow = 24 };

// Distinct aligned segments touched by one simdgroup-wide access.
template <int shift> struct Segments {
  uint64_t seen[96];
  int count = 0;

  void add(uint64_t address, uint32_t bytes) {
    for (uint64_t segment = address >> shift; segment <= (address + bytes - 1) >> shift; segment++) {
      int i = count - 1;
      while (i >= 0 && seen[i] != segment) i--;
      if (i < 0 && count < 96) seen[count++] = segment;
    }
  }
};

struct SegmentCounts {
  int of_32;
  int of_128;
};

SegmentCounts count_segments(Access** lanes, int count, uint32_t extra_bytes) {
  Segments<5> of_32;
  Segments<7> of_128;
  for (int i = 0; i < count; i++) {
    of_32.add(lanes[i]->address, lanes[i]->bytes + extra_bytes);
    of_128.add(lanes[i]->address, lanes[i]->bytes + extra_bytes);
  }
  return {of_32.count, of_128.count};
}

// Traffic by place of the code: an open hash table over a plain array.
enum { kMaxPlaces = 4096, kHashSlots = 4 * kMaxPlaces };
Place place_rows[kMaxPlaces];
int place_count;
int place_of_hash[kHashSlots]; // index + 1

Place& place_at(uint64_t pc) {
  uint32_t slot = (uint32_t)(pc * 0x9e3779b97f4a7c15ull >> 50) % kHashSlots;
  while (place_of_hash[slot]) {
    Place& place = place_rows[place_of_hash[slot] - 1];
    if (place.pc == pc) return place;
    slot = (slot + 1) % kHashSlots;
  }
  if (place_count == kMaxPlaces) return place_rows[kMaxPlaces - 1];
  place_of_hash[slot] = place_count + 1;
  Place& place = place_rows[place_count++];
  place = {};
  place.pc = pc;
  return place;
}

void count_as_written(Access** lanes, int count) {
  const Access& first = *lanes[0];
  const SegmentCounts segments = count_segments(lanes, count, 0);
  BufferCounters& counters = buffer_counters[first.buffer];
  if (first.is_store) {
    counters.simdgroup_stores++;
    counters.store_segments_32 += segments.of_32;
    counters.store_segments_128 += segments.of_128;
  } else {
    counters.simdgroup_loads++;
    counters.load_segments_32 += segments.of_32;
    counters.load_segments_128 += segments.of_128;
  }
  Place& place = place_at(first.pc);
  for (int i = 0; i < count; i++) place.bytes += lanes[i]->bytes;
  place.buffer = first.buffer;
  place.is_store = first.is_store;
  place.ops += count;
  place.simdgroup_ops++;
  place.segments_32 += segments.of_32;
  place.segments_128 += segments.of_128;
}

void count_merged(Access** lanes, int count, uint32_t extra_bytes) {
  const Access& first = *lanes[0];
  const SegmentCounts segments = count_segments(lanes, count, extra_bytes);
  BufferCounters& counters = buffer_counters[first.buffer];
  if (first.is_store) {
    counters.merged_stores++;
    counters.merged_store_segments_32 += segments.of_32;
    counters.merged_store_segments_128 += segments.of_128;
  } else {
    counters.merged_loads++;
    counters.merged_load_segments_32 += segments.of_32;
    counters.merged_load_segments_128 += segments.of_128;
  }
}

// The logs of the lanes that did anything.
struct LogSet {
  AccessLog* logs[kLanes];
  int count = 0;

  bool all_alike() const {
    for (int i = 1; i < count; i++) {
      if (logs[i]->count != logs[0]->count) return false;
      for (uint32_t k = 0; k < logs[0]->count; k++) {
        if (logs[i]->entries[k].pc != logs[0]->entries[k].pc) return false;
      }
    }
    return true;
  }
  void column(uint32_t k, Access** out) const {
    for (int i = 0; i < count; i++) out[i] = &logs[i]->entries[k];
  }
  // Whether in every lane access b starts where `bytes` from a on end, or the reverse.
  void adjacency(uint32_t a, uint32_t b, uint32_t bytes, bool* above, bool* below) const {
    *above = *below = true;
    for (int i = 0; i < count && (*above || *below); i++) {
      const Access& low = logs[i]->entries[a];
      const Access& other = logs[i]->entries[b];
      *above = *above && other.address == low.address + bytes;
      *below = *below && other.address + other.bytes == low.address;
    }
  }
};

// Lanes in step: access k of every lane is one instruction. Runs of adjacent
// accesses grow in either direction up to 16 bytes.
void count_in_step(const LogSet& set) {
  static uint8_t* merged;
  static uint32_t capacity;
  const uint32_t count = set.logs[0]->count;
  if (capacity < count) {
    capacity = 2 * count;
    merged = (uint8_t*)realloc(merged, capacity);
  }
  memset(merged, 0, count);
  Access* lanes[kLanes];
  for (uint32_t k = 0; k < count; k++) {
    set.column(k, lanes);
    count_as_written(lanes, set.count);
  }
  for (uint32_t k = 0; k < count; k++) {
    if (merged[k]) continue;
    const Access& first = set.logs[0]->entries[k];
    uint32_t bytes = first.bytes;
    uint32_t lowest = k;
    for (bool grew = true; grew && bytes < kMaxMergedBytes;) {
      grew = false;
      for (uint32_t next = k + 1; next < count && next < k + kMergeWindow; next++) {
        const Access& candidate = set.logs[0]->entries[next];
        if (merged[next] || candidate.buffer != first.buffer || candidate.is_store != first.is_store ||
            bytes + candidate.bytes > kMaxMergedBytes) {
          continue;
        }
        bool above, below;
        set.adjacency(lowest, next, bytes, &above, &below);
        if (!above && !below) continue;
        if (below) lowest = next;
        bytes += candidate.bytes;
        merged[next] = 1;
        grew = true;
      }
    }
    set.column(lowest, lanes);
    count_merged(lanes, set.count, bytes - set.logs[0]->entries[lowest].bytes);
  }
}

struct Occurrence {
  Access* access;
  uint32_t index; // how often the lane had been at this place before
  uint32_t order; // keeps the sort stable
};

int compare_occurrences(const void* left, const void* right) {
  const Occurrence& a = *(const Occurrence*)left;
  const Occurrence& b = *(const Occurrence*)right;
  if (a.access->pc != b.access->pc) return a.access->pc < b.access->pc ? -1 : 1;
  if (a.access->buffer != b.access->buffer) return a.access->buffer < b.access->buffer ? -1 : 1;
  if (a.index != b.index) return a.index < b.index ? -1 : 1;
  return a.order < b.order ? -1 : 1;
}

bool same_instruction(const Occurrence& a, const Occurrence& b) {
  return a.access->pc == b.access->pc && a.access->buffer == b.access->buffer && a.index == b.index;
}

// Numbers the accesses of one lane by how often it was at the same place.
void number_occurrences(Occurrence* begin, Occurrence* end) {
  qsort(begin, end - begin, sizeof(Occurrence), compare_occurrences);
  for (Occurrence* o = begin + 1; o < end; o++) {
    const bool again = o->access->pc == o[-1].access->pc && o->access->buffer == o[-1].access->buffer;
    o->index = again ? o[-1].index + 1 : 0;
  }
}

// Lanes out of step: the n-th access of each lane at a place is one instruction.
void count_out_of_step(const LogSet& set) {
  uint32_t total = 0;
  for (int i = 0; i < set.count; i++) total += set.logs[i]->count;
  Occurrence* all = (Occurrence*)malloc(total * sizeof(Occurrence));
  uint32_t used = 0;
  for (int i = 0; i < set.count; i++) {
    const uint32_t begin = used;
    for (uint32_t k = 0; k < set.logs[i]->count; k++) {
      all[used] = {&set.logs[i]->entries[k], 0, used};
      used++;
    }
    number_occurrences(all + begin, all + used);
  }
  qsort(all, total, sizeof(Occurrence), compare_occurrences);
  Access* lanes[kLanes];
  for (uint32_t begin = 0; begin < total;) {
    int count = 0;
    uint32_t end = begin;
    while (end < total && same_instruction(all[begin], all[end])) lanes[count++] = all[end++].access;
    count_as_written(lanes, count);
    count_merged(lanes, count, 0);
    begin = end;
  }
  free(all);
}

} // namespace

void AccessLog::grow() {
  capacity = capacity ? 2 * capacity : 256;
  entries = (Access*)realloc(entries, capacity * sizeof(Access));
}

void count_accesses(int first, int lanes) {
  LogSet set;
  for (int i = 0; i < lanes; i++) {
    AccessLog& log = fibers[first + i].log;
    if (log.count) set.logs[set.count++] = &log;
  }
  if (!set.count) return;
  if (set.all_alike()) {
    count_in_step(set);
  } else {
    count_out_of_step(set);
  }
  for (int i = 0; i < set.count; i++) set.logs[i]->count = 0;
}

void clear_places() {
  if (!place_count) return;
  memset(place_of_hash, 0, sizeof place_of_hash);
  place_count = 0;
}

const Place* places() {
  return place_rows;
}

int num_places() {
  return place_count;
}
