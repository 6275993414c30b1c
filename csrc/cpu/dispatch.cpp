#include "cpu/dispatch.h"

#include <atomic>

namespace paged_mlx::cpu {

#if defined(__x86_64__)
extern const Kernels kernels_v2, kernels_v3, kernels_v4, kernels_v4_bf16;
#elif defined(__aarch64__)
extern const Kernels kernels_neon;
#else
#error "the CPU backend needs x86-64 or arm64"
#endif

namespace {

struct Isa {
  const char* name;
  const Kernels* kernels;
  bool (*runs)();
};

#if defined(__x86_64__)
bool runs_v3() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
}
bool runs_v4() {
  return runs_v3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl");
}
bool runs_v4_bf16() {
  return runs_v4() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
}

constexpr Isa kIsas[] = {
    {"v2", &kernels_v2, [] { return true; }},
    {"v3", &kernels_v3, runs_v3},
    {"v4", &kernels_v4, runs_v4},
    {"v4_bf16", &kernels_v4_bf16, runs_v4_bf16},
};
#else
constexpr Isa kIsas[] = {{"neon", &kernels_neon, [] { return true; }}};
#endif

const Isa* best() {
  const Isa* found = nullptr;
  for (const Isa& isa : kIsas) {
    if (isa.runs()) {
      found = &isa;
    }
  }
  return found;
}

std::atomic<const Isa*> g_chosen{nullptr};

const Isa* chosen() {
  const Isa* isa = g_chosen.load(std::memory_order_acquire);
  if (!isa) {
    isa = best();
    g_chosen.store(isa, std::memory_order_release);
  }
  return isa;
}

} // namespace

const Kernels& kernels() {
  return *chosen()->kernels;
}

std::string isa() {
  return chosen()->name;
}

std::vector<std::string> isa_names() {
  std::vector<std::string> names;
  for (const Isa& isa : kIsas) {
    if (isa.runs()) {
      names.push_back(isa.name);
    }
  }
  return names;
}

bool set_isa(const std::string& name) {
  if (name.empty()) {
    g_chosen = best();
    return true;
  }
  for (const Isa& isa : kIsas) {
    if (name == isa.name && isa.runs()) {
      g_chosen = &isa;
      return true;
    }
  }
  return false;
}

} // namespace paged_mlx::cpu
