// Threadgroup memory: a shadow of every byte that knows who last read and wrote
// it, and between which barriers. A race is found whatever the schedule.
#pragma once
#include <stdint.h>

void begin_threadgroup_launch(const uint64_t* buffer_bytes, uint64_t variables_begin, uint64_t variables_end);
// Unknown contents (ones) for the threadgroup that begins.
void begin_threadgroup();
// Orders all threads, or the lanes of one simdgroup.
void order_threadgroup();
void order_simdgroup(int simdgroup);

void* threadgroup_buffer(int index);
void access_threadgroup(int slot, uint64_t address, uint32_t bytes, bool is_store, uint64_t pc);
void mark_atomic_store(int slot, uint64_t address, uint32_t bytes);
