// How many prefetches does the processor drop?
//
//   g++ -O2 -std=c++20 benchmarks/dropped_prefetches.cpp -o dropped && ./dropped
//
// Lines of a pool far larger than the caches are prefetched, in runs of lines that lie side
// by side, with so many multiplications between two prefetches. When all must have arrived,
// every line is read, and one that takes as long as a line from memory was dropped. The
// decode kernel of the CPU backend prefetches every line twice because of what this shows
// (csrc/cpu/tile_pass.h). x86-64 and Linux.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include <sys/mman.h>
#include <x86intrin.h>

namespace {

constexpr size_t kLine = 64;
constexpr size_t kPoolBytes = size_t(1) << 30;
constexpr int kTrials = 300;
constexpr uint64_t kArrived = 20000; // ticks after which every prefetch has arrived

uint64_t ticks() {
  _mm_lfence();
  const uint64_t t = __rdtsc();
  _mm_lfence();
  return t;
}

uint64_t time_read(const char* line) {
  const uint64_t start = ticks();
  *reinterpret_cast<const volatile int*>(line);
  return ticks() - start;
}

template <typename T>
T median(std::vector<T> values) {
  std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
  return values[values.size() / 2];
}

// Runs of `run` lines at random places of the pool, `count` lines in all.
std::vector<const char*> random_lines(const char* pool, int count, int run, std::mt19937_64& rng) {
  std::vector<const char*> lines;
  while (int(lines.size()) < count) {
    const char* const first = pool + rng() % (kPoolBytes / (kLine * run)) * kLine * run;
    for (int i = 0; i < run && int(lines.size()) < count; i++) {
      lines.push_back(first + i * kLine);
    }
  }
  return lines;
}

// The share of `lines` that are not in a cache after each was prefetched `times` times.
double dropped(const std::vector<const char*>& lines, int gap, int times, uint64_t slow) {
  for (int turn = 0; turn < times; turn++) {
    for (const char* const line : lines) {
      _mm_prefetch(line, _MM_HINT_T1);
      for (int i = 0; i < gap; i++) {
        __asm__ volatile("mulps %%xmm0, %%xmm0" ::: "xmm0");
      }
    }
    for (const uint64_t end = ticks() + kArrived; ticks() < end;) {
    }
  }
  int missing = 0;
  for (auto line = lines.rbegin(); line != lines.rend(); ++line) {
    missing += time_read(*line) > slow;
  }
  return double(missing) / lines.size();
}

} // namespace

int main() {
  char* const pool = static_cast<char*>(
      mmap(nullptr, kPoolBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  madvise(pool, kPoolBytes, MADV_HUGEPAGE);
  memset(pool, 1, kPoolBytes);
  std::mt19937_64 rng(1);
  std::vector<uint64_t> from_memory, from_cache;
  for (const char* const line : random_lines(pool, 20000, 1, rng)) {
    from_memory.push_back(time_read(line));
    from_cache.push_back(time_read(line));
  }
  // An L2 hit takes a few ticks more than an L1 hit, memory hundreds.
  const uint64_t slow = (median(from_memory) + 3 * median(from_cache)) / 4;
  printf("ticks: cache %lu, memory %lu\n", median(from_cache), median(from_memory));
  printf("%6s %6s %14s %8s %8s\n", "lines", "a run", "mults between", "once", "twice");
  for (const int run : {8, 64, 128}) {
    for (const int count : {16, 64, 128, 256}) {
      for (const int gap : {0, 2, 8}) {
        double shares[2] = {0, 0};
        for (int trial = 0; trial < kTrials; trial++) {
          for (int times = 1; times <= 2; times++) {
            shares[times - 1] += dropped(random_lines(pool, count, run, rng), gap, times, slow);
          }
        }
        printf(
            "%6d %6d %14d %7.1f%% %7.1f%%\n",
            count, run, gap, 100 * shares[0] / kTrials, 100 * shares[1] / kTrials);
      }
    }
  }
}
