#include "tables.h"

#include <string.h>

#include "coalescing.h"
#include "fibers.h"

BufferCounters buffer_counters[kNumBuffers];
LaunchCounters launch_counters;

namespace {

enum { kMaxFindings = 64 };
Finding findings[kMaxFindings];
int num_findings;

} // namespace

void clear_findings() {
  num_findings = 0;
}

void report(FindingKind kind, int buffer, uint64_t offset, uint64_t bytes, uint64_t pc, uint64_t other,
            uint64_t other_pc) {
  for (int i = 0; i < num_findings; i++) {
    Finding& known = findings[i];
    if (known.kind == (uint64_t)kind && known.pc == pc && known.buffer == (uint64_t)buffer) {
      known.count++;
      return;
    }
  }
  if (num_findings == kMaxFindings) return;
  Finding& found = findings[num_findings++];
  found = {};
  found.kind = kind;
  found.buffer = buffer;
  found.offset = offset;
  found.bytes = bytes;
  found.thread = current ? current->thread.index_in_threadgroup : 0;
  found.other = other;
  found.count = 1;
  found.threadgroup_x = running_threadgroup[0];
  found.threadgroup_y = running_threadgroup[1];
  found.threadgroup_z = running_threadgroup[2];
  found.pc = pc;
  found.other_pc = other_pc;
}

namespace {

struct Table {
  const char* name;
  const char* fields;
  const uint64_t* (*rows)();
  int (*count)();
};

#define METAL_HOST_NAME(name) #name " "
const Table tables[] = {
    {"buffers", METAL_HOST_BUFFER_COUNTERS(METAL_HOST_NAME), [] { return (const uint64_t*)buffer_counters; },
     [] { return (int)kNumBuffers; }},
    {"launch", METAL_HOST_LAUNCH_COUNTERS(METAL_HOST_NAME), [] { return (const uint64_t*)&launch_counters; },
     [] { return 1; }},
    {"findings", METAL_HOST_FINDING_FIELDS(METAL_HOST_NAME), [] { return (const uint64_t*)findings; },
     [] { return num_findings; }},
    {"places", METAL_HOST_PLACE_FIELDS(METAL_HOST_NAME), [] { return (const uint64_t*)places(); },
     [] { return num_places(); }},
    {"arguments", METAL_HOST_LAUNCH_ARGUMENTS(METAL_HOST_NAME), [] { return (const uint64_t*)nullptr; },
     [] { return 0; }},
};

const Table* find_table(const char* name) {
  for (const Table& table : tables) {
    if (strcmp(table.name, name) == 0) return &table;
  }
  return nullptr;
}

// "fatal|text|about" of every kind.
const char* const descriptions[] = {
#define METAL_HOST_DESCRIBE(name, fatal, text, about) #fatal "|" text "|" about,
    METAL_HOST_FINDINGS(METAL_HOST_DESCRIBE)};

} // namespace

METAL_HOST_EXPORT const char* metal_host_table_fields(const char* table) {
  return find_table(table)->fields;
}
METAL_HOST_EXPORT const uint64_t* metal_host_table_rows(const char* table) {
  return find_table(table)->rows();
}
METAL_HOST_EXPORT int metal_host_table_count(const char* table) {
  return find_table(table)->count();
}
METAL_HOST_EXPORT const char* metal_host_finding_kind(int kind) {
  return descriptions[kind];
}
METAL_HOST_EXPORT int metal_host_num_finding_kinds() {
  return kNumFindingKinds;
}
