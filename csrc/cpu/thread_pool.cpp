#include "cpu/thread_pool.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <system_error>
#include <thread>

#include <pthread.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/machine.h"

namespace paged_mlx::cpu {

namespace {

using Clock = std::chrono::steady_clock;
constexpr auto kSpin = std::chrono::microseconds(80);
constexpr int kPausesPerLook = 64; // pauses between two looks at the clock

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Pool {
 public:
  void run(int count, int threads, void (*work)(void*, int), void* context) {
    std::unique_lock<std::mutex> lock(caller_, std::try_to_lock);
    if (!lock.owns_lock() || threads <= 1 || count <= 1) {
      for (int i = 0; i < count; i++) {
        work(context, i);
      }
      return;
    }
    start_threads(threads - 1);
    work_ = work;
    context_ = context;
    count_ = count;
    next_.store(0, std::memory_order_relaxed);
    open(std::min(threads, count) - 1);
    work_off();
    close();
  }

 private:
  // state_: job number | open (1 bit) | seats left (15 bits) | workers inside (16 bits).
  static constexpr uint64_t kInside = 1;
  static constexpr uint64_t kSeat = 1 << 16;
  static constexpr uint64_t kOpen = uint64_t(1) << 31;
  static constexpr uint64_t kInsideMask = kSeat - 1;
  static constexpr uint64_t kSeatMask = kOpen - kSeat;

  // Where the system gives no more threads, those that there are do the work.
  void start_threads(int n) {
    try {
      for (; num_threads_ < n; num_threads_++) {
        std::thread([this] { serve(); }).detach();
      }
    } catch (const std::system_error&) {
    }
  }

  void open(int seats) {
    job_++;
    state_.store((job_ << 32) | kOpen | (uint64_t(seats) << 16));
    if (sleepers_.load() > 0) {
      {
        std::lock_guard<std::mutex> lock(sleep_);
      }
      seats == 1 ? wake_.notify_one() : wake_.notify_all();
    }
  }

  void close() {
    state_.fetch_and(~kOpen);
    for (int looks = 0; (state_.load(std::memory_order_acquire) & kInsideMask) != 0; looks++) {
      looks < 4096 ? pause() : std::this_thread::yield();
    }
  }

  void work_off() {
    for (int i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) {
      work_(context_, i);
    }
  }

  static bool joinable(uint64_t state, uint64_t last_job) {
    return (state & kOpen) && (state & kSeatMask) && (state >> 32) != last_job;
  }

  void serve() {
#if defined(__APPLE__)
    pthread_set_qos_class_self_np(QOS_CLASS_USER_INITIATED, 0);
#endif
    uint64_t last_job = 0;
    for (;;) {
      uint64_t state = wait_for_job(last_job);
      if (!state_.compare_exchange_weak(state, state - kSeat + kInside)) {
        continue;
      }
      last_job = state >> 32;
      work_off();
      state_.fetch_sub(kInside, std::memory_order_release);
    }
  }

  uint64_t wait_for_job(uint64_t last_job) {
    const auto until = Clock::now() + kSpin;
    do {
      for (int i = 0; i < kPausesPerLook; i++) {
        const uint64_t state = state_.load(std::memory_order_acquire);
        if (joinable(state, last_job)) {
          return state;
        }
        pause();
      }
    } while (Clock::now() < until);
    std::unique_lock<std::mutex> lock(sleep_);
    sleepers_.fetch_add(1);
    uint64_t state;
    wake_.wait(lock, [&] { return joinable(state = state_.load(), last_job); });
    sleepers_.fetch_sub(1);
    return state; // one that was joinable: when it has changed since, joining fails
  }

  std::mutex caller_; // held while a job runs
  int num_threads_ = 0;
  uint64_t job_ = 0;

  void (*work_)(void*, int) = nullptr;
  void* context_ = nullptr;
  int count_ = 0;
  alignas(64) std::atomic<int> next_{0};
  alignas(64) std::atomic<uint64_t> state_{0};

  std::mutex sleep_;
  std::condition_variable wake_;
  std::atomic<int> sleepers_{0};
};

std::atomic<Pool*> g_pool{nullptr};
std::atomic<int> g_size{0};

// The child of a fork has no workers and may have inherited a held lock.
void forget_pool() {
  g_pool.store(nullptr);
}

Pool& pool() {
  static const int registered = pthread_atfork(nullptr, nullptr, forget_pool);
  (void)registered;
  Pool* pool = g_pool.load(std::memory_order_acquire);
  if (!pool) {
    Pool* const fresh = new Pool;
    if (g_pool.compare_exchange_strong(pool, fresh)) {
      return *fresh;
    }
    delete fresh;
  }
  return *pool;
}

} // namespace

void run_parallel(int count, int threads, void (*work)(void* context, int i), void* context) {
  pool().run(count, std::min(threads, pool_size()), work, context);
}

void set_pool_size(int n) {
  g_size.store(std::clamp(n, 1, 1024));
}

int pool_size() {
  int size = g_size.load();
  if (size == 0) {
    size = usable_cores();
    int unset = 0;
    g_size.compare_exchange_strong(unset, size);
  }
  return g_size.load();
}

} // namespace paged_mlx::cpu
