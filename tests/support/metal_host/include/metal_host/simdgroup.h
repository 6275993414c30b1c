// Barriers, fences, and the functions in which the lanes of a simdgroup or a
// quadgroup exchange values.
#pragma once
#include "math.h"

namespace metal {

enum class mem_flags : uint {
  mem_none = 0,
  mem_device = 1,
  mem_threadgroup = 2,
  mem_texture = 4,
};
inline constexpr mem_flags operator|(mem_flags a, mem_flags b) {
  return (mem_flags)((uint)a | (uint)b);
}
enum thread_scope : int {
  thread_scope_thread,
  thread_scope_simdgroup,
  thread_scope_threadgroup,
  thread_scope_device,
};
enum memory_order : int {
  memory_order_relaxed = 0,
  memory_order_acquire = 2,
  memory_order_release = 3,
  memory_order_acq_rel = 4,
  memory_order_seq_cst = 5,
};

} // namespace metal

namespace metal_host {

// The rows of the lanes that meet; see thread.h.
struct Lanes {
  char (*rows)[128];
  uint mask;

  METAL_HOST_INLINE bool has(int lane) const { return mask >> lane & 1; }
  template <class T> METAL_HOST_INLINE T get(int lane) const {
    T out;
    __builtin_memcpy((void*)&out, rows[lane], sizeof(T));
    return out;
  }
  template <class T> METAL_HOST_INLINE void set(int lane, const T& value) const {
    __builtin_memcpy(rows[lane], (const void*)&value, sizeof(T));
  }
};

#ifdef METAL_HOST_ADDRESS_SPACES
template <class Out, class Combine, class In> METAL_HOST_INLINE Out meet(In in, int kind) {
  return Out();
}
#elif defined METAL_HOST_OPAQUE
template <class Combine> struct Opaque;
template <class Out, class Combine, class In> METAL_HOST_INLINE Out meet(In in, int kind) {
  return Opaque<Combine>::run(in);
}
#else
template <class Combine> METAL_HOST_UNCOUNTED void combine_rows(char (*rows)[128], uint mask) {
  Combine::run(Lanes{rows, mask});
}
// Every lane calls with its `in`; Combine::run turns the rows into `out`s.
template <class Out, class Combine, class In> METAL_HOST_INLINE Out meet(In in, int kind) {
  constexpr int bytes = sizeof(In) > sizeof(Out) ? sizeof(In) : sizeof(Out);
  static_assert(bytes <= kMetalHostRowBytes, "a lane's row is too short");
  char row[bytes];
  __builtin_memcpy(row, (const void*)&in, sizeof(In));
  metal_host_collective(&combine_rows<Combine>, row, sizeof(In), sizeof(Out), kind);
  Out out;
  __builtin_memcpy((void*)&out, row, sizeof(Out));
  return out;
}
#endif

#ifdef METAL_HOST_OPAQUE
// One instruction that nobody looks into, in place of a meeting: what remains is the
// kernel's own code, as a compiler for the GPU would see it.
template <class T> METAL_HOST_INLINE T opaque(T value, int source) {
  if constexpr (__is_same(T, float)) {
    asm volatile("# simd" : "+x"(value) : "r"(source));
  } else {
    asm volatile("# simd" : "+r"(value) : "r"(source));
  }
  return value;
}
template <class Combine> struct Opaque {
  template <class T> static METAL_HOST_INLINE T run(T value) { return opaque(value, 0); }
};
#endif

// The value of each group of `width` lanes becomes `op` over its lanes, in order.
template <class T, class Op, int width> struct Reduce {
  METAL_HOST_UNCOUNTED static void run(Lanes lanes) {
    for (int first = 0; first < 32; first += width) {
      T total;
      bool empty = true;
      for (int i = first; i < first + width; i++) {
        if (!lanes.has(i)) continue;
        T value = lanes.template get<T>(i);
        total = empty ? value : Op::apply(total, value);
        empty = false;
      }
      for (int i = first; i < first + width; i++) {
        if (lanes.has(i)) lanes.set(i, total);
      }
    }
  }
};

// A sum as a butterfly: the hardware documents no order.
template <class T> struct ButterflySum {
  METAL_HOST_UNCOUNTED static void run(Lanes lanes) {
    T sum[32];
    bool has[32];
    for (int i = 0; i < 32; i++) {
      has[i] = lanes.has(i);
      if (has[i]) sum[i] = lanes.template get<T>(i);
    }
    for (int step = 1; step < 32; step *= 2) {
      for (int i = 0; i < 32; i += 2 * step) {
        if (!has[i + step]) continue;
        sum[i] = has[i] ? sum[i] + sum[i + step] : sum[i + step];
        has[i] = true;
      }
    }
    for (int i = 0; i < 32; i++) {
      if (lanes.has(i)) lanes.set(i, sum[0]);
    }
  }
};

template <class T, class Op, bool inclusive> struct Scan {
  METAL_HOST_UNCOUNTED static void run(Lanes lanes) {
    T before = Op::template identity<T>();
    for (int i = 0; i < 32; i++) {
      if (!lanes.has(i)) continue;
      T through = Op::apply(before, lanes.template get<T>(i));
      lanes.set(i, inclusive ? through : before);
      before = through;
    }
  }
};

// What a lane of a shuffle brings: its value, and the lane it wants to read.
enum { kOwnValue = -2, kFillValue = -1 };
template <class T> struct Shuffled {
  T value;
  T fill;
  int source;
};
template <class T> struct Shuffle {
  // A source lane that is not there leaves all ones, since Metal leaves it undefined.
  METAL_HOST_UNCOUNTED static void run(Lanes lanes) {
    T values[32];
    for (int i = 0; i < 32; i++) {
      if (lanes.has(i)) values[i] = lanes.template get<Shuffled<T>>(i).value;
    }
    for (int i = 0; i < 32; i++) {
      if (!lanes.has(i)) continue;
      Shuffled<T> mine = lanes.template get<Shuffled<T>>(i);
      T out;
      __builtin_memset((void*)&out, 0xff, sizeof(T));
      if (mine.source == kFillValue) {
        out = mine.fill;
      } else if (mine.source == kOwnValue) {
        out = mine.value;
      } else if (mine.source < 32 && lanes.has(mine.source)) {
        out = values[mine.source];
      }
      lanes.set(i, out);
    }
  }
};

#ifdef METAL_HOST_OPAQUE
template <class T> struct Opaque<Shuffle<T>> {
  static METAL_HOST_INLINE T run(Shuffled<T> in) { return opaque(in.value, in.source); }
};
#endif

struct Ballot {
  METAL_HOST_UNCOUNTED static void run(Lanes lanes) {
    uint votes = 0;
    for (int i = 0; i < 32; i++) {
      if (lanes.has(i) && lanes.get<uint>(i)) votes |= 1u << i;
    }
    for (int i = 0; i < 32; i++) {
      if (lanes.has(i)) lanes.set(i, votes);
    }
  }
};

#define METAL_HOST_OP(Name, expression)                                    \
  struct Name {                                                            \
    template <class T> METAL_HOST_INLINE static T apply(T a, T b) {        \
      return expression;                                                   \
    }                                                                      \
  };
METAL_HOST_OP(Max, metal::max(a, b))
METAL_HOST_OP(Min, metal::min(a, b))
METAL_HOST_OP(And, a & b)
METAL_HOST_OP(Or, a | b)
METAL_HOST_OP(Xor, a ^ b)
struct Sum {
  template <class T> METAL_HOST_INLINE static T apply(T a, T b) { return a + b; }
  template <class T> METAL_HOST_INLINE static T identity() { return (T)0; }
};
struct Product {
  template <class T> METAL_HOST_INLINE static T apply(T a, T b) { return a * b; }
  template <class T> METAL_HOST_INLINE static T identity() { return (T)1; }
};

template <class T> METAL_HOST_INLINE T shuffle(T value, int source, T fill, int kind = kMeetShuffle) {
  Shuffled<T> mine;
  __builtin_memset((void*)&mine, 0, sizeof mine);
  mine.value = value;
  mine.fill = fill;
  mine.source = source;
  return meet<T, Shuffle<T>>(mine, kind);
}
#ifdef METAL_HOST_OPAQUE
METAL_HOST_INLINE int lane() { return 0; }
#else
METAL_HOST_INLINE int lane() { return (int)metal_host_lane(); }
#endif
METAL_HOST_INLINE int quad_start() { return lane() & ~3; }
METAL_HOST_INLINE uint ballot(bool vote) { return meet<uint, Ballot>((uint)vote, kMeetBallot); }

} // namespace metal_host

