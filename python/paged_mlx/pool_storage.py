"""The memory of a pool: buffers for each layer's K and V, and how they grow and shrink."""

from __future__ import annotations

import mlx.core as mx

from paged_mlx._native import _ext
from paged_mlx.errors import OutOfPages, fail
from paged_mlx.formats.page_format import ArraySpec

# A pool has addresses for so many pages and bytes at most; beyond them it is copied as it grows.
MOST_PAGES, MOST_BYTES = 1 << 24, 1 << 43
Arrays = list[list[mx.array]]  # of each layer: K's, V's, then those of open pages


class PoolStorage:
    """Buffers that MLX never gives to another operation, because they are held here.

    Args:
        num_layers: Layers.
        num_pages: Pages of each layer.
        specs: The arrays of a layer, for each page.
        fills: Value of fresh pages in each of them.
        open_specs: Further arrays of a layer, for each open page.
        memory_limit: Bytes that all arrays of MLX may take.
        stream: Stream or device that fills them.

    Attributes:
        base: ``[[k0, v0], [k1, v1], ...]``, evaluated when the memory was taken; every version
            of an array shares its memory.
        num_pages: Pages of each layer.
        num_open: Open pages that there is memory for.
        page_nbytes, open_nbytes: Bytes of one page id, and of one open page, in all layers.

    Raises:
        OutOfPages: The pages would pass the memory limit, or there is no memory for them.
    """

    def __init__(
        self,
        num_layers: int,
        num_pages: int,
        specs: list[ArraySpec],
        fills: list[float],
        open_specs: list[ArraySpec],
        memory_limit: int,
        stream: mx.Stream | mx.Device | None,
    ):
        self.num_pages = num_pages
        self.num_open = 1 if open_specs else 0
        self._specs, self._fills = [*specs, *open_specs], [*fills, *(0.0 for _ in open_specs)]
        self._num_paged = len(specs)
        self._stream = stream
        self.page_nbytes = num_layers * sum(spec.nbytes for spec in specs)
        self.open_nbytes = num_layers * sum(spec.nbytes for spec in open_specs)
        nbytes = num_pages * self.page_nbytes + self.num_open * self.open_nbytes
        _need("PagePool", nbytes, memory_limit)
        self._most_pages = min(min(2 * memory_limit, MOST_BYTES) // self.page_nbytes, MOST_PAGES)
        self.base: Arrays = [self._memory(num_pages, self.num_open) for _ in range(num_layers)]
        try:  # running out of memory shows here and nowhere later
            mx.eval(self.base)
        except (MemoryError, RuntimeError) as error:
            raise _no_memory("PagePool", num_pages) from error

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for arrays in self.base for array in arrays)

    def lengthen(self, versions: Arrays, num_pages: int, memory_limit: int) -> None:
        """Add pages to every layer, or to none; the newest ``versions`` move to the new memory."""
        added = (num_pages - self.num_pages) * self.page_nbytes
        self._grow("PagePool.grow", versions, num_pages, self.num_open, added, memory_limit)

    def add_open(self, versions: Arrays, num_open: int, memory_limit: int) -> None:
        """Have memory for more open pages in every layer, or in none."""
        added = (num_open - self.num_open) * self.open_nbytes
        self._grow("PagePool", versions, self.num_pages, num_open, added, memory_limit)

    def _grow(self, op, versions, num_pages, num_open, added, memory_limit) -> None:
        before = self.num_pages, self.num_open
        nbytes = self.nbytes if num_pages > self.num_pages else self.num_open * self.open_nbytes
        _need(op, added + (nbytes + added) // len(self.base), memory_limit)
        try:
            for base, newest in zip(self.base, versions):
                self._resize(base, newest, num_pages, num_open)
        except (MemoryError, RuntimeError) as error:
            self._cut(versions, *before)
            raise _no_memory(op, num_pages) from error
        self.num_pages, self.num_open = num_pages, num_open

    def shorten(self, versions: Arrays, num_pages: int) -> None:
        """Make every layer ``num_pages`` long that is longer, one after the other."""
        self._cut(versions, num_pages, self.num_open)
        self.num_pages = num_pages

    def drop_open(self, versions: Arrays, num_open: int) -> None:
        """Give back the memory of open pages from ``num_open`` on."""
        self._cut(versions, self.num_pages, num_open)
        self.num_open = num_open

    def _cut(self, versions: Arrays, num_pages: int, num_open: int) -> None:
        for base, newest in zip(self.base, versions):
            if [array.shape[0] for array in base] != self._lengths(num_pages, num_open):
                self._resize(base, newest, num_pages, num_open)

    def check(self, versions: Arrays) -> None:
        """Prove that the newest versions lie in this memory.

        Raises:
            AssertionError: They do not; the message says which.
        """
        assert len(versions) == len(self.base), "a layer is missing"
        address = _ext.data_address
        for layer, pairs in enumerate(zip(versions, self.base, strict=True)):
            for i, (newest, base) in enumerate(zip(*pairs, strict=True)):
                name = f"{'kv'[i] if len(self._specs) == 2 else f'array {i}'} of layer {layer}"
                same = address(newest) == address(base)
                assert same, f"{name} has left the pool's memory"
                assert newest.shape == base.shape, f"{name} has another shape"

    def _lengths(self, num_pages: int, num_open: int) -> list[int]:
        return [num_pages if i < self._num_paged else num_open for i in range(len(self._specs))]

    def _resize(self, base, newest, num_pages: int, num_open: int) -> None:
        """Give one layer more or less memory: in place if that can be, else it is copied; a layer
        at a time, so that little is held twice."""
        mx.eval(newest)
        resized = self._memory(num_pages, num_open, newest)
        mx.eval(resized)
        base[:] = newest[:] = resized

    def _memory(
        self, num_pages: int, num_open: int, kept: list[mx.array] | None = None
    ) -> list[mx.array]:
        """The arrays of one layer, where they get longer or shorter in new memory: the pages
        kept, then fresh ones; lazy."""
        memory = []
        for i, length in enumerate(self._lengths(num_pages, num_open)):
            spec, before = self._specs[i], None if kept is None else kept[i]
            if before is not None and before.shape[0] == length:
                memory.append(before)
                continue
            fill, resized = self._fills[i], None
            if before is not None:
                resized = _ext.resized_in_place(before, length, fill)
            memory.append(
                _ext.pool_memory(
                    before, (length, *spec.shape), fill, spec.dtype,
                    most_pages=max(length, self._most_pages), stream=self._stream,
                )
                if resized is None
                else resized
            )  # fmt: skip
        return memory


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
