"""K and V of all layers in pages, and their linear versions.

MLX evaluates by dependency, not in program order. So every access to a layer's
pages consumes the newest version of its arrays and returns the next one, which
shares the same memory: each order that matters is an edge of the graph, and
nothing is ever copied (docs/design.md, "Linear versions").
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NoReturn, overload

import mlx.core as mx
import numpy as np

from paged_mlx import operations
from paged_mlx._native import _ext
from paged_mlx.attention_plan import AttentionPlan, PlanOptions, make_plan, runs_kernels
from paged_mlx.errors import (
    MAX_INT32,
    as_list,
    check_flag,
    check_kind,
    fail,
    holders,
    kind_of,
    whole_number,
)
from paged_mlx.formats.open_pages import OpenPages, Split
from paged_mlx.formats.page_format import PageFormats, open_arrays, page_arrays, sides_of
from paged_mlx.host_arrays import Ints, gather_inputs, host_ints, pair_array, slot_array
from paged_mlx.machine.first_use import Known
from paged_mlx.machine.memory import MAX_BYTES, pages_within
from paged_mlx.machine.memory import memory_limit as default_memory_limit
from paged_mlx.options import (
    AttentionOptions,
    Geometry,
    check_array,
    check_head_dim,
    check_number,
    check_stream,
)
from paged_mlx.pages.append import Appended
from paged_mlx.pages.block_table import BlockTable, PackedTables
from paged_mlx.pages.canary import Canary
from paged_mlx.pages.policies import PageAllocator
from paged_mlx.pages.pool_map import PoolMap, page_figures
from paged_mlx.pages.table import PageTable, maps_of
from paged_mlx.pool_storage import PoolStorage

MOST_PLANS = 16  # that a pool remembers, one for each kind of layer

# What allocators and this package call, and no program.
_WITHIN = {
    "appended", "attached", "attend", "before_append", "check_tokens", "copied", "detached", "freed",
    "gather", "known", "num_sealed", "open_pages", "plan_for", "plan_packed", "remember", "reserve", "told",
    "wants_appends", "wants_freed", "write_values",
}  # fmt: skip


class _OfALayer:
    """An attribute that a pool lacks and its layers have; ``__getattr__`` would slow all others."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, pool: object, owner: type) -> NoReturn:
        hint = f"use pool[layer].{self.name}"
        raise AttributeError(f"PagePool has no attribute {self.name!r}: {hint}")


