// The thread pool, preempted at any of its steps: every unit of every job runs once, while
// its job is open, and every job ends. Needs neither MLX nor Python:
//
//   c++ -std=c++20 -O1 -pthread -Icsrc tests/support/cpp/thread_pool_test.cpp csrc/cpu/machine.cpp
#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <mutex>
#include <random>
#include <system_error>
#include <thread>

#include <pthread.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/machine.h"
#include "cpu/thread_pool.h"

// A preemption: rare, and longer than a job.
void maybe_sleep() {
  thread_local std::minstd_rand random(
      unsigned(std::hash<std::thread::id>()(std::this_thread::get_id())));
  if (random() % 16 == 0) {
    std::this_thread::sleep_for(std::chrono::microseconds(random() % 64));
  }
}

// An atomic whose every access may be preempted just before it.
namespace std {
template <class T>
struct preempted_atomic : atomic<T> {
  using atomic<T>::atomic;
  T load(memory_order order = memory_order_seq_cst) const {
    maybe_sleep();
    return atomic<T>::load(order);
  }
  void store(T value, memory_order order = memory_order_seq_cst) {
    maybe_sleep();
    atomic<T>::store(value, order);
  }
  T fetch_add(T value, memory_order order = memory_order_seq_cst) {
    maybe_sleep();
    return atomic<T>::fetch_add(value, order);
  }
  T fetch_sub(T value, memory_order order = memory_order_seq_cst) {
    maybe_sleep();
    return atomic<T>::fetch_sub(value, order);
  }
  T fetch_and(T value, memory_order order = memory_order_seq_cst) {
    maybe_sleep();
    return atomic<T>::fetch_and(value, order);
  }
  bool compare_exchange_weak(T& expected, T value) {
    maybe_sleep();
    return atomic<T>::compare_exchange_weak(expected, value);
  }
};
} // namespace std
#define atomic preempted_atomic
#include "cpu/thread_pool.cpp"
#undef atomic

namespace {

using namespace paged_mlx::cpu;

constexpr int kUnits = 6;

struct Job {
  std::array<std::atomic<int>, kUnits> runs{};
  std::atomic<bool> open{true};
  std::atomic<bool> late{false};
};

// Jobs of different callers; some come one after the other, some find every thread asleep.
bool run_jobs(std::atomic<int>& finished, int jobs) {
  static std::array<Job, 4096> kept; // not freed: a late thread must be seen, not crash
  for (int j = 0; j < jobs; j++) {
    Job& job = kept[finished++ % kept.size()];
    for (auto& n : job.runs) {
      n = 0;
    }
    job.open = true;
    run_parallel(
        kUnits,
        2 + j % 6,
        [](void* context, int i) {
          Job& job = *static_cast<Job*>(context);
          job.late = job.late || !job.open;
          job.runs[i]++;
        },
        &job);
    job.open = false;
    for (const auto& n : job.runs) {
      if (n != 1) {
        return false;
      }
    }
    if (job.late) {
      return false;
    }
    if (j % 4 == 0) {
      std::this_thread::sleep_for(std::chrono::microseconds(150));
    }
  }
  return true;
}

} // namespace

int main() {
  set_pool_size(7);
  std::atomic<int> finished{0};
  std::atomic<bool> right{true};
  std::thread callers[2];
  for (auto& caller : callers) {
    caller = std::thread([&] { right = run_jobs(finished, 4000) && right; });
  }
  for (auto& caller : callers) {
    caller.join();
  }
  std::printf("%s\n", right ? "passed" : "failed: a unit ran twice, never, or after its job");
  return right ? 0 : 1;
}
