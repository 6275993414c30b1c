"""The memory of a pool: one buffer for each layer's K and V, and how it grows and shrinks."""

from __future__ import annotations

import mlx.core as mx

from paged_mlx._native import _ext
from paged_mlx.errors import OutOfPages, fail

Arrays = list[list[mx.array]]  # of each layer: [k, v]


class PoolStorage:
    """Buffers that MLX never gives to another operation, because they are held here.

    Args:
        num_layers: Layers.
        num_pages: Pages of each layer.
        page_shapes: Of K and of V, ``(num_kv_heads, page_size, dim)``.
        dtype: float32, float16 or bfloat16.
        fill: Value of fresh pages.
        memory_limit: Bytes that all arrays of MLX may take.
        stream: Stream or device that fills them.

    Attributes:
        base: ``[[k0, v0], [k1, v1], ...]``, evaluated when the memory was taken; every version
            of an array shares its memory.
        num_pages: Pages of each layer.

    Raises:
        OutOfPages: The pages would pass the memory limit, or there is no memory for them.
    """

    def __init__(
        self,
        num_layers: int,
        num_pages: int,
        page_shapes: list[tuple[int, int, int]],
        dtype: mx.Dtype,
        fill: float,
        memory_limit: int,
        stream: mx.Stream | mx.Device | None,
    ):
        self.num_pages = num_pages
        self._fill = fill
        self._page_shapes = page_shapes
        self._dtype = dtype
        self._stream = stream
        elements = sum(heads * page_size * dim for heads, page_size, dim in page_shapes)
        _need("PagePool", num_layers * num_pages * elements * dtype.size, memory_limit)
        self.base: Arrays = [self._memory(num_pages) for _ in range(num_layers)]
        try:  # running out of memory shows here and nowhere later
            mx.eval(self.base)
        except (MemoryError, RuntimeError) as error:
            raise _no_memory("PagePool", num_pages) from error

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for arrays in self.base for array in arrays)

    def lengthen(self, versions: Arrays, num_pages: int, memory_limit: int) -> None:
        """Add pages to every layer, or to none; the newest ``versions`` move to the new memory."""
        before = self.num_pages
        added = (num_pages - before) * (self.nbytes // before)
        _need("PagePool.grow", added + (self.nbytes + added) // len(self.base), memory_limit)
        try:
            for base, newest in zip(self.base, versions):
                self._resize(base, newest, num_pages)
        except (MemoryError, RuntimeError) as error:
            self.shorten(versions, before)
            raise _no_memory("PagePool.grow", num_pages) from error
        self.num_pages = num_pages

    def shorten(self, versions: Arrays, num_pages: int) -> None:
        """Make every layer ``num_pages`` long that is longer, one after the other."""
        for base, newest in zip(self.base, versions):
            if base[0].shape[0] > num_pages:
                self._resize(base, newest, num_pages)
        self.num_pages = num_pages

    def check(self, versions: Arrays) -> None:
        """Prove that the newest versions lie in this memory.

        Raises:
            AssertionError: They do not; the message says which.
        """
        assert len(versions) == len(self.base), "a layer is missing"
        for layer, pairs in enumerate(zip(versions, self.base, strict=True)):
            for letter, newest, base in zip("kv", *pairs, strict=True):
                name = f"{letter} of layer {layer}"
                same = _ext.data_address(newest) == _ext.data_address(base)
                assert same, f"{name} has left the pool's memory"
                assert newest.shape == base.shape, f"{name} has another shape"

    def _resize(self, base: list[mx.array], newest: list[mx.array], num_pages: int) -> None:
        """Give one layer other memory; a layer at a time, so that little is held twice."""
        resized = self._memory(num_pages, newest)
        mx.eval(resized)
        base[:] = newest[:] = resized

    def _memory(self, num_pages: int, kept: list[mx.array] | None = None) -> list[mx.array]:
        """K and V of one layer in new memory: the pages kept, then fresh ones; lazy."""
        return [
            _ext.pool_memory(
                None if kept is None else kept[i],
                (num_pages, *page_shape),
                self._fill,
                self._dtype,
                stream=self._stream,
            )
            for i, page_shape in enumerate(self._page_shapes)
        ]


def _need(op: str, nbytes: int, memory_limit: int) -> None:
    """Refuse what would take MLX past the memory limit."""
    active = mx.get_active_memory()
    if active + nbytes > memory_limit:
        must = (
            f"memory_limit must be at least {active + nbytes} bytes, the {active} in use and "
            f"{nbytes} for pages"
        )
        fail(op, must, memory_limit, OutOfPages)


def _no_memory(op: str, num_pages: int) -> OutOfPages:
    return OutOfPages(f"[{op}] the machine must have memory for {num_pages} pages; got none.")
