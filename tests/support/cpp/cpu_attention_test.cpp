// The CPU kernels of every instruction set this machine runs, against a double
// precision reference, on plans written out by hand. Needs neither MLX nor Python;
// tests/cpu/test_cpu_kernels.py builds and runs it.
#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cpu/attention.h"
#include "cpu/dispatch.h"
#include "cpu/thread_pool.h"
#include "plan_format.h"

using namespace paged_mlx;

namespace {

int g_failures = 0;

void expect(bool right, const std::string& promise) {
  if (!right) {
    g_failures++;
    std::printf("FAILED: %s\n", promise.c_str());
  }
}

// One sequence whose last `queries` tokens attend, in one item or in two that merge.
struct Case {
  cpu::DType dtype = cpu::DType::float32;
  PlanKind kind = kTileItem;
  int context = 45;
  int queries = 1;
  int heads = 6;
  int kv_heads = 2;
  int head_dim = 24;
  int v_head_dim = 40;
  int page_size = 4;
  int window = 0;
  bool cut = false; // two items, merged

  int pages() const {
    return (context + page_size - 1) / page_size;
  }
};

float narrow(cpu::DType dtype, float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  switch (dtype) {
    case cpu::DType::float32:
      return x;
    case cpu::DType::float16: // 11 significant bits; no subnormal numbers
      return std::abs(x) < 0x1p-14f ? 0.0f : std::bit_cast<float>((bits + 0xfff + ((bits >> 13) & 1)) & ~0x1fffu);
    default:
      return std::bit_cast<float>((bits + 0x7fff + ((bits >> 16) & 1)) & ~0xffffu);
  }
}

// Elements of one dtype, written and read as float.
struct Array {
  cpu::DType dtype;
  std::vector<char> bytes;

  Array(cpu::DType dtype, size_t n) : dtype(dtype), bytes(n * size()) {}
  size_t size() const {
    return dtype == cpu::DType::float32 ? 4 : 2;
  }
  void set(size_t i, float x) {
    uint32_t bits = std::bit_cast<uint32_t>(x);
    if (dtype == cpu::DType::float16) {
      const uint32_t exponent = (bits >> 23) & 0xff;
      const uint32_t special = exponent == 0xff ? 0x7c00 | ((bits >> 13) & 0x3ff) : 0;
      const uint32_t normal = x == 0 ? 0 : ((bits & 0x7fffffff) - (112u << 23)) >> 13;
      bits = (special ? special : normal) | ((bits >> 16) & 0x8000);
    } else if (dtype == cpu::DType::bfloat16) {
      bits >>= 16;
    }
    std::memcpy(bytes.data() + i * size(), &bits, size());
  }
  float get(size_t i) const {
    uint32_t bits = 0;
    std::memcpy(&bits, bytes.data() + i * size(), size());
    if (dtype == cpu::DType::float16) {
      const float magnitude = std::ldexp(float((bits & 0x3ff) | 0x400), int((bits >> 10) & 31) - 25);
      const float x = (bits & 0x7c00) ? magnitude : std::ldexp(float(bits & 0x3ff), -24);
      return bits & 0x8000 ? -x : x;
    }
    return std::bit_cast<float>(dtype == cpu::DType::bfloat16 ? bits << 16 : bits);
  }
};

struct Problem {
  Case c;
  Array q, k, v, out;
  std::vector<float> lse;
  std::vector<int32_t> pages; // page ids, shuffled; one page of the pool is nobody's
  std::vector<int32_t> plan;

