// Scalar types and the words in which the other headers are written.
//
// The headers are read in two languages. Run: C++ of the host. Checked: C++ for
// OpenCL, which has address spaces in its type system as Metal has
// (METAL_HOST_ADDRESS_SPACES is defined; nothing is generated).
// No C or C++ standard header may be included: Metal sources define their own
// global fma, dot and max.
#pragma once

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long int64_t;
typedef uchar uint8_t;
typedef ushort uint16_t;
typedef uint uint32_t;
typedef ulong uint64_t;
typedef ulong size_t;
typedef long ptrdiff_t;
typedef __bf16 bfloat;

// `nodebug` makes a finding inside a shim name the line of the kernel that
// called it.
#define METAL_HOST_INLINE inline __attribute__((always_inline, nodebug))
#define METAL_HOST_IF(...) typename metal::enable_if<(__VA_ARGS__), int>::type = 0

#ifdef METAL_HOST_ADDRESS_SPACES
#pragma OPENCL EXTENSION cl_khr_fp16 : enable
#define METAL_HOST_PRIVATE __private
#define METAL_HOST_UNCOUNTED
// Names the language keeps for itself.
#define atomic_int metal_host_atomic_int
#define atomic_uint metal_host_atomic_uint
#define atomic_float metal_host_atomic_float
#define atomic_ulong metal_host_atomic_ulong
#else
typedef ulong uintptr_t;
typedef long intptr_t;
typedef _Float16 half;
#define METAL_HOST_PRIVATE
#define METAL_HOST_UNCOUNTED __attribute__((no_sanitize("kernel-address")))

constexpr METAL_HOST_INLINE half operator""h(long double value) {
  return (half)value;
}
constexpr METAL_HOST_INLINE bfloat operator""bf(long double value) {
  return (bfloat)(float)value;
}
#endif
#include "thread.h"