namespace metal {

METAL_HOST_INLINE void threadgroup_barrier(mem_flags flags) { metal_host_threadgroup_barrier((int)flags); }
METAL_HOST_INLINE void threadgroup_barrier(mem_flags flags, thread_scope) { threadgroup_barrier(flags); }
METAL_HOST_INLINE void simdgroup_barrier(mem_flags flags) { metal_host_simdgroup_barrier((int)flags); }
METAL_HOST_INLINE void atomic_thread_fence(mem_flags, memory_order, thread_scope = thread_scope_device) {
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

#define METAL_HOST_REDUCTION(name, Op)                                                      \
  template <class T, METAL_HOST_IF(metal_host::is_value<T>)>                                \
  METAL_HOST_INLINE T simd_##name(T value) {                                                \
    return metal_host::meet<T, metal_host::Reduce<T, metal_host::Op, 32>>(value, kMeetReduce); \
  }
#define METAL_HOST_QUAD_REDUCTION(name, Op)                                                 \
  template <class T, METAL_HOST_IF(metal_host::is_value<T>)>                                \
  METAL_HOST_INLINE T quad_##name(T value) {                                                \
    return metal_host::meet<T, metal_host::Reduce<T, metal_host::Op, 4>>(value, kMeetQuadReduce); \
  }
