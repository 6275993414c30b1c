// Turns the device accesses of single lanes into the instructions of their
// simdgroup: accesses made at the same place of the code, for the same time.
#pragma once
#include <stdint.h>

#include "tables.h"

struct Access {
  uint64_t pc;
  uint64_t address;
  uint32_t bytes;
  uint16_t buffer;
  uint16_t is_store;
};

// What one lane did since its simdgroup last met.
struct AccessLog {
  Access* entries;
  uint32_t count;
  uint32_t capacity;

  void push(const Access& access) {
    if (count == capacity) grow();
    entries[count++] = access;
  }
  void grow();
};

// Counts the logs of `lanes` fibers from `first` on and empties them.
void count_accesses(int first, int lanes);

void clear_places();
const Place* places();
int num_places();
