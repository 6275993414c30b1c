// Runs the fibers of a threadgroup. A lane runs until it meets others: the rest
// of its simdgroup at a collective, the rest of its threadgroup at a barrier.
#pragma once
#include <stdint.h>

// Runs `num_threads` fibers, already reset, to their end.
void run_threadgroup(int num_threads, void (*kernel)(const struct MetalHostThread*));
