// <metal_atomic>. Threads run one at a time, so a plain access is atomic.
#pragma once
#include "simdgroup.h"

namespace metal_host {

// Plain accesses that are not counted as a kernel's loads and stores.
template <class T> METAL_HOST_UNCOUNTED __attribute__((noinline)) T get(const volatile T* at) {
  return *at;
}
template <class T, class U> METAL_HOST_UNCOUNTED __attribute__((noinline)) void put(volatile T* at, U value) {
  *at = value;
}

} // namespace metal_host

namespace metal {

template <class T> struct atomic {
  T value;
};
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<bool> atomic_bool;
typedef atomic<float> atomic_float;
typedef atomic<ulong> atomic_ulong;

template <class T> METAL_HOST_INLINE T atomic_load_explicit(const volatile atomic<T>* object, memory_order) {
  metal_host_atomic(object, sizeof(T), kAtomicLoad);
  return metal_host::get(&object->value);
}
template <class T, class U>
METAL_HOST_INLINE void atomic_store_explicit(volatile atomic<T>* object, U value, memory_order) {
  metal_host_atomic(object, sizeof(T), kAtomicStore);
  metal_host::put(&object->value, (T)value);
}
template <class T, class U>
METAL_HOST_INLINE bool atomic_compare_exchange_weak_explicit(volatile atomic<T>* object, T* expected, U desired,
                                                             memory_order, memory_order) {
  metal_host_atomic(object, sizeof(T), kAtomicUpdate);
  const T old = metal_host::get(&object->value);
  const bool same = old == *expected;
  if (same) metal_host::put(&object->value, (T)desired);
  *expected = old;
  return same;
}

// Each returns the value from before.
#define METAL_HOST_ATOMIC_UPDATE(name, expression)                                         \
  template <class T, class U>                                                              \
  METAL_HOST_INLINE T atomic_##name##_explicit(volatile atomic<T>* object, U argument, memory_order) { \
    metal_host_atomic(object, sizeof(T), kAtomicUpdate);                                   \
    const T old = metal_host::get(&object->value);                                         \
    const T value = (T)argument;                                                           \
    metal_host::put(&object->value, (T)(expression));                                      \
    return old;                                                                            \
  }
METAL_HOST_ATOMIC_UPDATE(exchange, value)
METAL_HOST_ATOMIC_UPDATE(fetch_add, old + value)
METAL_HOST_ATOMIC_UPDATE(fetch_sub, old - value)
METAL_HOST_ATOMIC_UPDATE(fetch_min, old < value ? old : value)
METAL_HOST_ATOMIC_UPDATE(fetch_max, old > value ? old : value)
METAL_HOST_ATOMIC_UPDATE(fetch_and, old & value)
METAL_HOST_ATOMIC_UPDATE(fetch_or, old | value)
METAL_HOST_ATOMIC_UPDATE(fetch_xor, old ^ value)

} // namespace metal

#ifndef METAL_HOST_ADDRESS_SPACES
using metal::atomic_bool;
using metal::atomic_int;
using metal::atomic_uint;
#endif
