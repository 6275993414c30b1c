// The launch code behind a C interface, so that tests can drive it with numpy
// arrays: every dispatch goes to a callback that runs the kernel's text.
#include <algorithm>
#include <iterator>
#include <stdexcept>
#include <string>

#include "metal/host_encoder.h"
#include "metal/launch.h"
#include "plan_format.h"

using namespace paged_mlx::metal;

namespace {

struct Memory {
  void* address; // null: not given
  size_t nbytes;
};

struct Dispatch {
  const char* kernel;
  const char* library;
  const char* name;
  const char* text;
  int num_constants;
  const Constant* constants;
  int num_buffers;
  const int* buffer_indices;
  const HostBuffer* buffers;
  int num_bytes;
  const int* bytes_indices;
  const HostBuffer* bytes;
  size_t grid[6];
};

// Returns 0, or 1 when the kernel failed.
using Run = int (*)(const Dispatch*);

HostLaunch launcher(Run run) {
  return [run](const HostDispatch& d) {
    std::vector<int> indices, bytes_indices;
    std::vector<HostBuffer> buffers, bytes;
    for (const auto& [index, buffer] : d.buffers) {
      indices.push_back(index);
      buffers.push_back(buffer);
    }
    for (const auto& [index, data] : d.bytes) {
      bytes_indices.push_back(index);
      bytes.push_back({const_cast<char*>(data.data()), data.size()});
    }
    const std::string library = d.variant.library_name(), name = d.variant.name();
    const std::string text = d.variant.text();
    const Dispatch flat{d.variant.kernel,
                        library.c_str(),
                        name.c_str(),
                        text.c_str(),
                        int(d.variant.constants.size()),
                        d.variant.constants.begin(),
                        int(buffers.size()),
                        indices.data(),
                        buffers.data(),
                        int(bytes.size()),
                        bytes_indices.data(),
                        bytes.data(),
                        {d.groups.x, d.groups.y, d.groups.z, d.group.x, d.group.y, d.group.z}};
    if (run(&flat)) {
      throw std::runtime_error("the kernel failed");
    }
  };
}

template <typename Work>
int guarded(Run run, int limit, Work work) {
  try {
    HostEncoder encoder(launcher(run), limit);
    work(encoder);
    return 0;
  } catch (const std::exception&) {
    return 1;
  }
}

Buffer given(HostEncoder& encoder, Memory memory) {
  return memory.address ? encoder.buffer(memory.address, memory.nbytes) : nullptr;
}

struct PagesRequest {
  Memory k, v, k_pages, v_pages, indices, context_lens, page_starts, page_lens;
  Memory k_scales, k_biases, v_scales, v_biases, open_k, open_v;
  int count, num_kv_heads, page_size, k_row, v_row, max_pages, length;
  int dtype, head_dim, v_head_dim, k_format, v_format, num_sealed, rotated;
};

// What all calls on pages in formats have.
template <typename Call>
void set_formats(Call& call, HostEncoder& e, const PagesRequest& r) {
  call.formats = {paged_mlx::PageFormat(r.k_format), paged_mlx::PageFormat(r.v_format)};
  call.dtype = DType(r.dtype);
  call.head_dim = r.head_dim;
  call.v_head_dim = r.v_head_dim;
  call.k_scales = {given(e, r.k_scales), given(e, r.k_biases)};
  call.v_scales = {given(e, r.v_scales), given(e, r.v_biases)};
}

} // namespace

