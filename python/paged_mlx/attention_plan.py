"""A step's work items, and what the planner decided about them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from paged_mlx._native import _ext
from paged_mlx.errors import check_flag, fail, kind_of, whole_number
from paged_mlx.formats.page_format import PageFormats, page_nbytes
from paged_mlx.host_arrays import Ints, host_ints, optional_ints
from paged_mlx.machine import thresholds
from paged_mlx.options import Geometry
from paged_mlx.pages.allocator import PageAllocator
from paged_mlx.pages.block_table import PackedTables
from paged_mlx.pages.table import PageTable, maps_of

KINDS = ("vector", "tile", "wide")
_ITEM_FIELDS = 8
_HAS_GPU = mx.metal.is_available()

thresholds.recall()


@dataclass(frozen=True)
class SharingDecision:
    """Why a run of pages that several sequences begin with is read once or not.

    The costs are the planner's estimates, in keys read per KV head.
    """

    num_sequences: int
    first_page: int
    num_pages: int
    cost_shared: float
    cost_alone: float
    shared: bool

    def __str__(self):
        verdict = "shared" if self.shared else "not shared"
        last = self.first_page + self.num_pages
        return (
            f"pages [{self.first_page}, {last}) of {self.num_sequences} sequences: {verdict}, "
            f"cost {self.cost_shared:.0f} once against {self.cost_alone:.0f} one by one"
        )


class PlanOptions(NamedTuple):
    """What a plan is made for, beside the geometry and the step's tables.

    Attributes:
        num_pages: Pages of the pool; -1: not known.
        causal: A token sees no key behind its own position.
        sliding_window: Keys a token may see, its own included; None: all.
        share_prefixes: Sequences that begin with the same pages may read them once.
        fixed_partition: Cut at multiples of this many tokens, and share nothing.
        workers: Items that can run at once; None: those of the device.
        kernels: Metal kernels run it, on the GPU or on the host.
        num_sealed_pages: Ids from here on are of open pages; -1: there are none.
    """

    num_pages: int = -1
    causal: bool = True
    sliding_window: int | None = None
    share_prefixes: bool = True
    fixed_partition: int | None = None
    workers: int | None = None
    kernels: bool = False
    num_sealed_pages: int = -1

    def check(self, op: str) -> None:
        """Refuse options that mean nothing.

        Raises:
            ValueError: A count is no whole number in its range, or a switch no bool.
        """
        whole_number(op, "num_pages", self.num_pages, -1)
        for name in ("sliding_window", "fixed_partition", "workers"):
            if getattr(self, name) is not None:
                whole_number(op, name, getattr(self, name), 1)
        for name in ("causal", "share_prefixes"):
            check_flag(op, name, getattr(self, name))


class AttentionPlan:
    """One step of attention, cut into work items on the host.

    A work item is a set of query tokens against a run of pages. Made by ``pool.plan`` and
    ``paged_mlx.fast.plan``, used by every layer with the same window.

    Examples:
        >>> import paged_mlx
        >>> paged_mlx.fast.plan([[0, 1]], [6], num_q_heads=4, num_kv_heads=2, page_size=4)
        AttentionPlan(1 tokens, 1 vector, 0 partials, 0 merges)

    Attributes:
        array: The plan as both backends read it, ``int32 [words]``
            (``kernels/plan_format.h``). Pass it as an input of a compiled
            function and on to ``fast.paged_attention(..., plan=array)``.
        decisions: Why each run of common pages is shared or not.
        geometry, options: Sizes and options that it was made for.
        measured: Whether the planner's thresholds were measured on this machine
            (``python -m paged_mlx tune``); else they are those of its table.
        fresh_prompt: Whether the query tokens are their sequences' whole contexts, for
            which ``mx.fast.scaled_dot_product_attention`` on their own K and V is the
            faster route.
        allocator, versions: Of the page tables that a pool made it for; None of a plan of
            ``fast.plan``.
    """

    def __init__(self, native: Any, geometry: Geometry, options: PlanOptions):
        self._native = native
        self.geometry = geometry
        self.options = options
        self.array = native.array()
        self.allocator: PageAllocator | None = None
        self.versions: list[int] | None = None

    @cached_property
    def _header(self) -> dict:
        return self._native.header()

    @cached_property
    def decisions(self) -> list[SharingDecision]:
        return [SharingDecision(*row) for row in self._native.decisions()]

    measured = property(lambda self: self._native.measured())
    fresh_prompt = property(lambda self: self._native.fresh_prompt())
    num_tokens = property(lambda self: self._header["num_tokens"])
    num_q_heads = property(lambda self: self._header["num_q_heads"])
    num_kv_heads = property(lambda self: self._header["num_kv_heads"])
    page_size = property(lambda self: self._header["page_size"])
    causal = property(lambda self: bool(self._header["causal"]))
    sliding_window = property(lambda self: self._header["sliding_window"] or None)
    num_partials = property(lambda self: self._header["num_partials"])
    num_merges = property(lambda self: self._header["num_merges"])
    max_page_id = property(lambda self: self._header["max_page_id"])
    max_context_len = property(lambda self: self._header["max_row_end"])

    @cached_property
    def work(self) -> tuple[tuple[int, int, int], bool, bool, bool]:
        """The choice of kernels: most query tokens of an item, by kind; merges; window; ragged."""
        header = self._header
        merged, window, ragged = (
            bool(header[name]) for name in ("num_merges", "sliding_window", "page_starts")
        )
        return self._native.most_tokens(), merged, window, ragged

    @property
    def query_bounds(self) -> list[int]:
        """First query token of each sequence, and one past the last: ``batch + 1`` of them."""
        return self._native.cu_seqlens_q() or list(range(self.num_tokens + 1))

    @property
    def num_items(self) -> dict[str, int]:
        """Number of items of each kind: vector, tile and wide."""
        return dict(zip(KINDS, self._header["num_items"]))

    @cached_property
    def _words(self) -> np.ndarray:
        return np.array(self.array)

    @cached_property
    def items(self) -> list[dict]:
        """The items, in the order they are stored: kind, tokens, pages and keys of each.

        Pages of an item over open pages are their numbers in the arrays of open pages.
        """
        if hasattr(self._native, "items"):  # of MLX's own operations
            return self._native.items()
        h, words = self._header, self._words
        kinds = np.repeat(KINDS, h["num_items"])
        opens = [
            i >= n - n_open
            for n, n_open in zip(h["num_items"], h["num_open_items"])
            for i in range(n)
        ]
        rows = words[h["items"] :][: len(kinds) * _ITEM_FIELDS].reshape(-1, _ITEM_FIELDS)
        items = []
        for kind, is_open, row in zip(kinds, opens, rows):
            row_begin, row_count, page_begin, page_count, first, key_begin, key_end, partial = row
            items.append(
                {
                    "kind": str(kind),
                    "open": is_open,
                    "tokens": words[h["row_tokens"] + row_begin :][:row_count].tolist(),
                    "pages": words[h["pages"] + page_begin :][:page_count].tolist(),
                    "keys": (int(key_begin), int(key_end)),
                    "partial": None if partial < 0 else int(partial),
                }
            )
        return items

    @property
    def keys_read(self) -> int:
        """Keys that the items read, per KV head."""
        return sum(self._keys[0])

    @property
    def keys_least(self) -> int:
        """Keys that must be read at the least, per KV head: each slot of a page once."""
        return sum(self._keys[1])

    @cached_property
    def _keys(self) -> tuple[list[int], list[int]]:
        """Keys that are read and that must be, each those of sealed pages and those of open ones."""
        read, least = [0, 0], [0, 0]
        for item in self.items:
            begin, end = item["keys"]
            read[item["open"]] += max(0, end - begin)
        seen: dict[tuple[bool, int], tuple[int, int]] = {}
        for is_open, page, begin, end in self.page_spans():
            low, high = seen.get((is_open, page), (begin, begin))
            repeated = max(0, min(end, high) - max(begin, low))
            least[is_open] += max(0, end - begin) - repeated
            seen[is_open, page] = (min(low, begin), max(high, end))
        return read, least

    def _nbytes(self, keys: list[int]) -> int:
        """Bytes of K and V of keys of sealed and of open pages, which are dense; all KV heads."""
        g = self.geometry
        sizes = g.num_kv_heads, self.page_size, g.head_dim, g.v_head_dim, g.dtype
        formats = (g.formats, PageFormats())
        return sum(n * page_nbytes(f, *sizes) // self.page_size for n, f in zip(keys, formats))

    def page_spans(self) -> Iterator[tuple[bool, int, int, int]]:
        """For each page of each item: whether it is open, its number, and the keys of it that are read."""
        h, at = self._header, 0
        for item in self.items:
            begin, end = item["keys"]
            start, length = begin // self.page_size * self.page_size, self.page_size
            for page in item["pages"]:
                if h["page_starts"]:  # ragged: as the items list them
                    start = int(self._words[h["page_starts"] + at])
                    length = int(self._words[h["page_lens"] + at])
                yield item["open"], page, max(begin, start), min(end, start + length)
                start, at = start + length, at + 1

    def advance(
        self, block_tables: Ints, context_lens: Ints, cu_seqlens_q: Ints | None = None
    ) -> AttentionPlan | None:
        """The plan of the next step, if only lengths inside the same pages changed, else None."""
        native = self._native.advance(
            op="plan",
            block_tables=host_ints("plan", "block_tables", block_tables),
            context_lens=host_ints("plan", "context_lens", context_lens),
            cu_seqlens_q=optional_ints("plan", "cu_seqlens_q", cu_seqlens_q),
        )
        return None if native is None else AttentionPlan(native, self.geometry, self.options)

    def check_agrees(self, op: str, causal: bool, sliding_window: int | None) -> None:
        """Refuse ``causal`` or ``sliding_window`` that differ from the plan's own.

        Raises:
            ValueError: It does not agree.
        """
        if causal is not True and not check_flag(op, "causal", causal) and self.causal:
            fail(op, "causal must be what the plan was made for (True)", causal)
        if sliding_window is not None and (
            type(sliding_window) is not int or sliding_window != self.sliding_window
        ):
            sliding_window = whole_number(op, "sliding_window", sliding_window, 1)
            if sliding_window == self.sliding_window:
                return
            must = f"sliding_window must be what the plan was made for ({self.sliding_window})"
            fail(op, must, sliding_window)

    def check_tables(self, op: str, tables: Sequence[PageTable]) -> None:
        """Refuse page tables that are not those it was made for, or have changed since.

        Raises:
            ValueError: They are not.
        """
        try:
            versions = [table.map.version for table in tables]
        except AttributeError:
            maps_of(op, tables)
            raise
        if self.versions is not None and versions != self.versions:
            must = "plan must be of these page_tables as they are: make it after the step's append"
            fail(op, must, "a plan of others, or of what they were")

    def __repr__(self):
        kinds = ", ".join(f"{n} {kind}" for kind, n in self.num_items.items() if n) or "no items"
        return (
            f"AttentionPlan({self.num_tokens} tokens, {kinds}, {self.num_partials} partials, "
            f"{self.num_merges} merges)"
        )

    def __str__(self):
        read, least = self.keys_read, self.keys_least
        nbytes, least_nbytes = (self._nbytes(keys) for keys in self._keys)
        lines = [
            repr(self),
            f"K and V read: {nbytes:,} bytes of {read:,} keys, "
            f"{read / max(1, least):.3f}x the least, {least_nbytes:,}",
            "cut by thresholds measured on this machine"
            if self.measured
            else "cut by the table's thresholds; `python -m paged_mlx tune` measures this machine's",
            f"{'item':>5} {'kind':<7} {'tokens':>7} {'rows':>6} {'pages':>6} {'keys':>17}  result",
        ]
        gqa_factor = self.num_q_heads // self.num_kv_heads
        for i, item in enumerate(self.items[:24]):
            tokens, (begin, end) = len(item["tokens"]), item["keys"]
            result = "final" if item["partial"] is None else f"partial {item['partial']}"
            lines.append(
                f"{i:>5} {item['kind']:<7} {tokens:>7} {tokens * gqa_factor:>6} "
                f"{len(item['pages']):>6} {f'[{begin}, {end})':>17}  {result}"
            )
        if len(self.items) > 24:
            lines.append(f"{'':>5} and {len(self.items) - 24} more")
        return "\n".join(lines + [str(decision) for decision in self.decisions])


def make_plan(
    op: str,
    tables: PackedTables,
    geometry: Geometry,
    options: PlanOptions,
    previous: AttentionPlan | None = None,
) -> AttentionPlan:
    """Cut a step into work items, or move ``previous`` on if only lengths have changed.

    Geometry and options have been checked.

    Raises:
        ValueError: A table, length or id is wrong; the message says why.
    """
    if previous is not None:
        if not isinstance(previous, AttentionPlan):
            fail(op, "previous must be an AttentionPlan", kind_of(previous))
        ragged = tables.page_starts is not None or tables.page_lens is not None
        if not ragged and previous.geometry == geometry and previous.options == options:
            following = previous.advance(
                tables.block_tables, tables.context_lens, tables.cu_seqlens_q
            )
            if following is not None:
                return following
    formats = {}
    if geometry.formats != (None, None):
        formats = {"formats": geometry.formats, "num_sealed_pages": options.num_sealed_pages}
    native = _ext.NativePlan(
        op=op,
        block_tables=tables.block_tables,
        context_lens=tables.context_lens,
        cu_seqlens_q=tables.cu_seqlens_q,
        page_starts=tables.page_starts,
        page_lens=tables.page_lens,
        num_pages=options.num_pages,
        num_q_heads=geometry.num_q_heads,
        num_kv_heads=geometry.num_kv_heads,
        page_size=geometry.page_size,
        causal=bool(options.causal),
        sliding_window=options.sliding_window or 0,
        dtype=geometry.dtype,
        head_dim=geometry.head_dim,
        v_head_dim=geometry.v_head_dim,
        share_prefixes=bool(options.share_prefixes),
        fixed_partition=options.fixed_partition or 0,
        workers=options.workers or 0,
        kernels=options.kernels,
        **formats,
    )
    return AttentionPlan(native, geometry, options)


def runs_kernels(stream: mx.Stream | mx.Device | None) -> bool:
    """Whether operations on a stream run Metal kernels: on the GPU, or on the host in tests.

    Args:
        stream: Stream or device; None: the default device.
    """
    return (_HAS_GPU and _device_of(stream) == mx.gpu) or _ext.has_host_launch()


def _device_of(stream):
    place = mx.default_device() if stream is None else stream
    return place.device if isinstance(place, mx.Stream) else place