  size_t k_at(int kv_head, int position, int d) const {
    const int page = pages[position / c.page_size], slot = position % c.page_size;
    return ((size_t(page) * c.kv_heads + kv_head) * c.page_size + slot) * c.head_dim + d;
  }
  size_t v_at(int kv_head, int position, int d) const {
    const int page = pages[position / c.page_size], slot = position % c.page_size;
    return ((size_t(page) * c.kv_heads + kv_head) * c.page_size + slot) * c.v_head_dim + d;
  }
};

std::vector<int32_t> make_plan(const Case& c, const std::vector<int32_t>& pages) {
  const int cut_page = c.cut ? c.pages() / 2 : c.pages();
  const int num_items = c.cut ? 2 : 1;
  PlanHeader h{};
  std::vector<int32_t> words(sizeof(h) / sizeof(int32_t));
  auto append = [&](const void* data, size_t count) {
    const int at = int(words.size());
    words.insert(words.end(), static_cast<const int32_t*>(data), static_cast<const int32_t*>(data) + count);
    return at;
  };
  std::vector<PlanItem> items;
  std::vector<PlanMerge> merges;
  std::vector<int32_t> tokens, positions, ends, parts;
  for (int t = 0; t < c.queries; t++) {
    tokens.push_back(t);
    positions.push_back(c.context - c.queries + t);
    ends.push_back(positions.back() + 1);
    if (c.cut) {
      merges.push_back({t, 2 * t, 2});
      parts.insert(parts.end(), {t, c.queries + t});
    }
  }
  const int split = cut_page * c.page_size;
  items.push_back({0, c.queries, 0, cut_page, 0, 0, c.cut ? split : c.context, c.cut ? 0 : -1});
  if (c.cut) {
    items.push_back(
        {0, c.queries, cut_page, c.pages() - cut_page, split, split, c.context, c.queries});
  }
  h.magic = PAGED_MLX_PLAN_MAGIC;
  h.num_items[c.kind] = num_items;
  h.num_tokens = h.num_row_tokens = c.queries;
  h.num_pages = c.pages();
  h.num_partials = c.cut ? 2 * c.queries : 0;
  h.num_merges = int(merges.size());
  h.num_parts = int(parts.size());
  h.items = append(items.data(), items.size() * sizeof(PlanItem) / 4);
  h.row_tokens = append(tokens.data(), tokens.size());
  h.positions = append(positions.data(), positions.size());
  h.row_ends = append(ends.data(), ends.size());
  h.pages = append(pages.data(), c.pages());
  h.merges = append(merges.data(), merges.size() * sizeof(PlanMerge) / 4);
  h.parts = append(parts.data(), parts.size());
  h.num_words = int(words.size());
  h.num_q_heads = c.heads;
  h.num_kv_heads = c.kv_heads;
  h.page_size = c.page_size;
  h.causal = 1;
  h.sliding_window = c.window;
  std::memcpy(words.data(), &h, sizeof(h));
  return words;
}

// Slots outside the context hold NaN.
Problem make_problem(const Case& c, unsigned seed, int page_shift = 1) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  const int pool = c.pages() + 1;
  const size_t slots = size_t(pool) * c.kv_heads * c.page_size;
  Problem p{
      c,
      Array(c.dtype, size_t(c.queries) * c.heads * c.head_dim),
      Array(c.dtype, slots * c.head_dim),
      Array(c.dtype, slots * c.v_head_dim),
      Array(c.dtype, size_t(c.queries) * c.heads * c.v_head_dim),
      std::vector<float>(size_t(c.queries) * c.heads),
      {},
      {}};
  for (int i = 0; i < c.pages(); i++) {
    p.pages.push_back((i * 5 + page_shift) % pool);
  }
  for (int i = 0; i < c.pages(); i++) { // 5 may divide the pool
    for (int j = 0; j < i; j++) {
      if (p.pages[i] == p.pages[j]) {
        p.pages[i] = (p.pages[i] + 1) % pool;
        j = -1;
      }
    }
  }
  for (size_t i = 0; i < slots * c.head_dim; i++) {
    p.k.set(i, NAN);
  }
  for (size_t i = 0; i < slots * c.v_head_dim; i++) {
    p.v.set(i, NAN);
  }
  for (int i = 0; i < c.queries * c.heads * c.head_dim; i++) {
    p.q.set(i, narrow(c.dtype, normal(random)));
  }
  for (int t = 0; t < c.context; t++) {
    for (int h = 0; h < c.kv_heads; h++) {
      for (int d = 0; d < c.head_dim; d++) {
        p.k.set(p.k_at(h, t, d), narrow(c.dtype, normal(random)));
      }
      for (int d = 0; d < c.v_head_dim; d++) {
        p.v.set(p.v_at(h, t, d), narrow(c.dtype, normal(random)));
      }
    }
  }
  p.plan = make_plan(c, p.pages);
  return p;
}

void run(Problem& p) {
  cpu::AttentionArgs args{};
  args.dtype = p.c.dtype;
  args.q = p.q.bytes.data();
  args.k.pages = p.k.bytes.data();
  args.v.pages = p.v.bytes.data();
  args.k.dtype = args.v.dtype = p.c.dtype;
  args.k.dim = p.c.head_dim;
  args.v.dim = p.c.v_head_dim;
  args.plan = p.plan.data();
  args.out = p.out.bytes.data();
  args.lse = p.lse.data();
  args.options.scale = 1.0f / std::sqrt(float(p.c.head_dim));
  cpu::attend(args);
}

// Largest error of out, of outputs of size about 1; lse must agree too.
double worst_error(const Problem& p) {
  const Case& c = p.c;
  double worst = 0;
  for (int t = 0; t < c.queries; t++) {
    const int position = c.context - c.queries + t;
    const int begin = c.window ? std::max(0, position - c.window + 1) : 0;
    for (int h = 0; h < c.heads; h++) {
      const int kv_head = h / (c.heads / c.kv_heads);
      std::vector<double> weight;
      double sum = 0;
      for (int key = begin; key <= position; key++) {
        double dot = 0;
        for (int d = 0; d < c.head_dim; d++) {
          dot += double(p.q.get((size_t(t) * c.heads + h) * c.head_dim + d)) *
              p.k.get(p.k_at(kv_head, key, d));
        }
        weight.push_back(std::exp(dot / std::sqrt(double(c.head_dim))));
        sum += weight.back();
      }
      worst = std::max(worst, std::abs(std::log(sum) - p.lse[t * c.heads + h]));
      for (int d = 0; d < c.v_head_dim; d++) {
        double out = 0;
        for (int key = begin; key <= position; key++) {
          out += weight[key - begin] / sum * p.v.get(p.v_at(kv_head, key, d));
        }
        const double error = std::abs(out - p.out.get((size_t(t) * c.heads + h) * c.v_head_dim + d));
        worst = error <= worst ? worst : error; // NaN is the worst
      }
    }
  }
  return worst;
}