extern "C" {

struct AttendRequest {
  Memory q, k_pages, v_pages, plan, out, lse, alibi_slopes, sinks, mask;
  int64_t mask_head_stride, mask_token_stride;
  Memory k_scales, k_biases, v_scales, v_biases, open_k, open_v;
  int dtype, mask_kind, head_dim, v_head_dim, k_format, v_format;
  float scale, softcap;
  double node_work; // 0: as the launch code has it
};

int run_attend(Run run, int limit, const AttendRequest* r) {
  return guarded(run, limit, [r](HostEncoder& e) {
    AttendCall call{};
    call.dtype = DType(r->dtype);
    call.q = given(e, r->q);
    call.k_pages = given(e, r->k_pages);
    call.v_pages = given(e, r->v_pages);
    call.plan = given(e, r->plan);
    call.words = static_cast<const int32_t*>(r->plan.address);
    call.out = given(e, r->out);
    call.lse = given(e, r->lse);
    call.head_dim = r->head_dim;
    call.v_head_dim = r->v_head_dim;
    call.options = {r->scale, r->softcap, r->alibi_slopes.address != nullptr,
                    r->sinks.address != nullptr, paged_mlx::MaskKind(r->mask_kind)};
    call.alibi_slopes = given(e, r->alibi_slopes);
    call.sinks = given(e, r->sinks);
    call.mask = given(e, r->mask);
    call.formats = {paged_mlx::PageFormat(r->k_format), paged_mlx::PageFormat(r->v_format)};
    call.k_scales = {given(e, r->k_scales), given(e, r->k_biases)};
    call.v_scales = {given(e, r->v_scales), given(e, r->v_biases)};
    call.open_k = given(e, r->open_k);
    call.open_v = given(e, r->open_v);
    call.mask_head_stride = r->mask_head_stride;
    call.mask_token_stride = r->mask_token_stride;
    set_node_work(r->node_work);
    const auto ranges = cut_items(call.words, call.head_dim + call.v_head_dim);
    const auto& plan = *reinterpret_cast<const paged_mlx::PlanHeader*>(call.words);
    if (ranges.size() > 1 && plan.num_partials > 0) {
      const size_t rows = size_t(plan.num_partials) * plan.num_q_heads;
      call.partial_out = e.temporary(rows * call.v_head_dim * sizeof(float));
      call.partial_state = e.temporary(rows * 2 * sizeof(float));
    }
    for (const ItemRange& range : ranges) {
      call.items = range;
      attend(e, call);
    }
    set_node_work(0);
  });
}

int run_write_pages(Run run, int limit, const PagesRequest* r) {
  return guarded(run, limit, [r](HostEncoder& e) {
    WritePagesCall call{given(e, r->k),       given(e, r->v),       given(e, r->k_pages),
                        given(e, r->v_pages), given(e, r->indices), r->count,
                        r->num_kv_heads,      r->page_size,         {r->k_row, r->v_row}};
    set_formats(call, e, *r);
    write_pages(e, call);
  });
}

int run_seal_pages(Run run, int limit, const PagesRequest* r) {
  return guarded(run, limit, [r](HostEncoder& e) {
    SealPagesCall call{};
    call.k = given(e, r->k);
    call.v = given(e, r->v);
    call.rotated = r->rotated;
    call.k_pages = given(e, r->k_pages);
    call.v_pages = given(e, r->v_pages);
    call.pairs = given(e, r->indices);
    call.num_pairs = r->count;
    call.num_kv_heads = r->num_kv_heads;
    call.page_size = r->page_size;
    set_formats(call, e, *r);
    seal_pages(e, call);
  });
}

int run_gather_pages(Run run, int limit, const PagesRequest* r) {
  return guarded(run, limit, [r](HostEncoder& e) {
    GatherPagesCall call{given(e, r->k_pages),
                         given(e, r->v_pages),
                         given(e, r->indices),
                         given(e, r->context_lens),
                         given(e, r->page_starts),
                         given(e, r->page_lens),
                         given(e, r->k),
                         given(e, r->v),
                         r->count,
                         r->max_pages,
                         r->length,
                         r->num_kv_heads,
                         r->page_size,
                         {r->k_row, r->v_row}};
    set_formats(call, e, *r);
    call.open_k = given(e, r->open_k);
    call.open_v = given(e, r->open_v);
    call.num_sealed = r->num_sealed;
    gather_pages(e, call);
  });
}

int run_copy_pages(Run run, int limit, int num_pools, const Memory* pools,
                   const int64_t* page_bytes, Memory pairs, int num_pairs) {
  return guarded(run, limit, [=](HostEncoder& e) {
    CopyPagesCall call;
    for (int i = 0; i < num_pools; i++) {
      call.pools.push_back(given(e, pools[i]));
      call.page_bytes.push_back(page_bytes[i]);
    }
    call.pairs = given(e, pairs);
    call.num_pairs = num_pairs;
    copy_pages(e, call);
  });
}

int run_merge_states(Run run, int limit, int dtype, int parts, const Memory* outs,
                     const Memory* lses, Memory out, Memory lse, int64_t rows, int dim) {
  return guarded(run, limit, [=](HostEncoder& e) {
    MergeStatesCall call{};
    call.dtype = DType(dtype);
    for (int i = 0; i < parts; i++) {
      call.outs.push_back(given(e, outs[i]));
      call.lses.push_back(given(e, lses[i]));
    }
    call.out = given(e, out);
    call.lse = given(e, lse);
    call.rows = rows;
    call.dim = dim;
    merge_states(e, call);
  });
}

int run_copy_buffer(Run run, int limit, Memory from, Memory to, int64_t bytes) {
  return guarded(run, limit,
                 [=](HostEncoder& e) { copy_buffer(e, given(e, from), given(e, to), bytes); });
}

void choose_body_of(int rows, int head_dim, int v_head_dim, int dtype, int k, int v, Body* body) {
  const paged_mlx::PageFormats formats{paged_mlx::PageFormat(k), paged_mlx::PageFormat(v)};
  const auto most = kind_rows(head_dim, v_head_dim, DType(dtype), formats);
  const auto kind = paged_mlx::kind_of(rows, most);
  *body = choose_body(kind, rows, head_dim, v_head_dim, DType(dtype), formats);
}

// Whether variants are the same where each of their parts is, and only there.
int variants_are_told_apart() {
  const auto one = [](const char* kernel = "merge") { return Variant{kernel, {}, {}}; };
  const std::string kernel = "merge", word = "half"; // that lie elsewhere
  const Variant variant = one().define("T", "half").define("D", 64).set(1, true);
  const Variant others[] = {one("merge_states").define("T", "half").define("D", 64).set(1, true),
                            one().define("U", "half").define("D", 64).set(1, true),
                            one().define("T", "have").define("D", 64).set(1, true),
                            one().define("T", "half").define("D", 65).set(1, true),
                            one().define("T", "half").set(1, true),
                            one().define("T", "half").define("D", 64).set(2, true),
                            one().define("T", "half").define("D", 64).set(1, 1),
                            one().define("T", "half").define("D", 64).set(1, false),
                            one().define("T", "half").define("D", 64).set(1, true).set(2, true)};
  return variant == one(kernel.c_str()).define("T", word.c_str()).define("D", 64).set(1, true) &&
      std::count(std::begin(others), std::end(others), variant) == 0;
}
}