METAL_HOST_REDUCTION(max, Max)
METAL_HOST_REDUCTION(min, Min)
METAL_HOST_REDUCTION(product, Product)
METAL_HOST_REDUCTION(and, And)
METAL_HOST_REDUCTION(or, Or)
METAL_HOST_REDUCTION(xor, Xor)
METAL_HOST_QUAD_REDUCTION(sum, Sum)
METAL_HOST_QUAD_REDUCTION(max, Max)
METAL_HOST_QUAD_REDUCTION(min, Min)
template <class T, METAL_HOST_IF(metal_host::is_value<T>)> METAL_HOST_INLINE T simd_sum(T value) {
  return metal_host::meet<T, metal_host::ButterflySum<T>>(value, kMeetReduce);
}

#define METAL_HOST_SCAN(name, Op, inclusive)                                                \
  template <class T, METAL_HOST_IF(metal_host::is_scalar<T>)>                               \
  METAL_HOST_INLINE T simd_prefix_##name(T value) {                                         \
    return metal_host::meet<T, metal_host::Scan<T, metal_host::Op, inclusive>>(value, kMeetScan); \
  }
METAL_HOST_SCAN(inclusive_sum, Sum, true)
METAL_HOST_SCAN(exclusive_sum, Sum, false)
METAL_HOST_SCAN(inclusive_product, Product, true)
METAL_HOST_SCAN(exclusive_product, Product, false)

#define METAL_HOST_SHUFFLE(name, argument, source)                     \
  template <class T, METAL_HOST_IF(metal_host::is_value<T>)>           \
  METAL_HOST_INLINE T simd_##name(T value, ushort argument) {          \
    int lane = metal_host::lane();                                     \
    return metal_host::shuffle(value, source, value);                  \
  }