class PagePool:
    """K and V of all layers, in pages of one size, written in place.

    ``pool[layer]`` is one layer. ``state`` holds the newest versions of all layers' arrays,
    ``[[k0, v0], [k1, v1], ...]``, each ``[num_pages, num_kv_heads, page_size, head_dim]``: a
    tree that ``mx.eval`` and ``mx.compile`` take. Evaluate it with the outputs of a step
    (``mx.async_eval(out, pool.state)``) when a write may have no reader. A quantised side has
    codes, scales and biases in place of one array (docs/formats.md).

    One thread uses a pool at a time; it may pass to another only when ``state`` is
    evaluated.

    Args:
        num_layers: Layers.
        num_pages: Pages; one page id serves every layer.
        page_size: Tokens in a page.
        num_kv_heads: Heads of K and V.
        head_dim: head_dim of K, and of V unless ``v_head_dim`` says otherwise: a multiple of
            8 up to 256, or 512.
        dtype: float32, float16 or bfloat16.
        v_head_dim: head_dim of V.
        k_format, v_format: None, ``"q8"`` or ``"q4"``: how K, and V, are held. ``k_format="q4"``
            quantises a page as a whole when it is full; 64 tokens suit it.
        allocator: The PageAllocator to attach to: its copy-on-write copies the page in every
            layer. None: the pool has one of its own, until it is attached to another.
        fill: Value of fresh pages; NaN shows reads of slots nobody wrote.
        wipe_freed: Value to write over pages when their last holder lets go; None leaves
            stale bytes, which nothing can read by right.
        canary: Remember who wrote each slot and verify reads; see ``Canary``.
        memory_limit: Bytes that all arrays of MLX may take once the pool is made or has
            grown; default ``paged_mlx.memory_limit``.
        stream: Stream or device of every operation.

    Raises:
        ValueError: A size or dtype is wrong; the message says why.
        OutOfPages: The pages would pass the memory limit, or there is no memory for them.

    Examples:
        >>> pool = PagePool(2, 8, 16, 2, 64)
        >>> table = PageTable(16)
        >>> slots = table.append_tokens(3, pool.allocator).slots
        >>> k = v = mx.ones((3, 2, 64), mx.float16)
        >>> plan = pool.plan([table], num_q_heads=4)
        >>> for layer in range(2):
        ...     pool[layer].write(k, v, slots)
        ...     out = pool[layer].attend(mx.ones((1, 4, 64), mx.float16), plan)
        >>> out.shape
        (1, 4, 64)
    """

    def __init__(
        self,
        num_layers: int,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: mx.Dtype = mx.float16,
        v_head_dim: int | None = None,
        *,
        k_format: str | None = None,
        v_format: str | None = None,
        allocator: PageAllocator | None = None,
        fill: float = 0.0,
        wipe_freed: float | None = None,
        canary: bool = False,
        memory_limit: int | None = None,
        stream: mx.Stream | mx.Device | None = None,
    ):
        num_kv_heads = whole_number("PagePool", "num_kv_heads", num_kv_heads, 1)
        geometry = Geometry(
            num_kv_heads,
            num_kv_heads,
            whole_number("PagePool", "page_size", page_size, 1),
            check_head_dim("PagePool", "head_dim", head_dim),
            check_head_dim(
                "PagePool", "v_head_dim", head_dim if v_head_dim is None else v_head_dim
            ),
            dtype,
            PageFormats(k_format, v_format),
        )
        geometry.check("PagePool")
        self.num_layers = whole_number("PagePool", "num_layers", num_layers, 1)
        num_pages = whole_number("PagePool", "num_pages", num_pages, 1)
        check_number("PagePool", "fill", fill)
        if wipe_freed is not None:
            check_number("PagePool", "wipe_freed", wipe_freed)
        canary = check_flag("PagePool", "canary", canary)
        check_stream("PagePool", stream)
        if geometry.formats.rotate and fill:  # NaN is true
            if fill == fill:
                fail("PagePool", 'fill must be 0 or NaN for v_format="q4"', fill)
        if allocator is not None:
            check_kind("PagePool", "allocator", allocator, PageAllocator)
        if memory_limit is None:
            memory_limit = default_memory_limit()
        self.page_size = geometry.page_size
        self.num_kv_heads = geometry.num_kv_heads
        self.head_dim = geometry.head_dim
        self.v_head_dim = geometry.v_head_dim
        self.dtype = dtype
        self._geometry = geometry
        self.memory_limit = whole_number("PagePool", "memory_limit", memory_limit, 0, MAX_BYTES)
        self.stream = stream
        sizes = geometry.page_sizes
        fills = []
        for side in self.formats:
            fills += [fill] if side is None else [0.0, 0.0, fill]
        self._storage = PoolStorage(
            self.num_layers,
            num_pages,
            page_arrays(self.formats, *sizes),
            fills,
            open_arrays(self.formats, *sizes),
            self.memory_limit,
            stream,
        )
        #: What operations are told beside the arrays.
        self.told: dict[str, Any] = self.formats.told
        self.open_pages: OpenPages | None = None
        if self.formats.have_open_pages:
            num_open = self._storage.num_open
            self.open_pages = OpenPages(self.num_layers, num_pages, self.page_size, num_open)
        self.state = [list(arrays) for arrays in self._storage.base]
        self.known: Known = {}  # calls whose kernels have been proven
        self.wipe_freed = wipe_freed
        self.canary: Canary | None = None
        self._allocator: PageAllocator | None = None
        self._owns_allocator = False
        self._wants_canary = canary
        self._batch = BlockTable()
        self._plans: dict[tuple, tuple[PackedTables, AttentionPlan]] = {}
        self._writes: list[np.ndarray] = []
        self.num_sealed = 0  #: open pages that were quantised so far
        self._translated: tuple = (None, 0, None)  # tables, version of the open pages, result
        self._tokens_stored = np.zeros(num_pages, np.int32)
        if allocator is not None:
            allocator.attach(self)
        elif canary:
            self._own_allocator()

    @property
    def allocator(self) -> PageAllocator:
        """Who counts the holders of the pages: the one attached to, or the pool's own."""
        return self._own_allocator() if self._allocator is None else self._allocator

    def _own_allocator(self) -> PageAllocator:
        allocator = PageAllocator(self.num_pages, self.page_size)
        allocator.attach(self)
        self._owns_allocator = True
        return allocator

    @property
    def formats(self) -> PageFormats:
        """The formats of K and V."""
        return self._geometry.formats

    @formats.setter
    def formats(self, formats: object) -> None:
        must = f"formats must stay {self.formats}, which the pages hold: make another pool"
        fail("PagePool", must, repr(formats))

    # Size

    @property
    def num_pages(self) -> int:
        return self._storage.num_pages

    @property
    def nbytes(self) -> int:
        """Bytes of all pages of all layers, open ones included."""
        return self._storage.nbytes

    @property
    def page_nbytes(self) -> int:
        """Bytes of one page id, K and V, all layers."""
        return self._storage.page_nbytes

    def pages_within(self, nbytes: int | None = None) -> int:
        """Return how many pages like this pool's fit in ``nbytes``, default its memory limit.

        A limit for ``PageAllocator(..., max_pages=...)``.
        """
        return pages_within(
            self.memory_limit if nbytes is None else nbytes,
            num_layers=self.num_layers,
            page_size=self.page_size,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            dtype=self.dtype,
            v_head_dim=self.v_head_dim,
            k_format=self.formats.k,
            v_format=self.formats.v,
        )

    def grow(self, num_pages: int) -> None:
        """Add pages; those that exist keep their ids and contents.

        Raises:
            ValueError: ``num_pages`` is less than there are.
            OutOfPages: They would pass the memory limit, or there is no memory; the pool is
                as it was.
        """
        before = self.num_pages
        num_pages = whole_number("PagePool.grow", "num_pages", num_pages, before)
        if num_pages > before:
            self._storage.lengthen(self.state, num_pages, self.memory_limit)
            if self.open_pages is not None:
                self.open_pages.resize(num_pages)
            self._plans.clear()
            self._fold_writes()
            self._tokens_stored = np.pad(self._tokens_stored, (0, num_pages - before))

    def shrink(self, num_pages: int) -> None:
        """Drop the pages with ids from ``num_pages`` on and give their memory back.

        Raises:
            ValueError: ``num_pages`` is not in [1, the pages there are], or less than its
                allocator has.
        """
        num_pages = whole_number("PagePool.shrink", "num_pages", num_pages)
        if not 1 <= num_pages <= self.num_pages:
            fail("PagePool.shrink", f"num_pages must be in [1, {self.num_pages}]", num_pages)
        if self._owns_allocator and not self.allocator.num_used:
            self.allocator.detach(self)  # the next one has as many pages as there will be
        if self._allocator is not None and num_pages < self._allocator.total_pages:
            must = "num_pages must be at least the allocator's total_pages: have that shrink"
            fail("PagePool.shrink", must, f"{num_pages} of {self._allocator.total_pages}")
        if num_pages < self.num_pages:
            self._storage.shorten(self.state, num_pages)
            if self.open_pages is not None:
                self.open_pages.resize(num_pages)
                self._storage.drop_open(self.state, self.open_pages.drop_slots())
            self._plans.clear()
            self._fold_writes()
            self._tokens_stored = self._tokens_stored[:num_pages].copy()

    # Access, each the next link of the chain

    def plan(
        self,
        tables: Sequence[PageTable],
        *,
        num_q_heads: int,
        query_lens: Ints | None = None,
        sliding_window: int | None = None,
        causal: bool = True,
        previous: AttentionPlan | None = None,
        share_prefixes: bool = True,
        fixed_partition: int | None = None,
        workers: int | None = None,
    ) -> AttentionPlan:
        """Cut one step of attention into work items, once for all layers of one kind.

        The pool remembers its last plan of each kind of layer: asked again for the same tables
        as they are, it gives that plan; after a step that only made contexts longer inside
        their pages, it moves it on.

        Args:
            tables: One table for each sequence, on the pool's allocator; the tokens of this
                step have been appended.
            num_q_heads: Heads of q.
            query_lens: ``int32 [batch]``, this step's tokens of each sequence; None: one each.
            sliding_window: Keys a token may see, its own included. None: all.
            causal: A token sees no key behind its own position.
            previous: A plan to move on in place of the one remembered.
            share_prefixes: Let sequences that begin with the same pages read them once.
            fixed_partition: Cut at multiples of this many tokens and share nothing, so that a
                sequence's result has the same bits whatever the batch holds.
            workers: Items that can run at once. None: those of the device.

        Raises:
            ValueError: An argument is wrong, or a page that a token may see was
                given back.
        """
        return self.plan_for(
            "plan", tables, num_q_heads, query_lens, sliding_window, causal,
            previous, share_prefixes, fixed_partition, workers,
        )  # fmt: skip

    def plan_for(
        self,
        op: str,
        tables: Sequence[PageTable],
        num_q_heads: int,
        query_lens: Ints | None,
        sliding_window: int | None,
        causal: bool,
        previous: AttentionPlan | None = None,
        share_prefixes: bool = True,
        fixed_partition: int | None = None,
        workers: int | None = None,
    ) -> AttentionPlan:
        """``plan`` for a function whose name errors give."""
        lens = None if query_lens is None else host_ints(op, "query_lens", query_lens).tolist()
        packed = self._batch.update(tables, lens)
        open_pages = self.open_pages
        if open_pages is not None:
            packed = self._with_open_pages(tables, packed)
        kernels = runs_kernels(self.stream)
        kind, remembered = None, None
        if (
            type(num_q_heads) is int
            and (sliding_window is None or type(sliding_window) is int)
            and (causal is True or causal is False)
            and (share_prefixes is True and fixed_partition is None and workers is None)
        ):  # then equal kinds are equal plans
            kind = num_q_heads, sliding_window, causal, kernels, _ext.num_threads()
            remembered = self._plans.get(kind)
            if remembered is not None and remembered[0] is packed and previous is None:
                return remembered[1]
        geometry = Geometry(num_q_heads, *self._geometry[1:])
        options = PlanOptions(
            self._storage.num_pages + self._storage.num_open,
            causal,
            sliding_window,
            share_prefixes,
            fixed_partition,
            workers,
            kernels,
            -1 if open_pages is None else self._storage.num_pages,
        )
        if remembered is None and (
            kind is None
            or not 0 < num_q_heads <= MAX_INT32
            or num_q_heads % self.num_kv_heads
            or not (sliding_window is None or 0 < sliding_window <= MAX_INT32)
        ):
            geometry.check(op)
            options.check(op)
        if remembered is not None and previous is None:
            previous = remembered[1]
        made = self._plan(op, tables, packed, geometry, options, previous)
        if kind is not None:
            self._plans[kind] = packed, made
        return made

    def _with_open_pages(self, tables: Sequence[PageTable], packed: PackedTables) -> PackedTables:
        """Tables as kernels read them, where open pages have ids of their own."""
        open_pages = self.open_pages
        assert open_pages is not None
        before, version, made = self._translated
        if before is packed and version == open_pages.version:
            return made
        unknown = open_pages.unknown(packed.block_tables)
        if unknown.any():
            for row in np.flatnonzero(unknown.any(1)).tolist():
                pages = tables[row].map
                for entry in range(pages.num_freed, len(pages.ids)):
                    tokens = pages.start(entry + 1) - pages.start(entry)
                    self._take_in({pages.ids[entry]: tokens})
        made = replace(packed, block_tables=open_pages.kernel_ids(packed.block_tables))
        self._translated = packed, open_pages.version, made
        return made

    def _take_in(self, pages: dict[int, int]) -> None:
        """Have a place for pages that no append told of, with as many tokens each."""
        open_pages = self.open_pages
        assert open_pages is not None
        new = {p: n for p, n in pages.items() if open_pages.unknown(np.array(p))}
        self.reserve(sum(n < self.page_size for n in new.values()))
        for page_id, num_tokens in new.items():
            open_pages.begin(page_id, num_tokens)
        self._note_sealed([p for p, n in new.items() if n >= self.page_size])

    def __getitem__(self, layer: int) -> PoolLayer:
        """One layer: its arrays, and a mapping page_id -> PageBlock of its pages."""
        if type(layer) is not int or not 0 <= layer < self.num_layers:
            layer = self._layer_index(layer)
        return PoolLayer(self, layer)

    def __len__(self) -> int:
        return self.num_layers

    def __iter__(self) -> Iterator[PoolLayer]:
        """The layers, in order."""
        return (PoolLayer(self, layer) for layer in range(self.num_layers))

    if not TYPE_CHECKING:
        attend, gather = _OfALayer(), _OfALayer()

    def write(self, layer: int, k: mx.array, v: mx.array, slot_mapping: Ints | SlotMapping) -> None:
        """``pool[layer].write(k, v, slot_mapping)``."""
        self[layer].write(k, v, slot_mapping)

    def copy(self, pairs: Ints) -> None:
        """Copy whole pages in all layers, in one operation, before any later write.

        Args:
            pairs: ``[(source, target), ...]`` page ids.

        Raises:
            ValueError: An id is outside the pool, a target is named twice or is a source.
        """
        if pair_array("PagePool.copy", pairs, self.num_pages).shape[0]:
            self.copied(np.asarray(pairs).tolist())

    def slots(self, slot_mapping: Ints | SlotMapping) -> SlotMapping:
        """``slot_mapping`` checked against this pool, for use with every layer."""
        num_slots = self.num_pages * self.page_size
        if isinstance(slot_mapping, SlotMapping):
            if slot_mapping.num_slots > num_slots:
                must = f"slot_mapping must be for at most {num_slots} slots"
                fail("write", must, slot_mapping.num_slots)
            return slot_mapping
        if isinstance(slot_mapping, Appended):
            must = "slot_mapping must be slots: give appended.slots"
            fail("write", must, "all that the append returned")
        made = SlotMapping(slot_mapping, self._storage.base[0][0])
        if self.open_pages is not None:
            made.split = self._split(made)
        return made

    def _split(self, slots: SlotMapping) -> Split:
        """Which tokens of a write go to open pages, and which fill pages as a whole."""
        assert self.open_pages is not None
        if slots.values is None:
            must = (
                'slot_mapping must be known when the step is built, because k_format="q4" writes '
                "to open pages: append and write outside of mx.compile"
            )
            fail("write", must, "a traced array")
        pages, counts = np.unique(
            slots.values[slots.values >= 0] // self.page_size, return_counts=True
        )
        if self.open_pages.unknown(pages).any():  # nobody appended: this is the step's beginning
            self.before_append(pages.tolist())
            self._take_in(dict(zip(pages.tolist(), counts.tolist())))
        return self.open_pages.split("write", slots.values)

    def check_tokens(self, k: mx.array, v: mx.array, slots: SlotMapping) -> None:
        """Refuse tokens that are not one for each slot, of this pool's sizes.

        Raises:
            ValueError: The message says which.
        """
        for name, x, dim in (("k", k, self.head_dim), ("v", v, self.v_head_dim)):
            check_array("write", name, x)
            shape = (slots.array.size, self.num_kv_heads, dim)
            if x.shape != shape:
                must = f"{name} must have shape [tokens, num_kv_heads, head_dim] = {list(shape)}"
                fail("write", must, x.shape)
            if x.dtype != self.dtype:
                fail("write", f"{name} must have the pool's dtype, {self.dtype}", x.dtype)

    def plan_packed(
        self,
        packed: PackedTables,
        num_q_heads: int,
        sliding_window: int | None,
        previous: AttentionPlan | None,
    ) -> AttentionPlan:
        """A plan for tables that are packed already, whose pages all have their places."""
        num_open, num_sealed = self._storage.num_open, -1
        if self.open_pages is not None:
            num_sealed = self.num_pages
            tables = self.open_pages.kernel_ids(packed.block_tables)
            packed = replace(packed, block_tables=tables)
        geometry = Geometry(num_q_heads, *self._geometry[1:])
        options = PlanOptions(
            self.num_pages + num_open, True, sliding_window, kernels=runs_kernels(self.stream),
            num_sealed_pages=num_sealed,
        )  # fmt: skip
        geometry.check("plan")
        return make_plan("plan", packed, geometry, options, previous)

    def write_values(
        self, arrays: list[mx.array], layer: int, k: mx.array, v: mx.array, slots: SlotMapping
    ) -> None:
        """Write checked tokens of one layer, whose newest ``arrays`` become the next."""
        where: dict[str, Any] = {"stream": self.stream, "known": self.known}
        open_pages = self.open_pages
        if slots.split is None or open_pages is None:
            arrays[:] = operations.write_pages(
                [k, v], arrays, slots.array, alias=True, **where, **self.told
            )
            return
        split = slots.split
        if split.whole_pages.size:
            whole = mx.array(split.whole_tokens)
            sources = [x[whole].swapaxes(1, 2) for x in (k, v)]
            count = len(split.whole_pages)
            pairs = np.stack(
                [np.arange(count), split.whole_pages, np.full(count, self.page_size)], axis=1
            )
            (arrays[:],) = operations.seal_pages(
                sources, [arrays], mx.array(pairs.astype(np.int32)), rotated=False, **where,
                **self.told,
            )  # fmt: skip
        if split.slots.size:
            tokens = [k, v]
            if split.tokens is not None:
                chosen = mx.array(split.tokens)
                tokens = [x[chosen] for x in tokens]
            arrays[:] = operations.write_pages(
                tokens, arrays, mx.array(split.slots), alias=True, **where, **self.told
            )
        open_pages.wrote(layer, split)

    def seal(self, page_ids: Sequence[int] | None = None) -> list[int]:
        """Quantise open pages now, with the tokens that they have: they take no more.

        For part-filled pages that wait for nobody. Full ones are sealed by the next append. Call
        it between steps: a plan that was made before names their old places.

        Args:
            page_ids: Open pages. None: those that only caches hold.

        Returns:
            The pages that were sealed.

        Raises:
            ValueError: A page is not open, or has tokens that not all layers have written.
        """
        open_pages = self.open_pages
        if open_pages is None:
            fail("PagePool.seal", 'pool must have k_format="q4", to have open pages', self.formats)
        if page_ids is None:
            if open_pages.is_awaiting or self._allocator is None:
                return []
            held, counts = self._allocator.evictors.held, self._allocator.counts
            page_ids = [p for p in held if counts[p] == 1 and open_pages.is_open(p)]
        wanted: list[tuple[int, int, int]] = []
        for page_id in as_list("PagePool.seal", "page_ids", page_ids, "page ids"):
            page_id = whole_number("PagePool.seal", "page_id", page_id, 0, self.num_pages - 1)
            if not open_pages.is_open(page_id):
                fail("PagePool.seal", "page_ids must be open pages", page_id)
            slot = open_pages.slot_of(page_id)
            wanted.append((slot, page_id, open_pages.tokens(slot)))
        if open_pages.is_awaiting and wanted:
            must = "page_ids must wait until all layers have written what was appended"
            fail("PagePool.seal", must, f"{len(wanted)} pages")
        self._seal(wanted)
        return [page_id for _, page_id, _ in wanted]

    def _seal(self, pages: list[tuple[int, int, int]]) -> None:
        """Quantise open pages, ``(slot, page, tokens)``, in all layers in one operation."""
        if not pages:
            return
        assert self.open_pages is not None
        newest = self.state
        if _ext.is_tracer(newest[0][-1]):
            must = (
                'pages must be appended outside of mx.compile with k_format="q4", because an append '
                "quantises pages"
            )
            fail("PagePool", must, "an append while a function is traced")
        sources = [array for arrays in newest for array in sides_of(arrays, self.formats).open]
        sealed = operations.seal_pages(
            sources, newest, mx.array(np.array(pages, np.int32)), rotated=True,
            stream=self.stream, known=self.known, **self.told,
        )  # fmt: skip
        for arrays, fresh in zip(newest, sealed):
            arrays[:] = fresh
        page_ids = [page_id for _, page_id, _ in pages]
        self.open_pages.seal(page_ids)
        self.num_sealed += len(page_ids)
        self._note_sealed(page_ids)

    def _note_sealed(self, page_ids: Sequence[int]) -> None:
        """Have nobody append to these pages."""
        allocator = self._allocator
        if allocator is not None:
            counts = allocator.counts
            allocator.sealed.update(p for p in page_ids if p < len(counts) and counts[p])

    def reset_versions(self) -> None:
        """Forget pending operations; pages keep what evaluated writes left in them.

        For use after an evaluation that failed: the versions that hung on it can never
        be evaluated.
        """
        for arrays, base in zip(self.state, self._storage.base):
            arrays[:] = base

    # Told by the allocator

    def attached(self, allocator: Any) -> None:
        """Belong to an allocator; it counts who holds the pages.

        Raises:
            ValueError: The pool belongs to another, or pages of its own are in use.
        """
        own = self._allocator
        if own is allocator:
            return
        if own is not None:
            if not self._owns_allocator:
                fail("attach", "pool must belong to no other allocator", repr(own))
            if own.num_used:
                must = "pool must have no pages in use of its own allocator"
                fail("attach", must, f"{own.num_used} pages")
            own.detach(self)
        self._allocator = allocator
        self._plans.clear()
        if self.open_pages is not None:
            sealed = filter(self.open_pages.is_sealed, range(self.num_pages))
            self._note_sealed(list(sealed))
        if self._wants_canary:
            self.canary = Canary(allocator, self.num_layers)  # type: ignore[abstract]

    def copied(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Do ``copy`` with pairs that are known to be right, as an allocator's are."""
        open_pages = self.open_pages
        if open_pages is None:
            self._copy(pairs, slice(None))
        else:
            opened = [pair for pair in pairs if open_pages.is_open(pair[0])]
            self.reserve(len(opened))
            slots = [open_pages.slot_of(source) for source, _ in opened]
            open_pages.copied(pairs)
            num_paged = len(self.state[0]) - 2
            self._copy([p for p in pairs if open_pages.is_sealed(p[0])], slice(num_paged))
            places = [(slot, open_pages.slot_of(p[1])) for slot, p in zip(slots, opened)]
            self._copy(places, slice(num_paged, None))
            self._note_sealed([p for _, p in pairs if open_pages.is_sealed(p)])
        self._fold_writes()
        for source, target in pairs:
            self._tokens_stored[target] = self._tokens_stored[source]

    def _copy(self, pairs: Sequence[tuple[int, int]], part: slice) -> None:
        """Copy entries of some arrays of every layer, in one operation."""
        if not pairs:
            return
        newest = self.state
        flat = [array for arrays in newest for array in arrays[part]]
        copies = operations.copy_pages(
            flat, mx.array(list(pairs), mx.int32), alias=True, stream=self.stream,
            known=self.known,
        )  # fmt: skip
        width = len(newest[0][part])
        for i, arrays in enumerate(newest):
            arrays[part] = copies[i * width : (i + 1) * width]

    @property
    def wants_appends(self) -> bool:
        """Whether the allocator is to say which slots are to be written next."""
        return self.open_pages is not None

    def before_append(self, page_ids: Sequence[int]) -> None:
        """Quantise the pages that are full, but those that are to be written again."""
        assert self.open_pages is not None
        if not self.open_pages.is_awaiting:
            self._seal(self.open_pages.due(page_ids))

    def reserve(self, num_pages: int) -> None:
        """Have memory for so many more open pages: of those that only caches hold, or new.

        Raises:
            OutOfPages: There is none; nothing has changed but that such pages are sealed.
        """
        open_pages = self.open_pages
        assert open_pages is not None
        if num_pages > open_pages.num_free:
            self.seal()
        missing = num_pages - open_pages.num_free
        if missing > 0:
            before = open_pages.num_slots
            added = max(missing, before // 8)
            self._storage.add_open(self.state, before + added, self.memory_limit)
            open_pages.add_slots(added)

    def appended(self, slots: np.ndarray) -> None:
        """Open the pages that are to be written next, but those that are written as a whole."""
        assert self.open_pages is not None
        self._note_sealed(self.open_pages.appended(slots))

    def detached(self) -> None:
        """Belong to no allocator; the pool makes one of its own when it is asked for."""
        if self.canary is not None and self._allocator is not None:
            self._allocator.detach(self.canary)
        self._allocator = self.canary = None
        self._owns_allocator = False

    @property
    def wants_freed(self) -> bool:
        """Whether the allocator is to say which pages become free."""
        return self.wipe_freed is not None or self.open_pages is not None

    def freed(self, page_ids: Sequence[int]) -> None:
        """Write ``wipe_freed`` over pages, before any later write to them; lazy."""
        if self.wipe_freed is not None:
            self._wipe(page_ids)
        if self.open_pages is not None:
            self.open_pages.forget(page_ids)

    def _wipe(self, page_ids: Sequence[int]) -> None:
        newest = self.state[0][0]
        if _ext.is_tracer(newest) or _ext.is_stale(newest):
            return  # a page freed while a step is traced is freed once, not at every step
        size = self.page_size
        written = np.array(page_ids, np.int32)
        if self.open_pages is not None:
            written = written[~self.open_pages.unknown(written)]
        first = written[:, None] * size
        slots = SlotMapping((first + np.arange(size, dtype=np.int32)).ravel(), newest)
        if self.open_pages is not None:
            slots.split = self._split(slots)
        k, v = (
            mx.full((slots.array.size, self.num_kv_heads, dim), self.wipe_freed or 0.0, self.dtype)
            for dim in (self.head_dim, self.v_head_dim)
        )
        for layer in range(self.num_layers):
            self.write_values(self.state[layer], layer, k, v, slots)
        self._fold_writes()
        self._tokens_stored[list(page_ids)] = 0

    # Book-keeping

    @property
    def tokens_stored(self) -> np.ndarray:
        """Tokens last written to each page, ``int32 [num_pages]``."""
        self._fold_writes()
        return self._tokens_stored

    def remember(self, slots: np.ndarray) -> None:
        """Count the tokens of a write, in ``tokens_stored``."""
        self._writes.append(slots)
        if len(self._writes) >= 256:
            self._fold_writes()

    def _fold_writes(self) -> None:
        for slots in self._writes:
            slots = slots[slots >= 0]
            pages, offsets = slots // self.page_size, slots % self.page_size
            self._tokens_stored[pages] = 0
            np.maximum.at(self._tokens_stored, pages, offsets + 1)
        self._writes.clear()

    def map(self, tables: Iterable[PageTable] = (), caches: Iterable[Any] = ()) -> PoolMap:
        """Return a picture of the pages as they are now: text, HTML in a notebook, PNG or SVG.

        Args:
            tables: Page tables to tell apart; pages of others are told as held.
            caches: Prefix caches, whose pages are told as cached.

        Examples:
            >>> pool = PagePool(1, 8, 4, 2, 64)
            >>> a = PageTable(4)
            >>> _ = a.append_tokens(6, pool.allocator)
            >>> b = a.fork()
            >>> print(pool.map([a, b]).text())
            22......
            8 pages of 4 tokens: 2 in use (2 shared, 0 cached alone), 6 free
        """
        maps_of("PagePool.map", tables := as_list("PagePool.map", "tables", tables, "PageTables"))
        named = [(f"sequence {i}", table) for i, table in enumerate(tables)]
        cached = [
            page_id
            for cache in holders("PagePool.map", "caches", caches, "PrefixCaches")
            for page_id in cache.page_ids
        ]
        form = None if self.formats.are_dense else str(self.formats)
        dense = () if self.open_pages is None else self.open_pages.page_ids
        return PoolMap(page_figures(self.allocator, named, cached, form, dense))

    def check(self, tables: Iterable[Any] | None = None, caches: Iterable[Any] = ()) -> None:
        """Prove that arrays, versions and allocator agree, and a canary's slots with the tables.

        Args:
            tables: Every page table on the allocator; then each count must equal its holders.
            caches: Every prefix cache on it, counted with the tables.

        Raises:
            AssertionError: They do not; the message names the difference.
        """
        held = [] if tables is None else holders("PagePool.check", "tables", tables, "PageTables")
        caches = holders("PagePool.check", "caches", caches, "PrefixCaches")
        mx.eval(self.state)
        self._storage.check(self.state)
        if self._allocator is not None:
            pages = self._allocator.total_pages
            assert pages <= self.num_pages, f"{pages} pages allocatable, {self.num_pages} in arrays"
            self._allocator.check(held if tables is not None else None, caches)
        if self.open_pages is not None:
            own = self._allocator
            counts, sealed = (None, set()) if own is None else (own.counts, own.sealed)
            self.open_pages.check(counts, sealed)
        if self.canary is not None:
            self.canary.check()
            for layer in range(self.num_layers):
                self.canary.read(layer, held)

    def _plan(
        self,
        op: str,
        tables: Sequence[PageTable],
        packed: PackedTables,
        geometry: Geometry,
        options: PlanOptions,
        previous: AttentionPlan | None,
    ) -> AttentionPlan:
        """Make a plan; say of pages that were given back that they were."""
        if packed.page_size != self.page_size:
            must = f"page_tables must have the page_size of the pages, {self.page_size}"
            fail(op, must, packed.page_size)
        if packed.allocator is not None and packed.allocator is not self._allocator:
            must = "page_tables must hold pages of the allocator that the pool belongs to"
            fail(op, must, f"a table of another, {packed.allocator!r}")
        try:
            made = make_plan(op, packed, geometry, options, previous)
        except ValueError:
            for row, table in enumerate(tables):
                if table.num_freed:
                    must = (
                        "sliding_window must be given, and small enough to see none of the "
                        f"{table.num_freed} pages that sequence {row} gave back"
                    )
                    fail(op, must, options.sliding_window)
            raise
        if len(self._plans) >= MOST_PLANS:
            self._plans.clear()
        made.allocator, made.versions = packed.allocator, packed.versions
        return made

    def _layer_index(self, layer: object) -> int:
        index = whole_number("PagePool", "layer", layer)
        if index >= self.num_layers:
            fail("PagePool", f"layer must be in [0, {self.num_layers})", layer)
        return index

    def __dir__(self):
        return sorted(set(super().__dir__()) - _WITHIN)

    def __repr__(self):
        formats = "" if self.formats.are_dense else f" {self.formats}"
        used = 0 if self._allocator is None else self._allocator.num_used
        return (
            f"PagePool({self.num_layers} layers, {used} of {self.num_pages} pages of "
            f"{self.page_size} tokens used, {self.num_kv_heads} KV heads of {self.head_dim}{formats}, "
            f"{self.nbytes:,} bytes)"
        )


@dataclass(eq=False, repr=False, slots=True)
class PoolLayer(Mapping[int, "PageBlock"]):
    """One layer of a pool: its arrays, and a mapping page_id -> PageBlock of its pages.

    Examples:
        >>> pool = PagePool(num_layers=2, num_pages=8, page_size=4, num_kv_heads=2, head_dim=64)
        >>> table, k = PageTable(page_size=4), mx.ones((3, 2, 64), mx.float16)
        >>> pool[1].write(k, k, table.append_tokens(3, pool.allocator).slots)
        >>> plan = pool.plan([table], num_q_heads=4)
        >>> pool[1].attend(mx.ones((1, 4, 64), mx.float16), plan).shape
        (1, 4, 64)

    ``paged_mlx.paged_attention`` reads the arrays directly.

    Attributes:
        pool: The pool.
        index: The layer's number there.
    """

    pool: PagePool
    index: int

    @property
    def arrays(self) -> list[mx.array]:
        """``[k, v]`` or what stands for them: the newest versions, in the list of ``pool.state``."""
        return self.pool.state[self.index]

    def write(self, k: mx.array, v: mx.array, slot_mapping: Ints | SlotMapping) -> None:
        """Write new tokens' K and V into their pages.

        Args:
            k: Keys, ``[tokens, num_kv_heads, head_dim]``, the pool's dtype.
            v: Values, ``[tokens, num_kv_heads, v_head_dim]``.
            slot_mapping: ``int32 [tokens]``; destination slot of each token,
                ``page_id * page_size + offset_in_page``; -1 skips the token. A
                ``SlotMapping``, from ``pool.slots(...)``, is checked once for all layers.

        Lazy: nothing moves until the pool is evaluated.

        Raises:
            ValueError: A shape, dtype or slot does not match the pool.
        """
        pool = self.pool
        slots = pool.slots(slot_mapping)
        arrays = pool.state[self.index]
        check_array("write", "k", k)
        _refuse_capture("write", arrays[0], k)
        if slots.split is None:
            written = operations.write_pages(
                [k, v], arrays, slots.array, alias=True, stream=pool.stream, known=pool.known,
                **pool.told,
            )  # fmt: skip
        else:
            pool.check_tokens(k, v, slots)
        if pool.canary is not None:
            if slots.values is None:
                must = "the pool must have no canary to be written inside mx.compile"
                fail("write", must, "canary=True")
            pool.canary.wrote_layer(self.index, slots.values)
        if slots.split is None:
            arrays[:] = written
        else:
            pool.write_values(arrays, self.index, k, v, slots)
        if self.index == 0 and slots.values is not None:
            pool.remember(slots.values)

    @overload
    def attend(
        self,
        q: mx.array,
        plan: AttentionPlan | mx.array,
        *,
        scale: float | None = ...,
        softcap: float | None = ...,
        alibi_slopes: mx.array | None = ...,
        sinks: mx.array | None = ...,
        mask: mx.array | None = ...,
        return_lse: Literal[False] = ...,
    ) -> mx.array: ...

    @overload
    def attend(
        self,
        q: mx.array,
        plan: AttentionPlan | mx.array,
        *,
        scale: float | None = ...,
        softcap: float | None = ...,
        alibi_slopes: mx.array | None = ...,
        sinks: mx.array | None = ...,
        mask: mx.array | None = ...,
        return_lse: Literal[True],
    ) -> tuple[mx.array, mx.array]: ...

    def attend(
        self,
        q: mx.array,
        plan: AttentionPlan | mx.array,
        *,
        scale: float | None = None,
        softcap: float | None = None,
        alibi_slopes: mx.array | None = None,
        sinks: mx.array | None = None,
        mask: mx.array | None = None,
        return_lse: bool = False,
    ) -> mx.array | tuple[mx.array, mx.array]:
        """Attention of a step's query tokens over the layer's pages.

        Args:
            q: ``[tokens, num_q_heads, head_dim]``, the query tokens of all sequences, one
                after the other; the pool's dtype.
            plan: From ``pool.plan(...)``, or its ``array`` inside ``mx.compile``.
            scale, softcap, alibi_slopes, sinks, mask: As in ``fast.paged_attention``.
            return_lse: Also return the log-sum-exp, float32 ``[tokens, num_q_heads]``.

        Returns:
            ``[tokens, num_q_heads, v_head_dim]``.

        Raises:
            ValueError: A shape or dtype does not fit the pool, or the plan another step.
        """
        pool = self.pool
        arrays = pool.state[self.index]
        if return_lse is not False and return_lse is not True:
            return_lse = check_flag("attend", "return_lse", return_lse)
        made = plan if isinstance(plan, AttentionPlan) else None
        words = plan if made is None else made.array
        options = AttentionOptions(scale, softcap, alibi_slopes, sinks, mask)
        if made is not None and made.allocator not in (None, pool._allocator):
            must = "plan must be of page tables of the allocator that the pool belongs to"
            fail("attend", must, f"a plan of another's, {made.allocator!r}")
        if not isinstance(q, mx.array) or not isinstance(words, mx.array):
            check_array("attend", "q", q)
            must = "plan must be an AttentionPlan, from pool.plan(...), or its array"
            fail("attend", must, kind_of(words))
        if _ext.is_tracer(q) or _ext.is_stale(arrays[0]):
            _refuse_capture("attend", arrays[0], q)
            if not _ext.is_tracer(words):
                must = "plan must be an input of the compiled function, passed as plan.array"
                found = "a plan captured from outside, good for one step only"
                fail("attend", must, found)
        out, lse, *arrays[:] = operations.paged_attention(
            q, arrays, words, *options, stream=pool.stream, known=pool.known, plan=made,
            **pool.told,
        )  # fmt: skip
        return (out, lse) if return_lse else out

    def gather(
        self,
        block_tables: Ints,
        context_lens: Ints,
        *,
        page_starts: Ints | None = None,
        page_lens: Ints | None = None,
    ) -> tuple[mx.array, mx.array]:
        """Contiguous K and V of each sequence, ordered before later writes.

        Arguments and result as in ``fast.gather_pages``.
        """
        pool, arrays = self.pool, self.arrays
        tables, lens, length, ragged = gather_inputs(
            "gather", arrays[0], block_tables, context_lens, page_starts, page_lens
        )
        if pool.open_pages is not None:
            tables = mx.array(pool.open_pages.kernel_ids(np.array(tables)))
        k, v, *arrays[:] = operations.gather_pages(
            arrays, tables, lens, length, **ragged, stream=pool.stream, known=pool.known,
            **pool.told,
        )  # fmt: skip
        return k, v

    def __getitem__(self, page_id: int) -> PageBlock:
        try:
            index = operator.index(page_id)
        except TypeError:
            raise KeyError(page_id) from None
        if not 0 <= index < self.pool.num_pages:
            raise KeyError(page_id)
        return PoolPageBlock(self, index)

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.pool.num_pages))

    def __len__(self) -> int:
        return self.pool.num_pages

    def __repr__(self):
        return f"PoolLayer({self.index} of {self.pool!r})"