double bound(cpu::DType dtype) {
  return dtype == cpu::DType::float32 ? 2e-6 : dtype == cpu::DType::float16 ? 1.5e-3 : 1.2e-2;
}

std::vector<Case> cases() {
  std::vector<Case> all;
  for (auto dtype : {cpu::DType::float32, cpu::DType::float16, cpu::DType::bfloat16}) {
    for (auto kind : {kVectorItem, kTileItem, kWideItem}) {
      for (int page_size : {1, 3, 16, 24}) {
        for (bool cut : {false, true}) {
          all.push_back({dtype, kind, 45, 1, 6, 2, 24, 40, page_size, 0, cut});
          all.push_back({dtype, kind, 70, 9, 5, 1, 72, 8, page_size, 20, cut});
        }
      }
    }
    all.push_back({dtype, kTileItem, 33, 1, 8, 8, 128, 128, 16, 0, false});
    all.push_back({dtype, kWideItem, 130, 100, 4, 1, 64, 64, 16, 0, false});
  }
  return all;
}

void test_every_isa_agrees_with_the_reference() {
  for (const std::string& isa : cpu::isa_names()) {
    expect(cpu::set_isa(isa), "an instruction set that is listed can be chosen: " + isa);
    unsigned seed = 0;
    for (const Case& c : cases()) {
      Problem p = make_problem(c, ++seed);
      run(p);
      const double error = worst_error(p);
      expect(
          error <= bound(c.dtype),
          isa + ", case " + std::to_string(seed) + ": error " + std::to_string(error));
    }
  }
  cpu::set_isa("");
}

void test_page_ids_and_threads_do_not_change_a_bit() {
  for (auto kind : {kTileItem, kWideItem}) {
    Case c{cpu::DType::bfloat16, kind, 500, 40, 8, 2, 64, 64, 16, 0, true};
    cpu::set_num_threads(1);
    Problem one = make_problem(c, 7, 1);
    run(one);
    cpu::set_num_threads(3);
    Problem many = make_problem(c, 7, 2);
    run(many);
    expect(
        one.out.bytes == many.out.bytes && one.lse == many.lse,
        "other page ids and three threads give the same bits");
  }
}

void test_one_key_gives_its_value() {
  for (auto dtype : {cpu::DType::float32, cpu::DType::float16, cpu::DType::bfloat16}) {
    for (auto kind : {kVectorItem, kWideItem}) {
      Problem p = make_problem({dtype, kind, 1, 1, 2, 2, 32, 32, 8, 0, false}, 3);
      run(p);
      bool same = true;
      for (int h = 0; h < 2; h++) {
        for (int d = 0; d < 32; d++) {
          same &= p.out.get(h * 32 + d) == p.v.get(p.v_at(h, 0, d));
        }
      }
      expect(same, "a row that sees one key returns its value exactly");
    }
  }
}

void test_the_pool_runs_every_unit_once_from_several_callers() {
  cpu::set_pool_size(3);
  std::atomic<bool> right{true};
  auto caller = [&] {
    for (int job = 0; job < 300; job++) {
      std::vector<std::atomic<int>> done(17);
      cpu::run_parallel(
          17, 3, [](void* d, int i) { (*static_cast<std::vector<std::atomic<int>>*>(d))[i]++; }, &done);
      for (auto& n : done) {
        right = right && n == 1;
      }
    }
  };
  std::thread other(caller);
  caller();
  other.join();
  expect(right, "every unit of every job runs once");
}

void test_unknown_isa_is_refused() {
  const std::string before = cpu::isa();
  expect(!cpu::set_isa("vax") && cpu::isa() == before, "an unknown instruction set changes nothing");
}

} // namespace

int main() {
  test_every_isa_agrees_with_the_reference();
  test_page_ids_and_threads_do_not_change_a_bit();
  test_one_key_gives_its_value();
  test_the_pool_runs_every_unit_once_from_several_callers();
  test_unknown_isa_is_refused();
  for (const std::string& isa : cpu::isa_names()) {
    std::printf("%s ", isa.c_str());
  }
  std::printf("%s\n", g_failures ? "failed" : "passed");
  return g_failures != 0;
}
