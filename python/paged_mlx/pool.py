"""K and V of all layers in pages, and their linear versions.

MLX evaluates by dependency, not in program order. So every access to a layer's
pages consumes the newest version of its arrays and returns the next one, which
shares the same memory: each order that matters is an edge of the graph, and
nothing is ever copied (docs/design.md, "Linear versions").
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from paged_mlx import operations
from paged_mlx._native import _ext
from paged_mlx.attention_plan import AttentionPlan, plan_array
from paged_mlx.device_memory import memory_limit as default_memory_limit
from paged_mlx.device_memory import pages_within
from paged_mlx.errors import fail
from paged_mlx.fast import gather_inputs, pair_array, slot_array
from paged_mlx.pages.canary import Canary
from paged_mlx.pool_storage import PoolStorage

FLOATS = (mx.float32, mx.float16, mx.bfloat16)


class PagePool:
    """K and V of all layers, in pages of one size, written in place.

    ``pool[layer]`` is one layer. ``state`` holds the newest versions of all layers' arrays,
    ``[[k0, v0], [k1, v1], ...]``, each ``[num_pages, num_kv_heads, page_size, head_dim]``: a
    tree that ``mx.eval`` and ``mx.compile`` take. Evaluate it with the outputs of a step
    (``mx.async_eval(out, pool.state)``) when a write may have no reader.

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
        v_head_dim = head_dim if v_head_dim is None else v_head_dim
        sizes = {
            "num_layers": num_layers,
            "num_pages": num_pages,
            "page_size": page_size,
            "num_kv_heads": num_kv_heads,
            "head_dim": head_dim,
            "v_head_dim": v_head_dim,
        }
        for name, size in sizes.items():
            if size < 1:
                fail("PagePool", f"{name} must be at least 1", size)
        if dtype not in FLOATS:
            fail("PagePool", "dtype must be float32, float16 or bfloat16", dtype)
        self.num_layers = num_layers
        self.page_size = page_size
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.v_head_dim = v_head_dim
        self.dtype = dtype
        self.memory_limit = default_memory_limit() if memory_limit is None else memory_limit
        self.stream = stream
        shapes = ((num_kv_heads, page_size, head_dim), (num_kv_heads, page_size, v_head_dim))
        self._storage = PoolStorage(
            num_layers, num_pages, shapes, dtype, fill, self.memory_limit, stream
        )
        self.state = [list(arrays) for arrays in self._storage.base]
        self.allocator: Any = None
        self.wipe_freed = wipe_freed
        self.canary: Canary | None = None
        self._wants_canary = canary
        self._writes: list[np.ndarray] = []
        self._tokens_stored = np.zeros(num_pages, np.int32)
        if allocator is not None:
            allocator.attach(self)

    # Size

    @property
    def num_pages(self) -> int:
        return self._storage.num_pages

    @property
    def nbytes(self) -> int:
        """Bytes of all pages of all layers."""
        return self._storage.nbytes

    @property
    def page_nbytes(self) -> int:
        """Bytes of one page id, K and V, all layers."""
        return self.nbytes // self.num_pages

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
        )

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
            self._storage.lengthen(self.state, num_pages, self.memory_limit)
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
            self._storage.shorten(self.state, num_pages)
            self._fold_writes()
            self._tokens_stored = self._tokens_stored[:num_pages].copy()

    # Access, each the next link of the chain

    def __getitem__(self, layer: int) -> PoolLayer:
        """One layer: its arrays, and a mapping page_id -> PageBlock of its pages."""
        return PoolLayer(self, self._check_layer("PagePool", layer))

    def write(self, layer: int, k: mx.array, v: mx.array, slot_mapping) -> None:
        """``pool[layer].write(k, v, slot_mapping)``."""
        self[layer].write(k, v, slot_mapping)

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
        state = self.state
        flat = [pages for arrays in state for pages in arrays]
        copied = iter(operations.copy_pages(flat, array, alias=True, stream=self.stream))
        for arrays in state:
            arrays[:] = [next(copied) for _ in arrays]
        self._fold_writes()
        pairs = np.asarray(pairs)
        self._tokens_stored[pairs[:, 1]] = self._tokens_stored[pairs[:, 0]]

    def slots(self, slot_mapping) -> SlotMapping:
        """``slot_mapping`` checked against this pool, for use with every layer."""
        num_slots = self.num_pages * self.page_size
        if isinstance(slot_mapping, SlotMapping):
            if slot_mapping.num_slots > num_slots:
                must = f"slot_mapping must be for at most {num_slots} slots"
                fail("PagePool.write", must, slot_mapping.num_slots)
            return slot_mapping
        return SlotMapping(slot_mapping, self.state[0][0])

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
        newest = self.state[0][0]
        if _ext.is_tracer(newest) or _ext.is_stale(newest):
            return  # a page freed while a step is traced is freed once, not at every step
        size = self.page_size
        slots = np.array(page_ids, np.int32)[:, None] * size + np.arange(size, dtype=np.int32)
        slots = mx.array(slots.ravel())
        k, v = (
            mx.full((slots.size, self.num_kv_heads, head_dim), self.wipe_freed, self.dtype)
            for head_dim in (self.head_dim, self.v_head_dim)
        )
        for arrays in self.state:
            arrays[:] = operations.write_pages(k, v, *arrays, slots, alias=True, stream=self.stream)
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

    def check(self, tables: Iterable[Any] | None = None, caches: Iterable[Any] = ()) -> None:
        """Prove that arrays, versions and allocator agree, and a canary's slots with the tables.

        Args:
            tables: Every page table on the allocator; then each count must equal its holders.
            caches: Every prefix cache on it, counted with the tables.

        Raises:
            AssertionError: They do not; the message says what.
        """
        mx.eval(self.state)
        self._storage.check(self.state)
        if self.allocator is not None:
            pages = self.allocator.total_pages
            assert pages <= self.num_pages, f"{pages} pages allocatable, {self.num_pages} in arrays"
            tables = None if tables is None else list(tables)
            self.allocator.check(tables, caches)
        if self.canary is not None:
            self.canary.check()
            for layer in range(self.num_layers):
                self.canary.read(layer, tables or ())

    def _check_layer(self, op: str, layer: int) -> int:
        if not 0 <= layer < self.num_layers:
            fail(op, f"layer must be in [0, {self.num_layers})", layer)
        return layer

    def __repr__(self):
        return (
            f"PagePool({self.num_layers} layers, {self.num_pages} pages of {self.page_size} tokens, "
            f"{self.num_kv_heads} KV heads of {self.head_dim}, {self.nbytes / 2**20:.1f} MiB)"
        )