def _refuse_capture(op: str, newest: mx.array, fresh: mx.array) -> None:
    """A traced version must not enter a pool that the trace does not know of, nor stay."""
    if _ext.is_stale(newest):
        must = (
            "the pool must hold arrays, but a compiled function failed while it was traced: "
            "call pool.reset_versions()"
        )
        fail(op, must, "what mx.compile left behind")
    if _ext.is_tracer(fresh) and not _ext.is_tracer(newest):
        must = (
            "the pool must be named to mx.compile: "
            "mx.compile(f, inputs=pool.state, outputs=pool.state)"
        )
        fail(op, must, "a traced array for a pool captured from outside")


class PageBlock:
    """One page of one layer: a view of a pool, or arrays of its own.

    Args:
        page_id: The page.
        tokens_stored: Tokens in the page.
        max_tokens: Tokens that fit, the page size.
        ref_count: Sequences that hold the page.
        key_data: ``[num_kv_heads, max_tokens, head_dim]``.
        value_data: ``[num_kv_heads, max_tokens, v_head_dim]``.

    Examples:
        >>> pool = PagePool(num_layers=1, num_pages=8, page_size=4, num_kv_heads=2, head_dim=64)
        >>> pool[0][3].key_data.shape
        (2, 4, 64)
    """

    def __init__(
        self,
        page_id: int,
        tokens_stored: int,
        max_tokens: int,
        ref_count: int,
        key_data: mx.array,
        value_data: mx.array,
    ):
        sizes = {"page_id": page_id, "max_tokens": max_tokens, "ref_count": ref_count}
        for name, value in sizes.items():
            whole_number("PageBlock", name, value)
        whole_number("PageBlock", "tokens_stored", tokens_stored, 0, max_tokens)
        check_array("PageBlock", "key_data", key_data)
        check_array("PageBlock", "value_data", value_data)
        self.page_id = page_id
        self.tokens_stored = tokens_stored
        self.max_tokens = max_tokens
        self.ref_count = ref_count
        self._data = (key_data, value_data)

    @property
    def key_data(self) -> mx.array:
        return self._data[0]

    @property
    def value_data(self) -> mx.array:
        return self._data[1]

    def __repr__(self):
        return (
            f"{type(self).__name__}(page_id={self.page_id}, tokens_stored={self.tokens_stored}, "
            f"max_tokens={self.max_tokens}, ref_count={self.ref_count})"
        )