METAL_HOST_SHUFFLE(shuffle, from, (lane, (int)from))
METAL_HOST_SHUFFLE(broadcast, from, (lane, (int)from))
METAL_HOST_SHUFFLE(shuffle_xor, mask, lane ^ mask)
METAL_HOST_SHUFFLE(shuffle_down, delta, lane + delta < 32 ? lane + delta : metal_host::kOwnValue)
METAL_HOST_SHUFFLE(shuffle_up, delta, lane >= delta ? lane - delta : metal_host::kOwnValue)
METAL_HOST_SHUFFLE(shuffle_rotate_down, delta, (lane + delta) & 31)
METAL_HOST_SHUFFLE(shuffle_rotate_up, delta, (lane - delta) & 31)

template <class T, METAL_HOST_IF(metal_host::is_value<T>)> METAL_HOST_INLINE T simd_broadcast_first(T value) {
  return metal_host::shuffle(value, (int)__builtin_ctz(metal_host_active_lanes()), value);
}
template <class T, METAL_HOST_IF(metal_host::is_value<T>)>
METAL_HOST_INLINE T simd_shuffle_and_fill_down(T value, T fill, ushort delta, ushort width = 32) {
  int source = metal_host::lane() + delta;
  int end = metal_host::lane() / width * width + width;
  return metal_host::shuffle(value, source < end ? source : (int)metal_host::kFillValue, fill);
}
template <class T, METAL_HOST_IF(metal_host::is_value<T>)>
METAL_HOST_INLINE T simd_shuffle_and_fill_up(T value, T fill, ushort delta, ushort width = 32) {
  int source = metal_host::lane() - delta;
  int start = metal_host::lane() / width * width;
  return metal_host::shuffle(value, source >= start ? source : (int)metal_host::kFillValue, fill);
}

#define METAL_HOST_QUAD_SHUFFLE(name, argument, source)                                    \
  template <class T, METAL_HOST_IF(metal_host::is_value<T>)>                               \
  METAL_HOST_INLINE T quad_##name(T value, ushort argument) {                              \
    int start = metal_host::quad_start();                                                  \
    int at = metal_host::lane() - start;                                                   \
    return metal_host::shuffle(value, source, value, kMeetQuadShuffle);   \
  }
METAL_HOST_QUAD_SHUFFLE(shuffle, from, (at, start + (from & 3)))
METAL_HOST_QUAD_SHUFFLE(broadcast, from, (at, start + (from & 3)))
METAL_HOST_QUAD_SHUFFLE(shuffle_xor, mask, start + (at ^ (mask & 3)))
METAL_HOST_QUAD_SHUFFLE(shuffle_down, delta, at + delta < 4 ? start + at + delta : (int)metal_host::kOwnValue)
METAL_HOST_QUAD_SHUFFLE(shuffle_up, delta, at >= delta ? start + at - delta : (int)metal_host::kOwnValue)

struct simd_vote {
  typedef ulong vote_t;
  ulong votes;
  simd_vote() = default;
  constexpr explicit simd_vote(ulong value) : votes(value) {}
  constexpr explicit operator vote_t() const { return votes; }
  bool all() const { return (uint)votes == 0xffffffffu; }
  bool any() const { return votes != 0; }
};
METAL_HOST_INLINE simd_vote simd_ballot(bool vote) { return simd_vote(metal_host::ballot(vote)); }
METAL_HOST_INLINE bool simd_any(bool vote) { return metal_host::ballot(vote) != 0; }
METAL_HOST_INLINE bool simd_all(bool vote) { return metal_host::ballot(!vote) == 0; }
METAL_HOST_INLINE simd_vote simd_active_threads_mask() { return simd_vote(metal_host::ballot(true)); }
METAL_HOST_INLINE bool simd_is_first() {
  return __builtin_ctz(metal_host::ballot(true)) == metal_host::lane();
}

} // namespace metal
