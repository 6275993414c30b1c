// K and V of a layer as mlx-lm's models get them, and the node that reads the
// pages in their place.
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include "mlx/ops.h"

#include "bindings/module.h"
#include "ops/fetch_pages.h"
#include "ops/write_attend.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace paged_mlx {

namespace {

// K or V of a layer, gathered when it is evaluated.
struct GatheredKV : mx::array {
  GatheredKV(mx::array lazy, nb::object source, bool is_key)
      : mx::array(std::move(lazy)), source(std::move(source)), is_key(is_key), made(id()) {}

  // Whether an operation in place (k *= 2) has given it other values.
  bool is_changed() const {
    return id() != made;
  }

  nb::object source;
  bool is_key;
  std::uintptr_t made;
};

// FetchTables as Python holds them. Nodes of the graph hold them apart from Python: MLX's
// thread drops nodes and must not wait for Python's lock.
struct SharedTables {
  std::shared_ptr<const FetchTables> tables;
};

using Table = nb::ndarray<const int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Row = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

SharedTables make_tables(const Table& block_tables, const Row& starts,
                         const std::optional<Row>& counts, int num_tokens, bool written,
                         int num_freed, int page_size, int length, int skip,
                         const std::optional<Table>& page_starts,
                         const std::optional<Table>& page_lens) {
  auto optional = [](const auto& ints) { return ints ? ints->data() : nullptr; };
  return {make_fetch_tables({int(block_tables.shape(0)), int(block_tables.shape(1)),
                             block_tables.data(), int(starts.size()), starts.data(),
                             optional(counts), num_tokens, written, num_freed, page_size, length,
                             skip, optional(page_starts), optional(page_lens)})};
}

// The same K or V. In float32 it stands for the pages still, since nothing is lost.
nb::object as_type(const GatheredKV& handle, mx::Dtype dtype, mx::StreamOrDevice s) {
  auto converted = mx::astype(handle, dtype, s);
  if (dtype != mx::float32 || handle.is_changed()) {
    return nb::cast(std::move(converted));
  }
  return nb::cast(GatheredKV(std::move(converted), handle.source, handle.is_key));
}

nb::tuple fetch(Fetches& fetches, int layer, const nb::object& source, const SharedTables& tables,
                const mx::array& k_pages, const mx::array& v_pages,
                const std::optional<mx::array>& k, const std::optional<mx::array>& v,
                mx::StreamOrDevice s) {
  auto made = fetch_pages(tables.tables, k_pages, v_pages, k, v, s);
  fetches.add(layer, std::move(made.fetch));
  // The tokens under names of their own: what the caller's become in place is not theirs.
  return nb::make_tuple(
      GatheredKV(std::move(made.k), source, true), GatheredKV(std::move(made.v), source, false),
      k ? nb::cast(mx::array(*k)) : nb::none(), v ? nb::cast(mx::array(*v)) : nb::none());
}

// `state`: [k_pages, v_pages] of every layer.
void settle(Fetches& fetches, nb::list state) {
  fetches.settle([&state](int layer, Fetch& fetch) {
    auto arrays = nb::cast<nb::list>(state[layer]);
    auto next = fetch.settle(nb::cast<mx::array>(arrays[0]), nb::cast<mx::array>(arrays[1]));
    arrays[0] = std::move(next[0]);
    arrays[1] = std::move(next[1]);
  });
}

// What K and V of one layer stand for; None for any other two arrays.
nb::object source_of(const nb::handle& k, const nb::handle& v) {
  if (k.type().is(v.type()) && nb::isinstance<GatheredKV>(k)) {
    const auto &keys = *nb::inst_ptr<GatheredKV>(k), &values = *nb::inst_ptr<GatheredKV>(v);
    const bool changed = keys.is_changed() || values.is_changed();
    if (keys.is_key && !values.is_key && keys.source.is(values.source) && !changed) {
      return keys.source;
    }
  }
  return nb::none();
}

} // namespace

void bind_handles(nb::module_& m) {
  nb::class_<GatheredKV, mx::array>(m, "GatheredKV",
                                    "K or V of one layer: a real array, a gather that has not run.")
      .def("astype", &as_type, "dtype"_a, "stream"_a = nb::none(),
           "As mx.array's; in float32 the result stands for the pages still.")
      .def_ro("source", &GatheredKV::source, "The PagesOfLayer it stands for.")
      .def_ro("is_key", &GatheredKV::is_key, "Whether it is K.");
  nb::class_<SharedTables>(m, "FetchTables", "Where a step's K and V lie, for all layers.")
      .def(nb::new_(&make_tables), "block_tables"_a, "starts"_a, "counts"_a.none(), "num_tokens"_a,
           "written"_a, "num_freed"_a, "page_size"_a, "length"_a, "skip"_a, "page_starts"_a.none(),
           "page_lens"_a.none())
      .def_prop_ro(
          "ragged", [](const SharedTables& shared) { return shared.tables->ragged; },
          "Whether pages have lengths of their own.");
  nb::class_<Fetches>(m, "Fetches", "The handles of a pool's layers since its last settling.")
      .def(nb::init<>())
      .def("fetch", &fetch, "layer"_a, "source"_a, "tables"_a, "k_pages"_a, "v_pages"_a,
           "k"_a.none() = nb::none(), "v"_a.none() = nb::none(), "stream"_a = nb::none(),
           "(k, v, new_k, new_v): K and V as GatheredKV of `source`, and the tokens, or None. The "
           "pages hold what they held before the tokens k and v [batch, num_kv_heads, tokens, "
           "dim], and are not written.")
      .def("read_pages", &Fetches::read_pages,
           "Whether a handle has read the pages, or can still be evaluated.")
      .def("clear", &Fetches::clear,
           "Forget the handles: what they read has been read, and they are never evaluated.")
      .def(
          "settle", &settle, "state"_a,
          "Make `state`, [k_pages, v_pages] of every layer, come after every read of the handles.");
  m.def(
      "descriptor", [](const mx::array& a) { return a.id(); }, "a"_a,
      "A number that changes when an operation in place gives the array other values.");
  m.def("source_of", &source_of, "k"_a.none(), "v"_a.none(),
        "The source of a K and a V of one layer; None for any other two arrays.");
  m.def("write_attend", &write_attend, "q"_a, "k_pages"_a, "v_pages"_a, "plan"_a, "k"_a.none(),
        "v"_a.none(), "slots"_a.none(), "scale"_a, "sinks"_a.none() = nb::none(),
        "stream"_a = nb::none(),
        "(out, k_pages', v_pages'): k and v go to their slots, in place, then q attends; all of "
        "them [batch, heads, tokens, dim].");
}

} // namespace paged_mlx
