"""The layers of a model that share page tables: those with the same window."""

import logging
from collections import Counter

import mlx.core as mx
import numpy as np

from paged_mlx.errors import OutOfPages, fail
from paged_mlx.formats.page_format import PageFormats, page_nbytes
from paged_mlx.forward.gathered import LayerPlace, PagesOfLayer
from paged_mlx.forward.lazy_pool import LazyPool
from paged_mlx.forward.passes import Passes
from paged_mlx.forward.step import Step
from paged_mlx.machine.memory import memory_limit
from paged_mlx.pages.block_table import pack
from paged_mlx.pages.policies import PageAllocator
from paged_mlx.pages.table import append_batch

log = logging.getLogger("paged_mlx")

MOST_AT_ONCE = 2048  # tokens of a prompt in one pass, mlx-lm's default
GROWTH = 32  # pools grow by what is missing, and by one in so many pages at least
FRESH_PROMPT = "a fresh prompt's own K and V go to MLX's attention"


class LayerGroup:
    """Page tables, allocator and pools of all layers with one window.

    One page id serves every layer of the group. Layers of one geometry share a pool; it is
    made when the first of them writes.

    Args:
        num_layers: Layers of the group.
        page_size: Tokens in a page.
        num_pages: Pages at first.
        max_pages: Pages at most; more than ``num_pages`` lets the pools grow on demand.
        grow_first: Pages up to which the pools grow before cached pages are evicted.
        window: Keys a token may see, its own included; None: all.
        retain: Tokens kept behind the window, so that a rewind of as many stays possible;
            None: all.
        formats: Of K's and V's pages.
    """

    def __init__(
        self, num_layers, page_size, num_pages, max_pages, grow_first, window, retain,
        formats=PageFormats(),
    ):  # fmt: skip
        self.formats = formats
        self.num_layers = num_layers
        self.page_size = page_size
        self.max_pages = max_pages
        self.grow_first = grow_first
        self.window = window
        self.retain = retain
        self.allocator = PageAllocator(num_pages, page_size)
        self.geometry: dict[int, tuple] = {}  # layer -> what it is expected to write
        self.peak_pages = 0
        self._first_pages = num_pages
        self._peaks = [
            0,
            0,
        ]  # pages in use since nobody used any, and between then and the time before
        self.grows_past_memory = False  # the model has no limit of its own
        self.caches_attend = False  # the model asks them to, instead of MLX
        self.pools: list[LazyPool] = []
        self._placed: dict[int, LayerPlace] = {}
        self.newest: Step | None = None
        self.calls: Counter = Counter()  # (layer, why the pages were not read) -> attention calls
        self.narrow: dict[int, tuple] = {}  # layers whose pages are wider: (dims of K, of V)
        self.written: set[int] = set()  # layers that have brought K and V
        self.attended: set[int] = set()  # layers whose attention asks for the pages
        self._offsets = (None, None)
        self.passes = Passes({window: self})  # of the model, with its other groups

    def __deepcopy__(self, memo):
        return self

    # Pools

    def pool_of(self, layer: int, keys: mx.array, values: mx.array) -> tuple[LazyPool, int]:
        """The pool of a layer and its index there, made at the layer's first write."""
        place = self._placed.get(layer) or self._make_pool(layer, keys, values)
        dims = keys.shape[3], values.shape[3]
        if dims != (place.pool.head_dim, place.pool.v_head_dim):
            self.narrow[layer] = dims
        return place.pool, place.index

    def _make_pool(self, layer, keys, values) -> LayerPlace:
        """Make the pool of a layer, and of those that are expected to write the same."""
        found = geometry_of(keys, values)
        peers = [
            other
            for other, expected in self.geometry.items()
            if expected == found and other not in self._placed
        ]
        peers = sorted({layer, *peers})
        num_kv_heads, head_dim, v_head_dim, dtype = found
        pool = LazyPool(
            len(peers),
            self.allocator.total_pages,
            self.page_size,
            num_kv_heads,
            head_dim,
            dtype,
            v_head_dim,
            k_format=self.formats.k,
            v_format=self.formats.v,
            allocator=self.allocator,
            is_read=self._is_read_elsewhere,
        )
        self.pools.append(pool)
        for i, peer in enumerate(peers):
            self._placed[peer] = LayerPlace(self, peer, pool, i)
        return self._placed[layer]

    def _is_read_elsewhere(self) -> bool:
        return self.passes.others_may_read()

    def _convert(self, pool: LazyPool, dtype: mx.Dtype) -> None:
        """Hold K and V of a pool's layers in another dtype, as the model computes them now."""
        self.passes.join()
        fresh = LazyPool(
            pool.num_layers,
            self.allocator.total_pages,
            self.page_size,
            pool.num_kv_heads,
            pool.head_dim,
            dtype,
            pool.v_head_dim,
            k_format=self.formats.k,
            v_format=self.formats.v,
            allocator=self.allocator,
            is_read=self._is_read_elsewhere,
        )
        if self.formats.are_dense:
            slots = np.arange(self.allocator.total_pages * self.page_size, dtype=np.int32)
            for i, pages in enumerate(pool.state):
                k, v = (x.swapaxes(1, 2).flatten(0, 1).astype(dtype) for x in pages)
                fresh[i].write(k, v, slots)
        else:
            fresh.take_over(pool)
        self.allocator.detach(pool)
        self.pools[self.pools.index(pool)] = fresh
        self.passes.replace(pool, fresh)
        for layer, place in self._placed.items():
            if place.pool is pool:
                place.pool = fresh
                self.geometry[layer] = (*self.geometry.get(layer, (0, 0, 0))[:3], dtype)
        self.passes.keep()

    def placed(self, layer: int) -> tuple[LazyPool, int] | None:
        place = self._placed.get(layer)
        return None if place is None else (place.pool, place.index)

    def page_nbytes(self, layer: int) -> int:
        """Bytes of one page of one layer."""
        place = self._placed.get(layer)
        return 0 if place is None else place.pool.page_nbytes // place.pool.num_layers

    # Steps

    def step(self, cache, num_tokens: int, counts=None) -> Step:
        """The pass that a cache's sequences are in, begun by the first layer that asks."""
        with self.passes.turn:
            step = cache.rows[0].last_step.get(self.window)
            if step is not None and step.joins(cache.layer, cache.names, cache.lens, num_tokens):
                self.passes.goes_on(step)
                return step
            try:
                step = self._begin(cache, num_tokens, counts)
            except BaseException:
                self.passes.take_back(self)
                raise
            self.passes.begun(self, step)
            return step

    def _begin(self, cache, num_tokens, counts) -> Step:
        self.passes.begins(self.window)
        rows, starts, window = cache.rows, cache.lens, self.window
        tables = [row.tables[window] for row in rows]
        positions = starts.tolist()
        for row, start in zip(rows, positions):
            self._check_layers_agree(row, cache.layer, start)
            row.truncate(window, start)
        if self.window is not None and self.retain is not None:
            self._free_behind_window(tables, starts)
        counts_of_rows = [num_tokens] * len(rows) if counts is None else counts.tolist()
        opened, copies = self._opened_and_sealed(), []
        try:
            if any(pool.waits_to_seal() for pool in self.pools):
                self.seal_own(rows, tables)
            appended = self._append(tables, counts_of_rows, cache)
            copies = appended.copies
        finally:  # what was done to the pages holds for a pass that something raises in too
            if copies or self._opened_and_sealed() != opened:
                self.passes.keep()
        for put_by in (self.passes.starved, self.passes.aside):
            if put_by:
                put_by.difference_update(rows)
        before = rows[0].last_step.get(window)
        if before is None or before.names != cache.names:
            before = None
        freed = min([table.num_freed for table in tables])
        step = Step(
            cache, num_tokens, counts, appended.slots, tables, freed, max(positions), before
        )
        for row in rows:
            row.last_step[window] = step
        self.newest = step
        used = self.allocator.num_used
        self.peak_pages, self._peaks[0] = max(self.peak_pages, used), max(self._peaks[0], used)
        return step

    def seal_own(self, rows, tables) -> None:
        """Quantise the full pages of sequences between their passes, whatever others are in the
        middle of: what a token is computed from depends on its own sequence alone."""
        if not self.formats.have_open_pages:
            return
        for row, table in zip(rows, tables):
            if not any(map(self.passes.is_anothers, row.last_step.values())):
                for pool in self.pools:
                    pool.seal_full(table)

    def _opened_and_sealed(self) -> list:
        """What an append does to open pages of the pools: takes memory for more, and seals."""
        opened = [0 if p.open_pages is None else p.open_pages.num_slots for p in self.pools]
        return [*opened, *(pool.num_sealed for pool in self.pools)]

    def _check_layers_agree(self, row, layer, start) -> None:
        """A new step begins where every layer is, or goes back as every layer has."""
        if row.broken is not None:
            must = (
                "the sequence must have all its tokens, because a pass over them failed: "
                "begin it anew"
            )
            fail("update_and_fetch", must, row.broken)
        last = row.last_step.get(self.window)
        if last is None or not last.served or layer in last.served:
            return
        end = int(last.ends[last.names.index(row.name)])
        if end > start:
            must = (
                f"layer {layer} must hold as many tokens of the sequence as other layers, {end}, "
                "because a pass that was interrupted reached only some: begin it anew"
            )
            fail("update_and_fetch", must, start)

    def _free_behind_window(self, tables, starts) -> None:
        first = np.maximum(starts - (self.window - 1) - self.retain, 0)
        for table, position in zip(tables, first.tolist()):
            if position // self.page_size > table.num_freed:
                table.free_before(position)

    def _append(self, tables, counts, cache):
        """Append to all tables or to none; pools grow when they must and may."""
        most = sum([count // self.page_size + 2 for count in counts])
        if most > self.allocator.num_free:
            rows = zip(cache.rows, cache.lens.tolist(), counts)
            most = sum([self.pages_to_go(*row) for row in rows])
            self._grow(most, self.grow_first)
        while True:
            try:
                return append_batch(tables, counts, self.allocator)
            except OutOfPages:
                if not self._make_room(most, cache):
                    self.passes.starved.update(cache.rows)
                    self._refuse(most)

    def _make_room(self, wanted: int, cache) -> bool:
        """Grow, or take the pages of sequences that found none and were left lying."""
        if self._grow(wanted, self.max_pages):
            return True
        if self.passes.take_from(self.passes.starved, cache.rows):
            return True
        return self.grows_past_memory and self._grow_past_memory(wanted)

    def _grow_past_memory(self, wanted: int) -> bool:
        """Grow as mlx-lm's own caches do, since nobody has set a limit here; but never past the
        machine's memory, nor past ``mx.set_memory_limit``."""
        log.warning(
            "pools grow past memory_limit(), as mlx-lm's own caches do; enable takes max_bytes"
        )
        return self._grow(wanted, self.max_pages, memory_limit(share=1.0))

    def _refuse(self, wanted: int) -> None:
        must = f"the pool must have up to {wanted} pages to give"
        if self.passes.max_bytes is not None:
            must += ": give enable a larger max_bytes"
        elif self.max_pages == self.allocator.total_pages:
            must += f": give enable num_pages of {self.max_pages + wanted} or none"
        else:
            must += ": the machine has no memory for more"
        found = f"{self.allocator.num_free} free of {self.allocator.total_pages}"
        fail("update_and_fetch", must, found, OutOfPages)

    # What a step would need

    @property
    def page_bytes(self) -> int:
        """Bytes of one page of all layers of the group, as far as they are known."""
        geometries = self.geometry.values()
        return sum(page_nbytes(self.formats, h, self.page_size, *rest) for h, *rest in geometries)

    def _open_bytes_to_come(self) -> int:
        """Bytes that open pages may take yet: one for each sequence, if the formats have any."""
        if not self.formats.have_open_pages:
            return 0
        geometries = self.geometry.values()
        page = sum(page_nbytes(PageFormats(), h, self.page_size, *rest) for h, *rest in geometries)
        opened = [pool.open_pages for pool in self.pools if pool.open_pages is not None]
        there = min((pages.num_slots for pages in opened), default=0)
        return page * max(0, len(self.passes.sequences) - there)

    @property
    def most_pages(self) -> int:
        """Pages that the group may ever have."""
        budget = self.passes.max_bytes
        return self.max_pages if budget is None else budget // max(1, self._bytes_grown(1))

    def pages_missing(self, wanted: int) -> int:
        """How many of ``wanted`` pages are neither free nor cached and held by nobody."""
        return max(0, wanted - self.allocator.num_free - self.allocator.num_evictable)

    def _can_grow_by(self, limit: int) -> int:
        most = max(0, limit - self.allocator.total_pages)
        if self.passes.max_bytes is not None and self.page_bytes:
            left = self.passes.max_bytes - self.passes.nbytes
            left -= self._open_bytes_to_come()
            total = self.allocator.total_pages
            left -= self._bytes_grown(total) - min(self.nbytes, total * self.page_bytes)
            most = min(most, max(0, left // self._bytes_grown(1)))
        return most

    def _bytes_grown(self, num_pages: int) -> int:
        """Bytes of so many pages while pools grow to them: one layer is held twice then."""
        return num_pages * self.page_bytes * (self.num_layers + 1) // max(1, self.num_layers)

    def bytes_to_grow(self, more: int) -> tuple[int, int]:
        """Bytes that ``more`` pages take, and those that growing by them takes for a moment."""
        if not more:
            return 0, 0
        total = self.allocator.total_pages + more
        return more * self.page_bytes, self._bytes_grown(total) - total * self.page_bytes

    def pages_for(self, num_tokens: int, num_new: int = 0) -> int:
        """Pages that a sequence needs for a prompt of ``num_tokens`` tokens and an answer."""
        size, most = self.page_size, num_tokens + num_new
        if self.window is not None and self.retain is not None:
            kept = self.window + self.retain
            most = max(min(num_tokens, kept + MOST_AT_ONCE), min(most, kept + size - 1))
        return -(-most // size)

    def pages_grown_to(self, wanted: int) -> int:
        """Pages that the pools have once ``wanted`` are in use: they grow a little ahead."""
        ahead = 1 + 1 / (2 * GROWTH) if self.max_pages > wanted > self._first_pages else 1
        return max(self._first_pages, int(wanted * ahead))

    def pages_to_go(self, row, held: int, new: int) -> int:
        """Pages that ``new`` tokens of a sequence that holds ``held`` will take."""
        table, size = row.tables[self.window], self.page_size
        more = -(-(held + new) // size) - -(-held // size)
        if table.is_ragged or table.is_sealed:  # the room of its tail is not that of even pages
            more = -(-new // size)
        if held % size and table.num_tokens >= held:
            tail = table.logical_to_physical(held - 1)[0]
            more += self.allocator.ref_count(tail) > 1  # it is copied first
        if self.window is not None and self.retain is not None:
            first = max(0, held - (self.window - 1) - self.retain) // size
            more -= max(0, first - table.num_freed)
        return max(0, more)

    def _grow(self, wanted: int, limit: int, memory: int | None = None) -> bool:
        """Grow until ``wanted`` pages are free, by 1 in GROWTH at least, up to ``limit`` pages;
        False when they are, or when the pools have as many or cannot grow."""
        total, most = self.allocator.total_pages, self._can_grow_by(limit)
        missing = wanted - self.allocator.num_free
        if missing <= 0 or most <= 0:
            return False
        self.passes.let_go()
        for pool in self.pools:
            pool.memory_limit = memory_limit() if memory is None else memory
        try:
            ahead = 0 if self.passes.max_bytes is not None else -(-total // GROWTH)
            self.allocator.grow(min(max(missing, ahead), most))
        except OutOfPages:
            return False
        finally:
            self.passes.keep()
        return True

    def give_back(self) -> None:
        """Nobody uses pages: keep those that were needed both since the last time and before it."""
        keep = max(self._first_pages, min(self._peaks))
        self._peaks = [0, self._peaks[0]]
        self.allocator.shrink(max(0, self.allocator.total_pages - keep))

    # K and V

    def fetch(self, layer: int, step: Step, keys: mx.array, values: mx.array):
        """K and V of a layer as handles, those of the step included; their write waits."""
        place = self._placed.get(layer) or self._make_pool(layer, keys, values)
        if keys.dtype != place.pool.dtype and keys.dtype == values.dtype:
            self._convert(place.pool, keys.dtype)
        source, pool = PagesOfLayer(place, step), place.pool
        dims = keys.shape[3], values.shape[3]
        if dims != (pool.head_dim, pool.v_head_dim):
            self.calls[layer, f"head_dim {dims[0]} has no kernel"] += 1
            self.narrow[layer] = dims
            keys, values = widened(keys, pool.head_dim), widened(values, pool.v_head_dim)
        return self._narrowed(layer, pool.fetch(source, keys, values))

    def _narrowed(self, layer: int, k_and_v):
        """K and V as wide as the layer's, which the pages need not be."""
        if layer not in self.narrow:
            return k_and_v
        return tuple(x[..., :dim] for x, dim in zip(k_and_v, self.narrow[layer]))

    def bring(self, step: Step, parts: dict) -> None:
        """Have what a pass has written so far in the memory that the pools have by now."""
        step.route = None
        places = [self._placed[layer] for layer in step.served]
        written = [each for each in places if each.index not in parts[each.pool].waiting]
        for place in written:  # and what waits is written with the first of them
            place.pool.bring(place.index, parts[place.pool], step)

    def fetch_again(self, layer: int, step: Step):
        """K and V of a layer, as ``step`` has left them, as handles."""
        place = self._placed[layer]
        with self.passes.turn:
            return self._narrowed(layer, place.pool.fetch(PagesOfLayer(place, step)))

    def undo_newest(self) -> None:
        """Take the newest pass back in the caches that have taken part: it has added nothing."""
        step = self.newest
        assert step is not None
        step.undo()
        self.newest = None
        self._offsets = (None, None)

    def contiguous(self, layer: int, rows, lens: np.ndarray) -> tuple[mx.array, mx.array]:
        """K and V of the tokens whose pages are held, ``[batch, heads, tokens, head_dim]``."""
        tables = [row.tables[self.window] for row in rows]
        packed = pack(tables)
        skipped = min(table.num_freed for table in tables)
        place = self._placed[layer]
        with self.passes.turn:
            behind, ragged = skipped * self.page_size, {}
            if packed.page_starts is not None and packed.page_lens is not None:
                behind = int(packed.page_starts[:, skipped].min())
                ragged = {
                    "page_starts": packed.page_starts[:, skipped:] - behind,
                    "page_lens": packed.page_lens[:, skipped:],
                }
            held = packed.block_tables[:, skipped:], lens - behind
            k, v = place.pool[place.index].gather(*held, **ragged)
            mx.async_eval(k, v)
            self.passes.keep()
            return self._narrowed(layer, (k, v))

    # Figures

    def reasons(self, layer: int) -> list[str | None]:
        """Why attention calls of a layer did not read pages; None stands for those that did, and
        for those of fresh prompts, which have nothing to read."""
        found = [reason for (called, reason) in list(self.calls) if called == layer]
        return list(dict.fromkeys(None if each == FRESH_PROMPT else each for each in found))

    @property
    def is_wholly_paged(self) -> bool:
        """Whether all attention over what was written has read pages."""
        return all(self.reasons(layer) == [None] for layer in self._placed)

    def offsets(self, lens: np.ndarray) -> mx.array:
        """``lens`` as an array, one for all layers of a step."""
        offsets = self._offsets
        if offsets[0] is not lens:
            offsets = self._offsets = (lens, mx.array(lens))
        return offsets[1]

    @property
    def plans(self) -> list:
        """The attention plans of the newest pass."""
        return list(self.newest.plans.values()) if self.newest is not None else []

    @property
    def pages_used(self) -> int:
        self.passes.reclaim()
        return self.allocator.num_used

    def page_map(self) -> list[list[int]]:
        """Page ids of every sequence that holds pages, the oldest first."""
        alive = sorted(self.passes.sequences, key=lambda sequence: sequence.name)
        return [ids for each in alive if (ids := each.tables[self.window].page_ids)]

    @property
    def nbytes(self) -> int:
        """Bytes of all pages of all layers."""
        return sum(pool.nbytes for pool in self.pools)

    @property
    def nbytes_used(self) -> int:
        """Bytes of the pages in use."""
        return sum(pool.page_nbytes for pool in self.pools) * self.pages_used

    def __repr__(self):
        window = "" if self.window is None else f", window {self.window}"
        return (
            f"LayerGroup({self.num_layers} layers{window}, {self.pages_used} of "
            f"{self.allocator.total_pages} pages of {self.page_size} tokens)"
        )


def geometry_of(keys: mx.array, values: mx.array) -> tuple:
    """(num_kv_heads, head_dim, v_head_dim, dtype) of K ``[batch, heads, tokens, dim]`` and V.

    Pages are as wide as the next width that kernels take, filled up with zeros: also for a V of no
    dimensions, of which one model's indexer makes use.
    """
    dtype = keys.dtype if keys.dtype == values.dtype else mx.float32
    return keys.shape[1], width(keys.shape[3]), width(values.shape[3]), dtype


def width(dim: int) -> int:
    """The head_dim of pages that hold ``dim``."""
    return max(8, -(-dim // 8) * 8) if dim <= 256 else max(512, dim)


def widened(x: mx.array, dim: int) -> mx.array:
    """``x`` with zeros behind its last axis, up to ``dim``."""
    return mx.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, dim - x.shape[-1])])
