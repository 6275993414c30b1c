// attend(): the items of a plan over the thread pool, then the merges.
#include "cpu/attention.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <new>

#include "cpu/dispatch.h"
#include "cpu/job.h"
#include "cpu/machine.h"
#include "cpu/thread_pool.h"

namespace paged_mlx::cpu {

namespace {

// What one microsecond of one thread does, to tell small jobs from large ones.
constexpr double kBytesPerMicrosecond = 18e3;
constexpr double kFlopsPerMicrosecond = 80e3;
constexpr double kMicrosecondsPerThread = 50; // less is not worth waking a thread for
constexpr int kMergesPerUnit = 16;

// Memory that a thread keeps from call to call. In a huge page where there are any: then
// what a kernel uses at a time lies in different sets of its caches.
class Workspace {
 public:
  ~Workspace() {
    std::free(data_);
  }
  char* get(size_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      size_ = (bytes + kHugePage - 1) / kHugePage * kHugePage;
      data_ = static_cast<char*>(std::aligned_alloc(kHugePage, size_));
      if (!data_) {
        size_ = 0;
        throw std::bad_alloc();
      }
      use_huge_pages(data_, size_);
    }
    return data_;
  }

 private:
  char* data_ = nullptr;
  size_t size_ = 0;
};

int num_items(const PlanHeader& plan) {
  return plan.num_items[kVectorItem] + plan.num_items[kTileItem] + plan.num_items[kWideItem];
}

bool has_vnni() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

// The work over sealed pages, or over open ones.
Job make_job(const AttentionArgs& args, bool open) {
  const int32_t* const words = args.plan;
  const auto* const plan = reinterpret_cast<const PlanHeader*>(words);
  Job job{};
  job.dtype = args.dtype;
  job.q = args.q;
  job.k_pages = open ? args.open_k.pages : args.k.pages;
  job.v_pages = open ? args.open_v.pages : args.v.pages;
  const bool dense = args.k.format == PageFormat::dense && args.v.format == PageFormat::dense;
  job.k = open || dense ? nullptr : &args.k;
  job.v = open || dense ? nullptr : &args.v;
  job.multiplies_codes = has_vnni();
  job.rotated = args.v.rotated;
  job.out = args.out;
  job.lse = args.lse;
  job.plan = plan;
  job.items = reinterpret_cast<const PlanItem*>(words + plan->items);
  job.row_tokens = words + plan->row_tokens;
  job.positions = words + plan->positions;
  job.row_ends = words + plan->row_ends;
  job.pages = words + plan->pages;
  job.page_starts = plan->page_starts ? words + plan->page_starts : nullptr;
  job.page_lens = plan->page_lens ? words + plan->page_lens : nullptr;
  job.merges = reinterpret_cast<const PlanMerge*>(words + plan->merges);
  job.parts = words + plan->parts;
  job.num_q_heads = plan->num_q_heads;
  job.num_kv_heads = plan->num_kv_heads;
  job.gqa_factor = plan->num_q_heads / plan->num_kv_heads;
  job.page_size = plan->page_size;
  job.head_dim = args.k.dim;
  job.v_head_dim = args.v.dim;
  job.sliding_window = plan->sliding_window;
  job.options = args.options;
  job.alibi_slopes = args.options.alibi ? args.alibi_slopes : nullptr;
  job.sinks = args.options.sinks ? args.sinks : nullptr;
  job.mask = args.options.mask == MaskKind::none ? nullptr : &args.mask;
  job.plain = job.options.is_plain() && job.options.scale > 0;
  job.score_unit = job.plain ? job.options.scale : 1.0f;
  job.partial_stride = (args.v.dim + kDimAlign - 1) / kDimAlign * kDimAlign;
  return job;
}

// Bytes of one token of one head, roughly: without its scales.
double row_bytes(const PageSide& side) {
  const int bits = code_bits(side.format);
  return side.dim * (bits ? bits / 8.0 : side.dtype == DType::float32 ? 4 : 2);
}

// Time that the items take on one thread, roughly.
double estimate_microseconds(const Job& job, double key_bytes) {
  double bytes = 0, flops = 0;
  const double dims = job.head_dim + job.v_head_dim;
  for (int i = 0; i < num_items(*job.plan); i++) {
    const PlanItem& item = job.items[i];
    const double keys = double(item.key_end - item.key_begin);
    bytes += keys * job.num_kv_heads * key_bytes;
    flops += keys * item.row_count * job.num_q_heads * dims * 2;
  }
  return std::max(bytes / kBytesPerMicrosecond, flops / kFlopsPerMicrosecond);
}

// One call in flight: what a unit of work needs. A unit never throws, so that every
// thread comes back: what it found no memory for is told to the caller afterwards.
struct Call {
  Job job;  // over sealed pages
  Job open; // over open ones
  const Kernels* kernels;
  int dtype;
  size_t scratch_bytes = 0;
  int wide_units = 0; // (wide item, KV head) pairs come first, then the other items
  int other_items = 0;
  std::atomic<bool> out_of_memory{false};

