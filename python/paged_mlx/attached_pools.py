"""The pools that hold the arrays of an allocator's pages, and what they are told."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import Any

from paged_mlx.errors import fail


class AttachedPools:
    """Pools, referenced weakly.

    A pool has ``copy(pairs)``. If it has ``num_pages`` it has at least as many as there are
    ids; then ``grow(num_pages)`` makes it larger and ``shrink(num_pages)``, if it can, smaller.
    """

    def __init__(self) -> None:
        self._pools: list[weakref.ref[Any]] = []

    def __iter__(self) -> Iterator[Any]:
        return iter([pool for pool in (ref() for ref in self._pools) if pool is not None])

    def add(self, pool: Any, total_pages: int, page_size: int) -> None:
        if getattr(pool, "page_size", page_size) != page_size:
            must = f"pool.page_size must be {page_size}, as the allocator's"
            fail("attach", must, pool.page_size)
        if getattr(pool, "num_pages", total_pages) < total_pages:
            must = f"pool.num_pages must be at least {total_pages}, as the allocator's"
            fail("attach", must, pool.num_pages)
        if not any(attached is pool for attached in self):
            self._pools.append(weakref.ref(pool))

    def remove(self, pool: Any) -> None:
        self._pools = [ref for ref in self._pools if ref() is not None and ref() is not pool]

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        for pool in self:
            pool.copy(list(pairs))

    def grow(self, total_pages: int) -> None:
        """Make every pool large enough, or none that cannot say how to grow."""
        short = [pool for pool in self if getattr(pool, "num_pages", total_pages) < total_pages]
        for pool in short:
            if not hasattr(pool, "grow"):
                must = f"the attached pools must be able to grow to {total_pages} pages"
                fail("grow", must, repr(pool))
        for pool in short:
            pool.grow(total_pages)

    def shrink(self, total_pages: int) -> None:
        for pool in self:
            if hasattr(pool, "shrink"):
                pool.shrink(total_pages)
