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
    If it can, it is told to whom it belongs, ``attached(allocator)`` and ``detached()``, and,
    if ``wants_freed`` is true, which pages become free, ``freed(page_ids)``.

    ``wants_freed``: whether any of them does.
    """

    def __init__(self) -> None:
        self._pools: list[weakref.ref[Any]] = []
        self.wants_freed = False

    def __iter__(self) -> Iterator[Any]:
        return iter([pool for pool in (ref() for ref in self._pools) if pool is not None])

    def add(self, pool: Any, allocator: Any) -> None:
        total_pages, page_size = allocator.total_pages, allocator.page_size
        if getattr(pool, "page_size", page_size) != page_size:
            must = f"pool.page_size must be {page_size}, as the allocator's"
            fail("attach", must, pool.page_size)
        if getattr(pool, "num_pages", total_pages) < total_pages:
            must = f"pool.num_pages must be at least {total_pages}, as the allocator's"
            fail("attach", must, pool.num_pages)
        if hasattr(pool, "attached"):
            pool.attached(allocator)
        if not any(attached is pool for attached in self):
            self._pools.append(weakref.ref(pool))
            self.wants_freed |= getattr(pool, "wants_freed", False)

    def remove(self, pool: Any) -> None:
        if not any(attached is pool for attached in self):
            return
        self._pools = [ref for ref in self._pools if ref() is not None and ref() is not pool]
        self.wants_freed = any(getattr(pool, "wants_freed", False) for pool in self)
        if hasattr(pool, "detached"):
            pool.detached()

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        for pool in self:
            pool.copy(list(pairs))

    def freed(self, page_ids: Sequence[int]) -> None:
        for pool in self:
            if getattr(pool, "wants_freed", False):
                pool.freed(page_ids)

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
