// What the machine itself can do, for benchmarks to measure the kernels against: the same
// pages read and nothing computed, the same multiplications and nothing read. On a pool of
// threads like attend()'s. Built and called by benchmarks/roofline.py.
#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "cpu/thread_pool.h"

using namespace paged_mlx::cpu;

namespace {

constexpr int kLine = 64;
constexpr int kPagesPerUnit = 8;
constexpr int kChains = 12; // independent sums, enough to hide the latency of each
constexpr int64_t kStepsPerUnit = 1 << 15;

#define PAGED_MLX_TARGET(isa) __attribute__((target(isa)))

typedef uint32_t Words __attribute__((vector_size(16), aligned(4), may_alias));

struct Reader {
  const char* pools[2];
  size_t page_bytes[2];
  const int32_t* page_ids;
  int count;
  std::atomic<uint32_t> sum{0};

  const char* page(int i, int pool) const {
    return pools[pool] + size_t(page_ids[std::min(i, count - 1)]) * page_bytes[pool];
  }
};

// One page; the lines of `next` are prefetched at the pace of the reading.
uint32_t read_page(const char* at, size_t bytes, const char* next, size_t next_bytes) {
  constexpr int kParts = kLine / sizeof(Words);
  Words sums[kParts] = {};
  size_t i = 0;
  for (; i + kLine <= bytes; i += kLine) {
    if (i < next_bytes) {
      __builtin_prefetch(next + i, 0, 2);
    }
    for (int part = 0; part < kParts; part++) {
      sums[part] += reinterpret_cast<const Words*>(at + i)[part];
    }
  }
  uint32_t sum = 0;
  for (const Words& part : sums) {
    sum += part[0] + part[1] + part[2] + part[3];
  }
  for (; i < bytes; i++) {
    sum += uint8_t(at[i]);
  }
  return sum;
}

void read_unit(void* context, int unit) {
  auto& r = *static_cast<Reader*>(context);
  const int end = std::min(r.count, (unit + 1) * kPagesPerUnit);
  uint32_t sum = 0;
  for (int i = unit * kPagesPerUnit; i < end; i++) {
    sum += read_page(r.page(i, 0), r.page_bytes[0], r.page(i, 1), r.page_bytes[1]);
    sum += read_page(r.page(i, 1), r.page_bytes[1], r.page(i + 1, 0), r.page_bytes[0]);
  }
  r.sum += sum;
}

// Multiplies and adds `steps` times in kChains sums.
#define PAGED_MLX_CHAINS(Vec, zero, step)     \
  Vec sums[kChains];                          \
  for (Vec & sum : sums) {                    \
    sum = zero;                               \
  }                                           \
  for (int64_t i = 0; i < steps; i++) {       \
    _Pragma("GCC unroll 12")                  \
    for (int c = 0; c < kChains; c++) {       \
      sums[c] = step;                         \
    }                                         \
  }                                           \
  for (int c = 1; c < kChains; c++) {         \
    sums[0] = sums[0] + sums[c];              \
  }                                           \
  return sums[0][0];

using Spend = float (*)(int64_t steps);

struct Rate {
  Spend spend;
  int flops; // of one step of one chain
};

#if defined(__x86_64__)

float spend_v2(int64_t steps) {
  const __m128 half = _mm_set1_ps(0.5f), one = _mm_set1_ps(1.0f);
  PAGED_MLX_CHAINS(__m128, one, _mm_add_ps(_mm_mul_ps(sums[c], half), one))
}

PAGED_MLX_TARGET("avx2,fma")
float spend_v3(int64_t steps) {
  const __m256 half = _mm256_set1_ps(0.5f), one = _mm256_set1_ps(1.0f);
  PAGED_MLX_CHAINS(__m256, one, _mm256_fmadd_ps(sums[c], half, one))
}

PAGED_MLX_TARGET("avx512f")
float spend_v4(int64_t steps) {
  const __m512 half = _mm512_set1_ps(0.5f), one = _mm512_set1_ps(1.0f);
  PAGED_MLX_CHAINS(__m512, one, _mm512_fmadd_ps(sums[c], half, one))
}

PAGED_MLX_TARGET("avx512f,avx512bw,avx512vl,avx512bf16")
float spend_dot_products(int64_t steps) {
  const __m512bh small = (__m512bh)_mm512_set1_epi16(0x3000);
  PAGED_MLX_CHAINS(__m512, _mm512_set1_ps(1.0f), _mm512_dpbf16_ps(sums[c], small, small))
}

Rate best_rate(const std::string& name, bool dot_products) {
  if (name == "v4_bf16" && dot_products) {
    return {spend_dot_products, 64};
  }
  return name == "v2" ? Rate{spend_v2, 8} : name == "v3" ? Rate{spend_v3, 16} : Rate{spend_v4, 32};
}

#else

float spend_neon(int64_t steps) {
  const float32x4_t half = vdupq_n_f32(0.5f), one = vdupq_n_f32(1.0f);
  PAGED_MLX_CHAINS(float32x4_t, one, vfmaq_f32(one, sums[c], half))
}

Rate best_rate(const std::string&, bool) {
  return {spend_neon, 8};
}

#endif

struct Spending {
  Spend spend;
  int64_t steps;
  std::atomic<float> sum{0};
};

void spend_unit(void* context, int unit) {
  auto& s = *static_cast<Spending*>(context);
  const int64_t left = s.steps - unit * kStepsPerUnit;
  s.sum = s.spend(std::min(left, kStepsPerUnit));
}

} // namespace

extern "C" {

// Reads the named pages of K and V whole, the K page and then the V page, and
// prefetches the next ones meanwhile. Returns a sum, so that nothing is left out.
float read_pages(
    const char* k_pages,
    const char* v_pages,
    size_t k_page_bytes,
    size_t v_page_bytes,
    const int32_t* page_ids,
    int count,
    int threads) {
  Reader reader{{k_pages, v_pages}, {k_page_bytes, v_page_bytes}, page_ids, count};
  set_pool_size(threads);
  run_parallel((count + kPagesPerUnit - 1) / kPagesPerUnit, threads, read_unit, &reader);
  return float(reader.sum.load());
}

// Does this many floating-point operations, an addition and a multiplication each
// counted, at the best rate of the instruction set; `dot_products`: of pairs of
// bfloat16, where it has them. Returns a sum.
float spend_flops(double flops, const char* isa, bool dot_products, int threads) {
  const Rate rate = best_rate(isa, dot_products);
  Spending spending{rate.spend, int64_t(flops / (double(kChains) * rate.flops))};
  const int units = int((spending.steps + kStepsPerUnit - 1) / kStepsPerUnit);
  set_pool_size(threads);
  run_parallel(units, threads, spend_unit, &spending);
  return spending.sum.load();
}

} // extern "C"
