// From a launch to a call of the kernel: each parameter is bound by its
// attribute, its type is deduced from the kernel. And from a `threadgroup`
// variable to its place.
#pragma once
#include "vectors.h"

namespace metal_host {

// Where the runtime keeps a `threadgroup` variable; opaque to the optimiser,
// which would otherwise speculate loads of it.
template <class T> METAL_HOST_INLINE T* threadgroup_variable(T* variable) {
  return (T*)metal_host_threadgroup_variable((void*)variable, sizeof(T));
}

enum Binding {
  kUniform, // constant T& [[buffer(n)]]: in registers, not counted
  kBuffer,
  kThreadgroupMemory,
  kPositionInGrid,
  kPositionInThreadgroup,
  kThreadgroupPosition,
  kThreadsPerThreadgroup,
  kThreadgroupsPerGrid,
  kThreadsPerGrid,
  kIndexInThreadgroup,
  kLane,
  kSimdgroup,
  kNumSimdgroups,
  kThreadsPerSimdgroup,
  kQuadgroup,
  kLaneInQuadgroup,
};
struct Parameter {
  Binding binding;
  int index;
};

// What differs from lane to lane.
METAL_HOST_INLINE unsigned own(unsigned index) {
#ifdef METAL_HOST_OPAQUE
  asm("# lane" : "+r"(index));
#endif
  return index;
}

// A position as whatever the kernel declares: a scalar or a vector.
template <class A> METAL_HOST_INLINE A position(const unsigned* xyz) {
  typedef __remove_cv(A) Value;
  if constexpr (components<Value>::is_vector) {
    Value out;
    for (int i = 0; i < components<Value>::count; i++) out.v[i] = (typename components<Value>::type)xyz[i];
    return out;
  } else {
    return (A)xyz[0];
  }
}

// A `constant T&` argument, or a pattern when the buffer is too small for it.
template <class T> struct Uniform {
  __remove_cv(T) value;
  METAL_HOST_INLINE operator T&() { return value; }
};
template <class T> METAL_HOST_UNCOUNTED __attribute__((noinline)) Uniform<T> read_uniform(int index, const void* bytes) {
  Uniform<T> out;
  if (metal_host_holds(index, sizeof(T))) {
    __builtin_memcpy((void*)&out.value, bytes, sizeof(T));
  } else {
    __builtin_memset((void*)&out.value, 0x7f, sizeof(T));
  }
  return out;
}

template <class A> struct Argument {
  template <Parameter P> static METAL_HOST_INLINE A get(const MetalHostThread* t) {
    if constexpr (P.binding == kBuffer) return (A)t->buffers[P.index];
    else if constexpr (P.binding == kThreadgroupMemory) return (A)t->threadgroup_memory[P.index];
    else if constexpr (P.binding == kPositionInGrid) return position<A>(t->position_in_grid);
    else if constexpr (P.binding == kPositionInThreadgroup) return position<A>(t->position_in_threadgroup);
    else if constexpr (P.binding == kThreadgroupPosition) return position<A>(t->threadgroup_position);
    else if constexpr (P.binding == kThreadsPerThreadgroup) return position<A>(t->threads_per_threadgroup);
    else if constexpr (P.binding == kThreadgroupsPerGrid) return position<A>(t->threadgroups_per_grid);
    else if constexpr (P.binding == kThreadsPerGrid) return position<A>(t->threads_per_grid);
    else if constexpr (P.binding == kIndexInThreadgroup) return (A)own(t->index_in_threadgroup);
    else if constexpr (P.binding == kLane) return (A)own(t->lane);
    else if constexpr (P.binding == kSimdgroup) return (A)t->simdgroup;
    else if constexpr (P.binding == kNumSimdgroups) return (A)t->num_simdgroups;
    else if constexpr (P.binding == kThreadsPerSimdgroup) return (A)32;
    else if constexpr (P.binding == kQuadgroup) return (A)(t->lane / 4);
    else return (A)(t->lane % 4);
  }
};
template <class A> struct Argument<A&> {
  template <Parameter P> static METAL_HOST_INLINE auto get(const MetalHostThread* t) {
    if constexpr (P.binding == kUniform) {
      return read_uniform<A>(P.index, t->buffers[P.index]);
    } else {
      void** bound = P.binding == kBuffer ? t->buffers : t->threadgroup_memory;
      return Reference<A>{(A*)bound[P.index]};
    }
  }
  template <class T> struct Reference {
    T* target;
    METAL_HOST_INLINE operator T&() { return *target; }
  };
};

template <class Function> struct Call;
template <class... A> struct Call<void (*)(A...)> {
  template <Parameter... P> static METAL_HOST_INLINE void run(void (*kernel)(A...), const MetalHostThread* t) {
    static_assert(sizeof...(A) == sizeof...(P), "one binding a parameter");
    kernel(Argument<A>::template get<P>(t)...);
  }
};

} // namespace metal_host
