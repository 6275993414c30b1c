"""The memory of a pool: one buffer per layer and per K or V, and how it grows and shrinks."""

from __future__ import annotations

import mlx.core as mx

from paged_mlx._native import _ext
from paged_mlx.device_memory import memory_limit as default_memory_limit
from paged_mlx.device_memory import pages_within
from paged_mlx.errors import OutOfPages, fail

FLOATS = (mx.float32, mx.float16, mx.bfloat16)


class PoolArrays:
    """The arrays of a :class:`~paged_mlx.PagePool`, which documents the arguments.

    ``state`` holds their newest versions, ``_base`` the arrays that were evaluated when the
    memory was taken; all versions of an array share its memory.
    """

    def __init__(
        self,
        num_layers: int,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: mx.Dtype,
        v_head_dim: int | None,
        *,
        fill: float,
        memory_limit: int | None,
        stream: mx.Stream | mx.Device | None,
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
        self.fill = fill
        self.memory_limit = default_memory_limit() if memory_limit is None else memory_limit
        self.stream = stream
        token_nbytes = num_kv_heads * (head_dim + v_head_dim) * dtype.size
        self._need("PagePool", num_layers * num_pages * page_size * token_nbytes)
        # While the base is held here, MLX never gives its memory to another operation.
        self._base = self._allocate(num_pages)
        self.state = list(self._base)

    @property
    def num_pages(self) -> int:
        return self.state[0].shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all pages of all layers."""
        return sum(array.nbytes for array in self._base)

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

    def _memory(self, num_pages: int, kept: list[mx.array] | None = None) -> list[mx.array]:
        """K and V of one layer in new memory: the pages kept, then fresh ones; lazy."""
        dims = (self.head_dim, self.v_head_dim)
        return [
            _ext.pool_memory(
                None if kept is None else kept[i],
                (num_pages, self.num_kv_heads, self.page_size, head_dim),
                self.fill,
                self.dtype,
                stream=self.stream,
            )
            for i, head_dim in enumerate(dims)
        ]

    def _allocate(self, num_pages: int) -> list[mx.array]:
        """New arrays, memory in hand: running out of it shows here and nowhere later."""
        arrays = [array for _ in range(self.num_layers) for array in self._memory(num_pages)]
        try:
            mx.eval(arrays)
        except (MemoryError, RuntimeError) as error:
            raise _no_memory("PagePool", num_pages) from error
        return arrays

    def _need(self, op: str, nbytes: int) -> None:
        """Refuse what would take MLX past the memory limit."""
        active = mx.get_active_memory()
        if active + nbytes > self.memory_limit:
            must = (
                f"memory_limit must be at least {active + nbytes} bytes, the {active} in use and "
                f"{nbytes} for pages"
            )
            fail(op, must, self.memory_limit, OutOfPages)

    def reset_versions(self) -> None:
        """Forget pending operations; pages keep what evaluated writes left in them.

        For use after an evaluation that failed: the versions that hung on it can never
        be evaluated.
        """
        self.state[:] = self._base

    def _lengthen(self, num_pages: int) -> None:
        """Add pages to every layer, or to none."""
        before = self.num_pages
        added = (num_pages - before) * self.page_nbytes
        self._need("PagePool.grow", added + (self.nbytes + added) // self.num_layers)
        try:
            for layer in range(self.num_layers):
                self._resize_layer(layer, num_pages)
        except (MemoryError, RuntimeError) as error:
            self._shorten(before)
            raise _no_memory("PagePool.grow", num_pages) from error

    def _resize_layer(self, layer: int, num_pages: int) -> None:
        """Give one layer other memory; a layer at a time, so that little is held twice."""
        pair = slice(2 * layer, 2 * layer + 2)
        resized = self._memory(num_pages, self.state[pair])
        mx.eval(resized)
        self._base[pair] = self.state[pair] = resized

    def _shorten(self, num_pages: int) -> None:
        """Make every layer ``num_pages`` long that is longer, one after the other."""
        for layer in range(self.num_layers):
            if self.state[2 * layer].shape[0] > num_pages:
                self._resize_layer(layer, num_pages)


def _no_memory(op: str, num_pages: int) -> OutOfPages:
    return OutOfPages(f"[{op}] the machine must have memory for {num_pages} pages; got none.")
