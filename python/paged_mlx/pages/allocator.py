"""Which pages are free, and how often each of the others is held.

An allocator knows page ids and nothing about arrays. A page is *free* (ref_count 0),
*owned* (1) or *shared* (more). Pools that hold the arrays attach themselves and are told
which pages to copy. Evictors, such as a prefix cache, hold references like any sequence
and give pages back when the free list is empty.

Not thread-safe: an allocator and its tables belong to one thread at a time.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from paged_mlx.errors import (
    DoubleFree,
    OutOfPages,
    UseAfterFree,
    fail,
    whole_number,
)
from paged_mlx.pages.observers import AttachedPools
from paged_mlx.pages.page_checks import check_counts, check_holders
from paged_mlx.pages.page_counts import PageCounts, fail_free
from paged_mlx.prefix.eviction import Evictor, Evictors

MAX_SLOTS = 2**31 - 1  # a slot is an int32


class PageAllocator(PageCounts):
    """Hands out page ids and counts who holds them; the page freed last is reused first.

    Args:
        total_pages: Pages in the pool; ids are ``[0, total_pages)``.
        page_size: Tokens in a page.
        max_pages: Where growth on demand ends; default ``total_pages``, so no growth.
        slab_pages: Pages added by each growth on demand; default ``total_pages``.

    Every operation is O(1) per page.
    """

    def __init__(
        self,
        total_pages: int,
        page_size: int,
        *,
        max_pages: int | None = None,
        slab_pages: int | None = None,
    ) -> None:
        name = type(self).__name__
        super().__init__(whole_number(name, "total_pages", total_pages, 1))
        self._page_size = whole_number(name, "page_size", page_size, 1)
        self._max_pages = whole_number(
            name, "max_pages", self._total if max_pages is None else max_pages, self._total
        )
        self._slab_pages = whole_number(
            name, "slab_pages", self._total if slab_pages is None else slab_pages, 1
        )
        if self._max_pages * self._page_size > MAX_SLOTS:
            fail(
                name,
                f"total_pages * page_size must be at most {MAX_SLOTS}, because a slot is an int32",
                self._max_pages * self._page_size,
            )
        self._evictors = Evictors()
        self._pools = AttachedPools()
        self._reset_free(range(self._total))

    # The free list: the only part that a policy changes.

    def _reset_free(self, page_ids: Iterable[int]) -> None:
        """Make exactly ``page_ids``, ascending, the free pages."""
        self._free = list(page_ids)[::-1]

    def _take_one(self) -> int | None:
        """Remove a page from the free list; None when that is empty."""
        return self._free.pop() if self._free else None

    def _take(self, num_pages: int) -> list[int]:
        """Remove ``num_pages`` pages from the free list, which has that many."""
        taken = self._free[: -num_pages - 1 : -1]
        del self._free[len(self._free) - num_pages :]
        return taken

    def _put_one(self, page_id: int) -> None:
        """Add a page whose last reference is gone to the free list."""
        self._free.append(page_id)

    def _put(self, page_ids: Sequence[int]) -> None:
        """Add pages whose last reference is gone to the free list."""
        self._free.extend(page_ids)

    def _free_ids(self) -> Iterator[int]:
        """Every id on the free list."""
        return iter(self._free)

    @property
    def num_free(self) -> int:
        """Pages nobody holds."""
        return len(self._free)

    # Figures.

    @property
    def max_pages(self) -> int:
        """Pages the pool may grow to on demand."""
        return self._max_pages

    @property
    def page_size(self) -> int:
        """Tokens in a page."""
        return self._page_size

    @property
    def num_used(self) -> int:
        """Pages that somebody holds."""
        return self._total - self.num_free

    @property
    def num_evictable(self) -> int:
        """Pages that evictors hold and nobody else."""
        return sum(evictor.num_evictable for evictor in self._evictors)

    @property
    def num_available(self) -> int:
        """Pages that an allocation could get: free, evictable, or not grown yet."""
        return self.num_free + self.num_evictable + self._max_pages - self._total

    def fragmentation(self) -> float:
        """How far the free pages are from forming one run, from 0 (not at all) to 1.

        ``1 - longest / possible``, in pages: ``longest`` is the longest free run that is
        a power of two and aligned to its size, ``possible`` the longest that as many free
        pages could form. O(total_pages); a buddy allocator answers in O(log).
        """
        if not self.num_free:
            return 0.0
        free = self._counts == 0
        longest = 1
        while free.size >= 2:
            free = free[: free.size // 2 * 2].reshape(-1, 2).all(axis=1)
            if not free.any():
                break
            longest *= 2
        return 1.0 - longest / (1 << (self.num_free.bit_length() - 1))

    # Allocate, share, free.

    def allocate_page(self) -> int | None:
        """Take one free page, held once; None when the pool is empty.

        Raises:
            OutOfPages: The pool may grow, and there is no memory to.
        """
        page_id = self._take_one()
        if page_id is None:
            if not self._make_room(1):
                return None
            page_id = self._take_one()
        self._refs[page_id] = 1
        return page_id

    def allocate_pages(self, num_pages: int) -> list[int] | None:
        """Take ``num_pages`` free pages, each held once; None, and nothing taken, when too few.

        Raises:
            OutOfPages: The pool may grow, and there is no memory to; nothing is taken.
        """
        num_pages = whole_number("allocate_pages", "num_pages", num_pages)
        if num_pages > self.num_free and not self._make_room(num_pages):
            return None
        if not num_pages:
            return []
        page_ids = self._take(num_pages)
        refs = self._refs
        for page_id in page_ids:
            refs[page_id] = 1
        return page_ids

    def share_page(self, page_id: int) -> None:
        """Add a holder to a page that has one.

        Raises:
            UseAfterFree: Nobody holds the page.
            UnknownPage: The id is not of this pool.
        """
        page_id = self._known("share_page", page_id)
        count = self._refs[page_id]
        if not count:
            fail_free("share_page", page_id, UseAfterFree)
        self._refs[page_id] = count + 1
        if count == 1 and page_id in self._evictors.watched:
            self._evictors.busy((page_id,))

    def free_page(self, page_id: int) -> None:
        """Remove a holder; the page becomes free with its last one.

        Stale bytes stay in the arrays: nothing outside a context is ever read.

        Raises:
            DoubleFree: Nobody holds the page.
            UnknownPage: The id is not of this pool.
        """
        page_id = self._known("free_page", page_id)
        count = self._refs[page_id] - 1
        if count < 0:
            fail_free("free_page", page_id, DoubleFree)
        self._refs[page_id] = count
        if not count:
            self._put_one(page_id)
            if self._pools.wants_freed:
                self._pools.freed((page_id,))
        elif count == 1 and page_id in self._evictors.watched:
            self._evictors.idle((page_id,))

    def share_pages(self, page_ids: array[int] | Sequence[int]) -> None:
        """``share_page`` for many different pages at once, all or nothing."""
        ids = self._distinct("share_pages", page_ids)
        before = self._held("share_pages", ids, UseAfterFree)
        self._counts[ids] = before + 1
        if self._evictors.watched:
            self._evictors.busy(ids[before == 1].tolist())

    def free_pages(self, page_ids: array[int] | Sequence[int]) -> None:
        """``free_page`` for many different pages at once, all or nothing."""
        ids = self._distinct("free_pages", page_ids)
        before = self._held("free_pages", ids, DoubleFree)
        self._counts[ids] = before - 1
        freed = ids[before == 1].tolist()
        self._put(freed)
        if freed and self._pools.wants_freed:
            self._pools.freed(freed)
        if self._evictors.watched:
            self._evictors.idle(ids[before == 2].tolist())

    # Evictors.

    def add_evictor(self, evictor: Evictor) -> None:
        """Ask ``evictor`` for pages, after those added before it, when none is free."""
        self._evictors.add(evictor)

    def remove_evictor(self, evictor: Evictor) -> None:
        """Ask ``evictor`` no more.

        Raises:
            ValueError: It was never added, or still watches pages.
        """
        self._evictors.remove(evictor)

    def watch(self, page_id: int, evictor: Evictor) -> None:
        """Tell ``evictor`` whenever it becomes, or stops being, the page's only holder.

        The evictor holds a reference already.

        Raises:
            UseAfterFree: Nobody holds the page.
            PageError: Another evictor watches it.
        """
        if not self._refs[self._known("watch", page_id)]:
            fail_free("watch", page_id, UseAfterFree)
        self._evictors.watch(page_id, evictor)

    def unwatch(self, page_id: int) -> None:
        """End ``watch``."""
        self._evictors.unwatch(page_id)

    def is_watched(self, page_id: int) -> bool:
        """Whether an evictor watches the page."""
        return page_id in self._evictors.watched

    def forget_pages(self, page_ids: Iterable[int]) -> None:
        """Have the evictors that watch these pages let go of them; other holders keep them."""
        self._evictors.forget(page_ids)

    def _make_room(self, num_pages: int) -> bool:
        """Grow, then evict, until ``num_pages`` are free; change nothing if that cannot be.

        Raises:
            OutOfPages: A pool cannot grow, and there are too few pages to evict.
        """
        if num_pages > self.num_available:
            return False
        while num_pages > self.num_free and self._total < self._max_pages:
            try:
                self.grow(min(self._slab_pages, self._max_pages - self._total))
            except OutOfPages:
                if num_pages > self.num_free + self.num_evictable:
                    raise
                break
        for evictor in self._evictors:
            if num_pages > self.num_free:
                evictor.evict(num_pages - self.num_free)
        return num_pages <= self.num_free

    # Pools.

    def attach(self, pool: Any) -> None:
        """Tell a pool, see ``AttachedPools``, which pages to copy and how many there are.

        The pool is referenced weakly. Attaching twice is the same as once.

        Raises:
            ValueError: The pool has fewer pages than ids exist, or pages of another size.
        """
        self._pools.add(pool, self)

    def detach(self, pool: Any) -> None:
        """Undo ``attach``; a pool that is not attached is left alone."""
        self._pools.remove(pool)

    @property
    def pools(self) -> list[Any]:
        """The attached pools that are still alive."""
        return list(self._pools)

    def copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Have every attached pool copy whole pages, in one operation for all layers.

        Args:
            pairs: ``(source, target)`` page ids; each page is held by somebody.
        """
        for page_id in (page_id for pair in pairs for page_id in pair):
            if not self._refs[self._known("copy_pages", page_id)]:
                fail_free("copy_pages", page_id, UseAfterFree)
        if pairs:
            self._pools.copy(pairs)

    # Size.

    def grow(self, num_pages: int) -> None:
        """Add ``num_pages`` free pages with new ids; attached pools grow first.

        An error of a pool that cannot grow passes through; the allocator is as before.
        """
        total = self._total + whole_number("grow", "num_pages", num_pages, 1)
        if total * self._page_size > MAX_SLOTS:
            fail(
                "grow",
                f"num_pages must keep slots below {MAX_SLOTS}, because a slot is an int32",
                num_pages,
            )
        self._pools.grow(total)
        added = range(self._total, total)
        counts = self._refs[:]
        counts.extend(0 for _ in added)
        self._set_counts(counts)
        self._total, self._max_pages = total, max(total, self._max_pages)
        self._put(added[::-1])

    def shrink(self, num_pages: int | None = None) -> int:
        """Remove up to ``num_pages`` free pages (default: all) from the top of the id range.

        Returns:
            Pages removed. A page in use, and every id below it, stays; so does page 0.
        """
        wanted = (
            self._total - 1 if num_pages is None else whole_number("shrink", "num_pages", num_pages)
        )
        used = np.flatnonzero(self._counts)
        lowest = max(int(used[-1]) + 1 if used.size else 1, self._total - wanted)
        if lowest >= self._total:
            return 0
        self._pools.shrink(lowest)
        removed, self._total = self._total - lowest, lowest
        self._set_counts(self._refs[:lowest])
        self._reset_free(np.flatnonzero(self._counts == 0).tolist())
        return removed

    # Checks.

    def check(self, tables: Iterable[Any] | None = None, caches: Iterable[Any] = ()) -> None:
        """Prove that reference counts, free list and watchers agree.

        Args:
            tables: Every page table on this allocator; then each count must equal its holders.
            caches: Every prefix cache on it, counted with the tables.

        Raises:
            AssertionError: With what disagrees.
        """
        check_counts(self)
        if tables is not None:
            check_holders(self, [*tables, *caches])

    def _own_references(self) -> np.ndarray:
        """References that the allocator itself holds, per page."""
        return np.zeros(self._total, dtype=np.int64)
