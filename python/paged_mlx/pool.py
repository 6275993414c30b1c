"""K and V of all layers in pages, and their linear versions.

MLX evaluates by dependency, not in program order. So every access to a layer's
pages consumes the newest version of its arrays and returns the next one, which
shares the same memory: each order that matters is an edge of the graph, and
nothing is ever copied (docs/design.md, "Linear versions").
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from paged_mlx import operations
from paged_mlx._native import _ext
from paged_mlx.attention_plan import AttentionPlan, plan_array
from paged_mlx.errors import fail
from paged_mlx.fast import gather_inputs, pair_array, slot_array
from paged_mlx.page_block import LayerPages
from paged_mlx.pages.canary import Canary
from paged_mlx.pool_storage import PoolArrays


class PagePool(PoolArrays):
    """K and V of all layers, in pages of one size, written in place.

    ``state`` holds the newest version of every array: ``[k0, v0, k1, v1, ...]``, each
    ``[num_pages, num_kv_heads, page_size, head_dim]``. Evaluate it with the outputs
    of a step (``mx.async_eval(out, pool.state)``) when a write may have no reader.

    One thread uses a pool at a time; it may pass to another only when ``state`` is
    evaluated.

    Args:
        num_layers: Layers.
        num_pages: Pages; one page id serves every layer.
        page_size: Tokens in a page.
        num_kv_heads: Heads of K and V.
        head_dim: Of K, and of V unless ``v_head_dim`` says otherwise.
        dtype: float32, float16 or bfloat16.
        v_head_dim: Of V.
        allocator: A PageAllocator to attach to: its copy-on-write then copies the
            page in every layer.
        fill: Value of fresh pages; NaN shows reads of slots nobody wrote.
        wipe_freed: Value to write over pages when their last holder lets go; None leaves
            stale bytes, which nothing can read by right.
        canary: Remember who wrote each slot and verify reads; see :class:`Canary`.
        memory_limit: Bytes that all arrays of MLX may take once the pool is made or has
            grown; default :func:`paged_mlx.memory_limit`.
        stream: Stream or device of every operation.

    Raises:
        ValueError: A size or dtype is not what it must be.
        OutOfPages: The pages would pass the memory limit, or there is no memory for them.
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
        allocator=None,
        fill: float = 0.0,
        wipe_freed: float | None = None,
        canary: bool = False,
        memory_limit: int | None = None,
        stream: mx.Stream | mx.Device | None = None,
    ):
        super().__init__(
            num_layers, num_pages, page_size, num_kv_heads, head_dim, dtype, v_head_dim,
            fill=fill, memory_limit=memory_limit, stream=stream,
        )  # fmt: skip
        self.allocator: Any = None
        self.wipe_freed = wipe_freed
        self.canary: Canary | None = None
        self._wants_canary = canary
        self._writes: list[np.ndarray] = []
        self._tokens_stored = np.zeros(num_pages, np.int32)
        if allocator is not None:
            allocator.attach(self)

    # Size

    def grow(self, num_pages: int) -> None:
        """Add pages; those that exist keep their ids and contents.

        Raises:
            ValueError: ``num_pages`` is less than there are.
            OutOfPages: They would pass the memory limit, or there is no memory; the pool is
                as it was.
        """
        before = self.num_pages
        if num_pages < before:
            fail("PagePool.grow", f"num_pages must be at least {before}", num_pages)
        if num_pages > before:
            self._lengthen(num_pages)
            self._fold_writes()
            self._tokens_stored = np.pad(self._tokens_stored, (0, num_pages - before))

    def shrink(self, num_pages: int) -> None:
        """Drop the pages with ids from ``num_pages`` on and give their memory back.

        Raises:
            ValueError: ``num_pages`` is not in [1, the pages there are].
        """
        if not 1 <= num_pages <= self.num_pages:
            fail("PagePool.shrink", f"num_pages must be in [1, {self.num_pages}]", num_pages)
        if num_pages < self.num_pages:
            self._shorten(num_pages)
            self._fold_writes()
            self._tokens_stored = self._tokens_stored[:num_pages].copy()

    # Access, each the next link of the chain

    def __getitem__(self, layer: int) -> LayerPages:
        """The pages of one layer."""
        return LayerPages(self, self._check_layer("PagePool", layer))

    def write(self, layer: int, k: mx.array, v: mx.array, slot_mapping) -> None:
        """Write new tokens' K and V into their pages.

        Args:
            layer: Layer index in ``[0, num_layers)``.
            k: Keys, ``[tokens, num_kv_heads, head_dim]``, the pool's dtype.
            v: Values, ``[tokens, num_kv_heads, v_head_dim]``.
            slot_mapping: ``int32 [tokens]``; destination slot of each token,
                ``page_id * page_size + offset_in_page``; -1 skips the token. A
                :class:`SlotMapping` is checked once for all layers.

        Lazy: nothing moves until the pool is evaluated.

        Raises:
            ValueError: A shape, dtype or slot does not match the pool.
        """
        i = 2 * self._check_layer("PagePool.write", layer)
        slots = self.slots(slot_mapping)
        self._refuse_capture("PagePool.write", k)
        written = operations.write_pages(
            k, v, self.state[i], self.state[i + 1], slots.array, alias=True, stream=self.stream
        )
        if self.canary is not None:
            self._tell_canary(layer, slots)
        self.state[i : i + 2] = written
        if layer == 0 and slots.values is not None:
            self._remember(slots.values)

    def attend(
        self,
        layer: int,
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
        """Attention over the pages of one layer; arguments as in ``fast.paged_attention``."""
        i = 2 * self._check_layer("PagePool.attend", layer)
        k_pages, v_pages = self.state[i : i + 2]
        if isinstance(plan, AttentionPlan):
            _ext.check_plan(plan._native, q, k_pages, v_pages, mask)
        self._refuse_capture("PagePool.attend", q)
        if _ext.is_tracer(q) and not _ext.is_tracer(plan_array(plan)):
            must = "plan must be an input of the compiled function, passed as plan.array"
            fail("PagePool.attend", must, "a plan captured from outside, good for one step only")
        out, lse, self.state[i], self.state[i + 1] = operations.paged_attention(
            q,
            k_pages,
            v_pages,
            plan,
            scale=scale,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            sinks=sinks,
            mask=mask,
            stream=self.stream,
        )
        return (out, lse) if return_lse else out

    def gather(
        self, layer: int, block_tables, context_lens, *, page_starts=None, page_lens=None
    ) -> tuple[mx.array, mx.array]:
        """Contiguous K and V of each sequence, ordered before later writes.

        Arguments and result as in ``fast.gather_pages``.
        """
        i = 2 * self._check_layer("PagePool.gather", layer)
        inputs = gather_inputs(
            "PagePool.gather", self.state[i], block_tables, context_lens, page_starts, page_lens
        )
        k, v, self.state[i], self.state[i + 1] = operations.gather_pages(
            self.state[i], self.state[i + 1], **inputs, stream=self.stream
        )
        return k, v

    def copy(self, pairs) -> None:
        """Copy whole pages in all layers, in one operation, before any later write.

        Args:
            pairs: ``[(source, target), ...]`` page ids.

        Raises:
            ValueError: An id is outside the pool, a target is named twice or is a source.
        """
        array = pair_array("PagePool.copy", pairs, self.num_pages)
        if array.shape[0] == 0:
            return
        self.state[:] = operations.copy_pages(self.state, array, alias=True, stream=self.stream)
        self._fold_writes()
        pairs = np.asarray(pairs)
        self._tokens_stored[pairs[:, 1]] = self._tokens_stored[pairs[:, 0]]

    def slots(self, slot_mapping) -> SlotMapping:
        """``slot_mapping`` checked against this pool, for use with every layer."""
        if isinstance(slot_mapping, SlotMapping):
            if slot_mapping.num_slots > self.num_pages * self.page_size:
                must = f"slot_mapping must be for at most {self.num_pages * self.page_size} slots"
                fail("PagePool.write", must, slot_mapping.num_slots)
            return slot_mapping
        return SlotMapping(slot_mapping, self.state[0])

    # Told by the allocator

    def attached(self, allocator: Any) -> None:
        """Belong to an allocator; it counts who holds the pages.

        Raises:
            ValueError: The pool belongs to another.
        """
        if self.allocator is allocator:
            return
        if self.allocator is not None:
            fail("attach", "pool must belong to no other allocator", repr(self.allocator))
        self.allocator = allocator
        if self._wants_canary:
            self.canary = Canary(allocator, self.num_layers)

    def detached(self) -> None:
        """Belong to no allocator."""
        if self.canary is not None:
            self.allocator.detach(self.canary)
        self.allocator = self.canary = None

    @property
    def wants_freed(self) -> bool:
        """Whether the allocator is to say which pages become free."""
        return self.wipe_freed is not None

    def freed(self, page_ids: Sequence[int]) -> None:
        """Write ``wipe_freed`` over pages, before any later write to them; lazy."""
        if _ext.is_tracer(self.state[0]) or _ext.is_stale(self.state[0]):
            return  # a page freed while a step is traced is freed once, not at every step
        size = self.page_size
        slots = np.array(page_ids, np.int32)[:, None] * size + np.arange(size, dtype=np.int32)
        slots = mx.array(slots.ravel())
        k, v = (
            mx.full((slots.size, self.num_kv_heads, head_dim), self.wipe_freed, self.dtype)
            for head_dim in (self.head_dim, self.v_head_dim)
        )
        for i in range(0, 2 * self.num_layers, 2):
            self.state[i : i + 2] = operations.write_pages(
                k, v, self.state[i], self.state[i + 1], slots, alias=True, stream=self.stream
            )
        self._fold_writes()
        self._tokens_stored[list(page_ids)] = 0

    # Book-keeping

    @property
    def tokens_stored(self) -> np.ndarray:
        """Tokens last written to each page, ``int32 [num_pages]``."""
        self._fold_writes()
        return self._tokens_stored

    def _tell_canary(self, layer: int, slots: SlotMapping) -> None:
        if slots.values is None:
            must = "the pool must have no canary to be written inside mx.compile"
            fail("PagePool.write", must, "canary=True")
        self.canary.wrote_layer(layer, slots.values)

    def _remember(self, slots: np.ndarray) -> None:
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

    def check(self, tables: Iterable[Any] | None = None, caches: Iterable[Any] = ()) -> None:
        """Prove that arrays, versions and allocator agree, and a canary's slots with the tables.

        Args:
            tables: Every page table on the allocator; then each count must equal its holders.
            caches: Every prefix cache on it, counted with the tables.

        Raises:
            AssertionError: They do not; the message says what.
        """
        assert len(self.state) == len(self._base) == 2 * self.num_layers, "an array is missing"
        mx.eval(self.state)
        for i, (newest, base) in enumerate(zip(self.state, self._base)):
            name = f"{'kv'[i % 2]} of layer {i // 2}"
            same = _ext.data_address(newest) == _ext.data_address(base)
            assert same, f"{name} has left the pool's memory"
            assert newest.shape == base.shape, f"{name} has another shape"
        if self.allocator is not None:
            pages = self.allocator.total_pages
            assert pages <= self.num_pages, f"{pages} pages allocatable, {self.num_pages} in arrays"
            tables = None if tables is None else list(tables)
            self.allocator.check(tables, caches)
        if self.canary is not None:
            self.canary.check()
            for layer in range(self.num_layers):
                self.canary.read(layer, tables or ())

    def _refuse_capture(self, op: str, fresh: mx.array) -> None:
        """A traced version must not enter a pool that the trace does not know of, nor stay."""
        if _ext.is_stale(self.state[0]):
            must = (
                "the pool must hold arrays, but a compiled function failed while it was traced: "
                "call pool.reset_versions()"
            )
            fail(op, must, "what mx.compile left behind")
        if _ext.is_tracer(fresh) and not _ext.is_tracer(self.state[0]):
            must = (
                "the pool must be named to mx.compile: "
                "mx.compile(f, inputs=pool.state, outputs=pool.state)"
            )
            fail(op, must, "a traced array for a pool captured from outside")

    def _check_layer(self, op: str, layer: int) -> int:
        if not 0 <= layer < self.num_layers:
            fail(op, f"layer must be in [0, {self.num_layers})", layer)
        return layer

    def __repr__(self):
        return (
            f"PagePool({self.num_layers} layers, {self.num_pages} pages of {self.page_size} tokens, "
            f"{self.num_kv_heads} KV heads of {self.head_dim}, {self.nbytes / 2**20:.1f} MiB)"
        )


class SlotMapping:
    """Slots of a step's new tokens, checked once, used by every layer."""

    def __init__(self, slot_mapping, pages: mx.array):
        self.num_slots = pages.shape[0] * pages.shape[2]
        self.array = slot_array("PagePool.write", slot_mapping, pages)
        traced = isinstance(slot_mapping, mx.array) and _ext.is_tracer(slot_mapping)
        self.values = None if traced else np.array(self.array)