  // Of the calling thread; null when there is no memory for it.
  char* scratch() {
    thread_local Workspace workspace;
    try {
      return workspace.get(scratch_bytes);
    } catch (const std::bad_alloc&) {
      out_of_memory = true;
      return nullptr;
    }
  }

  void attend(int unit) {
    char* const memory = scratch();
    if (!memory) {
      return;
    }
    const bool wide = unit < wide_units;
    const int item = wide ? other_items + unit / job.num_kv_heads : unit - wide_units;
    const Job& of_item = is_open(item) ? open : job;
    const int body = of_item.k ? int(DType::float32) : dtype;
    if (wide) {
      kernels->attend_wide[body](of_item, item, unit % job.num_kv_heads, memory);
    } else {
      kernels->attend_tile[body](of_item, item, memory);
    }
  }

  // Items over open pages are the last of their kind.
  bool is_open(int item) const {
    int end = 0;
    for (int kind = 0; kind < kNumPlanKinds; kind++) {
      end += job.plan->num_items[kind];
      if (item < end) {
        return item >= end - job.plan->num_open_items[kind];
      }
    }
    return false;
  }

  void merge(int unit) {
    const int begin = unit * kMergesPerUnit;
    const int end = std::min(begin + kMergesPerUnit, job.plan->num_merges);
    if (char* const memory = scratch()) {
      kernels->merge[dtype](job, begin, end, memory); // partial results lie as those of dtype
    }
  }

  // Every unit of attend or of merge, on as many threads.
  void run(int units, int threads, void (*unit)(void* call, int i)) {
    run_parallel(units, threads, unit, this);
    if (out_of_memory) {
      throw std::bad_alloc();
    }
  }
};

void place_partials(Job& job, Workspace& workspace) {
  const size_t states = size_t(job.plan->num_partials) * job.num_q_heads;
  if (states == 0) {
    return;
  }
  auto* const at =
      reinterpret_cast<float*>(workspace.get(states * (job.partial_stride + 2) * sizeof(float)));
  job.partial_acc = at;
  job.partial_max = at + states * job.partial_stride;
  job.partial_sum = job.partial_max + states;
}

} // namespace

void attend(const AttentionArgs& args) {
  thread_local Workspace partials;
  Call call{make_job(args, false), make_job(args, true), &kernels(), int(args.dtype)};
  const PlanHeader& plan = *call.job.plan;
  call.scratch_bytes = call.kernels->scratch_bytes(call.job);
  call.wide_units = plan.num_items[kWideItem] * plan.num_kv_heads;
  call.other_items = plan.num_items[kVectorItem] + plan.num_items[kTileItem];
  place_partials(call.job, partials);
  place_partials(call.open, partials);

  const double time = estimate_microseconds(call.job, row_bytes(args.k) + row_bytes(args.v));
  const int threads =
      std::clamp(int(std::min(time / kMicrosecondsPerThread, 1e6)), 1, num_threads());
  call.job.prefetch_next_item = call.open.prefetch_next_item = threads == 1;
  call.run(call.wide_units + call.other_items, threads,
           [](void* context, int i) { static_cast<Call*>(context)->attend(i); });
  const int merge_units = (plan.num_merges + kMergesPerUnit - 1) / kMergesPerUnit;
  call.run(merge_units, threads,
           [](void* context, int i) { static_cast<Call*>(context)->merge(i); });
}

void set_num_threads(int n) {
  set_pool_size(n);
}

int num_threads() {
  return pool_size();
}

} // namespace paged_mlx::cpu
