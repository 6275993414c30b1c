// How the running launch is executed and watched.
#pragma once
#include <stdint.h>

enum Order : uint64_t { kForward = 0, kReverse = 1, kFirstSeed = 2 };

struct Options {
  uint64_t order; // kForward, kReverse, or a seed from kFirstSeed on
  bool trace;     // align lanes into simdgroup-wide instructions
  bool race;      // shadow threadgroup memory
  uint32_t ulp;   // move transcendental results by up to this many ulp
  uint64_t code_base;
};
extern Options options;