class PoolLayer(Mapping):
    """One layer of a pool: its arrays, and a mapping page_id -> PageBlock of its pages.

    :func:`paged_mlx.paged_attention` reads the arrays directly.

    Attributes:
        pool: The pool.
        index: The layer's number there.
    """

    __slots__ = ("pool", "index")

    def __init__(self, pool: PagePool, index: int):
        self.pool = pool
        self.index = index

    @property
    def arrays(self) -> list[mx.array]:
        """``[k, v]``: the newest versions, in the list that ``pool.state`` holds."""
        return self.pool.state[self.index]

    def write(self, k: mx.array, v: mx.array, slot_mapping) -> None:
        """Write new tokens' K and V into their pages.

        Args:
            k: Keys, ``[tokens, num_kv_heads, head_dim]``, the pool's dtype.
            v: Values, ``[tokens, num_kv_heads, v_head_dim]``.
            slot_mapping: ``int32 [tokens]``; destination slot of each token,
                ``page_id * page_size + offset_in_page``; -1 skips the token. A
                :class:`SlotMapping`, from ``pool.slots(...)``, is checked once for all layers.

        Lazy: nothing moves until the pool is evaluated.

        Raises:
            ValueError: A shape, dtype or slot does not match the pool.
        """
        pool = self.pool
        slots = pool.slots(slot_mapping)
        arrays = self.arrays
        _refuse_capture("PagePool.write", arrays[0], k)
        written = operations.write_pages(k, v, *arrays, slots.array, alias=True, stream=pool.stream)
        if pool.canary is not None:
            if slots.values is None:
                must = "the pool must have no canary to be written inside mx.compile"
                fail("PagePool.write", must, "canary=True")
            pool.canary.wrote_layer(self.index, slots.values)
        arrays[:] = written
        if self.index == 0 and slots.values is not None:
            pool.remember(slots.values)

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
        """Attention over the layer's pages; arguments as in ``fast.paged_attention``."""
        arrays = self.arrays
        k_pages, v_pages = arrays
        if isinstance(plan, AttentionPlan):
            _ext.check_plan(plan._native, q, k_pages, v_pages, mask)
        _refuse_capture("PagePool.attend", k_pages, q)
        if _ext.is_tracer(q) and not _ext.is_tracer(plan_array(plan)):
            must = "plan must be an input of the compiled function, passed as plan.array"
            fail("PagePool.attend", must, "a plan captured from outside, good for one step only")
        out, lse, *arrays[:] = operations.paged_attention(
            q,
            k_pages,
            v_pages,
            plan,
            scale=scale,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            sinks=sinks,
            mask=mask,
            stream=self.pool.stream,
        )
        return (out, lse) if return_lse else out

    def gather(
        self, block_tables, context_lens, *, page_starts=None, page_lens=None
    ) -> tuple[mx.array, mx.array]:
        """Contiguous K and V of each sequence, ordered before later writes.

        Arguments and result as in ``fast.gather_pages``.
        """
        arrays = self.arrays
        inputs = gather_inputs(
            "PagePool.gather", arrays[0], block_tables, context_lens, page_starts, page_lens
        )
        k, v, *arrays[:] = operations.gather_pages(*arrays, **inputs, stream=self.pool.stream)
        return k, v

    def __getitem__(self, page_id: int) -> PageBlock:
        if not 0 <= page_id < self.pool.num_pages:
            raise KeyError(page_id)
        return PoolPageBlock(self, int(page_id))

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
    """

    def __init__(self, page_id, tokens_stored, max_tokens, ref_count, key_data, value_data):
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
    def ref_count(self) -> int:
        allocator = self._layer.pool.allocator
        return allocator.ref_count(self.page_id) if allocator is not None else 1

    @property
    def _data(self):
        k, v = self._layer.gather([[self.page_id]], [self.max_tokens])
        return k[0], v[0]


class SlotMapping:
    """Slots of a step's new tokens, checked once, used by every layer."""

    def __init__(self, slot_mapping, pages: mx.array):
        self.num_slots = pages.shape[0] * pages.shape[2]
        self.array = slot_array("PagePool.write", slot_mapping, pages)
        traced = isinstance(slot_mapping, mx.array) and _ext.is_tracer(slot_mapping)
        self.values = None if traced else np.array(self.array)