class PoolPageBlock(PageBlock):
    """A page of a pool; its data is gathered when it is asked for."""

    def __init__(self, layer: PoolLayer, page_id: int):
        self._layer = layer
        self.page_id = page_id
        self.max_tokens = layer.pool.page_size

    tokens_stored = property(lambda self: int(self._layer.pool.tokens_stored[self.page_id]))

    @property
    def ref_count(self) -> int:  # type: ignore[override]
        return self._layer.pool.allocator.ref_count(self.page_id)

    @property
    def _data(self):
        k, v = self._layer.gather([[self.page_id]], [self.max_tokens])
        return k[0], v[0]


class SlotMapping:
    """Slots of a step's new tokens, checked once, used by every layer.

    Attributes:
        split: Which of them are of open pages, where the pool has any.
    """

    split: Split | None = None

    def __init__(self, slot_mapping: Ints, pages: mx.array):
        check_array("SlotMapping", "pages", pages)
        if pages.ndim != 4:
            must = "pages must have shape [num_pages, num_kv_heads, page_size, head_dim]"
            fail("SlotMapping", must, pages.shape)
        self.num_slots = pages.shape[0] * pages.shape[2]
        self.array = slot_array("write", slot_mapping, pages)
        traced = isinstance(slot_mapping, mx.array) and _ext.is_tracer(slot_mapping)
        self.values = None if traced else np.array(self.array)

    def __repr__(self) -> str:
        return f"SlotMapping({self.array.size} tokens, slots of {self.num_slots})"
