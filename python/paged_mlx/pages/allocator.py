"""The free pages, and the number of holders of each of the others.

An allocator knows page ids and nothing about arrays. A page is *free* (ref_count 0),
*owned* (1) or *shared* (more). Pools that hold the arrays attach themselves and are told
which pages to copy. Evictors, such as a prefix cache, hold references like any sequence
and give pages back when the free list is empty.

Not thread-safe: an allocator and its tables belong to one thread at a time.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NoReturn
from weakref import WeakValueDictionary

import numpy as np

from paged_mlx.errors import (
    DoubleFree,
    OutOfPages,
    PageError,
    UnknownPage,
    UseAfterFree,
    as_list,
    fail,
    holders,
    kind_of,
    whole_number,
)
from paged_mlx.pages.observers import Evictor, Evictors, Pool

MAX_SLOTS = 2**31 - 1  # a slot is an int32


class PageAllocator:
    """Hands out page ids and counts who holds them; the page freed last is reused first.

    Every operation is O(1) per page.

    Examples:
        >>> import paged_mlx
        >>> allocator = paged_mlx.PageAllocator(total_pages=64, page_size=16)
        >>> page_id = allocator.allocate_page()
        >>> allocator.share_page(page_id)
        >>> allocator.free_page(page_id), allocator.free_page(page_id)
        (False, True)
        >>> allocator
        PageAllocator(64 pages of 16, 0 used)

    Args:
        total_pages: Pages in the pool; ids are ``[0, total_pages)``.
        page_size: Tokens in a page.
        max_pages: Where growth on demand ends; default ``total_pages``, so no growth.
        slab_pages: Pages added by each growth on demand; default ``total_pages``.

    Attributes:
        total_pages: Pages in the pool, free or not.
        page_size: Tokens in a page.
        max_pages: Pages that the pool may grow to on demand.
        counts: How often each page is held, ``int32 [total_pages]``, read-only.
        sealed: Pages in use that take no more tokens, because a pool has quantised them.
        appends: Whether an attached pool follows appends.
        evictors: Who gives pages back when none is free, see ``observers.Evictors``.

    Raises:
        ValueError: A size is no whole number, or there would be more slots than an int32 counts.
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
        total = whole_number(name, "total_pages", total_pages, 1)
        self.page_size = whole_number(name, "page_size", page_size, 1)
        self.max_pages = (
            total if max_pages is None else whole_number(name, "max_pages", max_pages, total)
        )
        self._slab_pages = (
            total if slab_pages is None else whole_number(name, "slab_pages", slab_pages, 1)
        )
        self._check_slots(name, "total_pages * page_size", self.max_pages)
        self.evictors = Evictors()
        self._pools: WeakValueDictionary[int, Pool] = WeakValueDictionary()
        self._wants_freed = self.appends = False
        self.sealed: set[int] = set()
        self._set_counts(array("i", bytes(4 * total)))
        self._reset_free(range(total))

    def _check_slots(self, function: str, name: str, num_pages: int) -> None:
        if num_pages * self.page_size > MAX_SLOTS:
            must = f"{name} must be at most {MAX_SLOTS}, because a slot is an int32"
            fail(function, must, num_pages * self.page_size)

    def _set_counts(self, refs: array[int]) -> None:
        """One buffer, several views: ``_refs`` is fast for one page, ``_counts`` for many."""
        self.total_pages = len(refs)
        self._refs = refs
        self._counts = np.frombuffer(refs, dtype=np.int32)
        self.counts = memoryview(refs).toreadonly()

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.total_pages} pages of {self.page_size}, "
            f"{self.num_used} used)"
        )

    # The free list: the only part that a policy changes.

    def _reset_free(self, page_ids: Iterable[int]) -> None:
        """Make exactly ``page_ids``, ascending, the free pages."""
        self._free = list(page_ids)[::-1]

    def _take_one(self) -> int | None:
        """Remove a page from the free list; None when that is empty."""
        return self._free.pop() if self._free else None

    def _take(self, num_pages: int) -> list[int] | None:
        """Remove ``num_pages`` pages from the free list; None when it has less."""
        if num_pages > len(self._free):
            return None
        taken = self._free[: -num_pages - 1 : -1]
        del self._free[len(self._free) - num_pages :]
        return taken

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
    def num_used(self) -> int:
        """Pages that somebody holds."""
        return self.total_pages - self.num_free

    @property
    def num_evictable(self) -> int:
        """Pages that evictors hold and nobody else."""
        return sum(evictor.num_evictable for evictor in self.evictors)

    @property
    def num_available(self) -> int:
        """Pages that an allocation could get: free, evictable, or not grown yet."""
        return self.num_free + self.num_evictable + self.max_pages - self.total_pages

    def ref_count(self, page_id: int) -> int:
        """How many tables and caches hold the page; 0 for a free page.

        Raises:
            UnknownPage: The id is not of this pool.
        """
        return self._refs[self._known("ref_count", page_id)]

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
        if page_id is None and self._make_room(1):
            page_id = self._take_one()
        if page_id is not None:
            self._refs[page_id] = 1
        return page_id

    def allocate_pages(self, num_pages: int) -> list[int] | None:
        """Take ``num_pages`` free pages, each held once; None, and nothing taken, when too few.

        Raises:
            OutOfPages: The pool may grow, and there is no memory to; nothing is taken.
        """
        if type(num_pages) is not int or num_pages < 0:
            num_pages = whole_number("allocate_pages", "num_pages", num_pages)
        page_ids = self._take(num_pages)
        if page_ids is None and self._make_room(num_pages):
            page_ids = self._take(num_pages)
        for page_id in page_ids or ():
            self._refs[page_id] = 1
        return page_ids

    def share_page(self, page_id: int) -> None:
        """Add a holder to a page that has one.

        Raises:
            UseAfterFree: Nobody holds the page.
            UnknownPage: The id is not of this pool.
        """
        page_id = self._held("share_page", page_id, UseAfterFree)
        self._refs[page_id] += 1
        if self._refs[page_id] == 2 and page_id in self.evictors.held:
            self.evictors.busy((page_id,))

    def free_page(self, page_id: int) -> bool:
        """Remove a holder; the page becomes free with its last one.

        Stale bytes stay in the arrays: nothing outside a context is ever read.

        Returns:
            Whether the page is free now.

        Raises:
            DoubleFree: Nobody holds the page.
            UnknownPage: The id is not of this pool.
        """
        page_id = self._held("free_page", page_id, DoubleFree)
        self._refs[page_id] -= 1
        left = self._refs[page_id]
        if not left:
            self._put((page_id,))
            self.sealed.discard(page_id)
            if self._wants_freed:
                self._tell_freed((page_id,))
        elif left == 1 and page_id in self.evictors.held:
            self.evictors.idle((page_id,))
        return not left

    def share_pages(self, page_ids: array[int] | Sequence[int]) -> None:
        """``share_page`` for many different pages at once, all or nothing."""
        ids, before = self._all_held("share_pages", page_ids, UseAfterFree)
        self._counts[ids] = before + 1
        if self.evictors.held:
            self.evictors.busy(ids[before == 1].tolist())

    def free_pages(self, page_ids: array[int] | Sequence[int]) -> None:
        """``free_page`` for many different pages at once, all or nothing."""
        ids, before = self._all_held("free_pages", page_ids, DoubleFree)
        self._counts[ids] = before - 1
        freed = ids[before == 1].tolist()
        self._put(freed)
        if self.sealed:
            self.sealed.difference_update(freed)
        if freed and self._wants_freed:
            self._tell_freed(freed)
        if self.evictors.held:
            self.evictors.idle(ids[before == 2].tolist())

    def hold(self, page_id: int, evictor: Evictor) -> None:
        """Add an evictor to a page's holders, to be told when it is, or is not, the only one.

        Raises:
            UseAfterFree: Nobody holds the page.
            PageError: An evictor holds it already.
            ValueError: The evictor was not added.
        """
        self._hold("hold", page_id, evictor)

    def _hold(self, function: str, page_id: int, evictor: Evictor) -> int:
        page_id = self._held(function, page_id, UseAfterFree)
        self.evictors.start(function, page_id, evictor)
        self._refs[page_id] += 1
        return page_id

    def let_go(self, page_id: int) -> bool:
        """Undo ``hold``; return whether the page is free now."""
        page_id = self._known("let_go", page_id)
        self.evictors.stop(page_id)
        return self.free_page(page_id)

    def _make_room(self, num_pages: int) -> bool:
        """Grow, then evict, until ``num_pages`` are free; change nothing if that cannot be.

        Raises:
            OutOfPages: A pool cannot grow, and there are too few pages to evict.
        """
        if num_pages > self.num_available:
            return False
        before = self.total_pages
        while num_pages > self.num_free and self.total_pages < self.max_pages:
            try:
                self.grow(min(self._slab_pages, self.max_pages - self.total_pages))
            except OutOfPages:
                if num_pages > self.num_free + self.num_evictable:
                    raise
                break
        try:
            for evictor in self.evictors:
                if num_pages > self.num_free:
                    evictor.evict(num_pages - self.num_free)
        except BaseException:
            self.shrink(self.total_pages - before)
            raise
        return num_pages <= self.num_free

    # Which ids may be used.

    def _known(self, function: str, page_id: int) -> int:
        """Return a page id of this pool, as an int."""
        if type(page_id) is not int:
            try:
                page_id = whole_number(function, "page_id", page_id)
            except ValueError:
                self._fail_unknown(function, page_id)
        if not 0 <= page_id < self.total_pages:
            self._fail_unknown(function, page_id)
        return page_id

    def _held(self, function: str, page_id: int, error: type[PageError]) -> int:
        """Return the id of a page that somebody holds, as an int."""
        if type(page_id) is not int or not 0 <= page_id < self.total_pages:
            page_id = self._known(function, page_id)
        if not self._refs[page_id]:
            self._fail_free(function, page_id, error)
        return page_id

    def _all_held(
        self, function: str, page_ids: array[int] | Sequence[int], error: type[PageError]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of held pages, each given once, and how often each is held.

        A table's pages, an array, differ already.
        """
        if isinstance(page_ids, array):
            ids = np.frombuffer(page_ids, np.int32) if page_ids else np.empty(0, np.int32)
        else:
            listed = as_list(function, "page_ids", page_ids, "page ids")
            ids = np.array([self._known(function, page_id) for page_id in listed], np.int32)
            if len(set(ids.tolist())) < len(ids):
                fail(function, "page_ids must be different pages", "one twice", PageError)
        if ids.size and int(ids.view(np.uint32).max()) >= self.total_pages:
            self._fail_unknown(function, int(ids[np.argmax(ids.view(np.uint32))]))
        counts = self._counts[ids]
        if not counts.all():
            self._fail_free(function, int(ids[np.argmin(counts)]), error)
        return ids, counts

    def _fail_unknown(self, function: str, page_id: object) -> NoReturn:
        must = f"page_id must be in [0, {self.total_pages}), the pages of this pool"
        fail(function, must, repr(page_id), UnknownPage)

    def _fail_free(self, function: str, page_id: int, error: type[PageError]) -> NoReturn:
        must = "page_id must be held by somebody, because free pages are reused"
        fail(function, must, f"{page_id}, which is free", error)

    # Pools.

    def attach(self, pool: Pool) -> None:
        """Tell a pool which pages to copy, which are freed if it asks, and how many there are.

        The pool is referenced weakly. Attaching twice is the same as once.

        Raises:
            ValueError: The pool has fewer pages than ids exist, or pages of another size.
        """
        if not isinstance(pool, Pool):
            fail("attach", "pool must have all that observers.Pool has", kind_of(pool))
        if pool.page_size != self.page_size:
            must = f"pool.page_size must be {self.page_size}, as the allocator's"
            fail("attach", must, pool.page_size)
        if pool.num_pages < self.total_pages:
            must = f"pool.num_pages must be at least {self.total_pages}, as the allocator's"
            fail("attach", must, pool.num_pages)
        pool.attached(self)
        self._pools[id(pool)] = pool
        self._note_wishes()

    def detach(self, pool: Pool) -> None:
        """Undo ``attach``; a pool that is not attached is left alone."""
        if self._pools.pop(id(pool), None) is not None:
            self._note_wishes()
            pool.detached()

    def _note_wishes(self) -> None:
        self._wants_freed = any(pool.wants_freed for pool in self.pools)
        self.appends = any(pool.wants_appends for pool in self.pools)

    def before_append(self, page_ids: Sequence[int]) -> None:
        """Tell the pools that tokens are about to be appended, to these part-filled pages too."""
        for pool in self._appending():
            pool.before_append(page_ids)

    def reserve(self, num_pages: int) -> None:
        """Have the pools make room for so many more part-filled pages, or none of them."""
        for pool in self._appending():
            pool.reserve(num_pages)

    def appended(self, slots: np.ndarray) -> None:
        """Tell the pools which slots are to be written next."""
        for pool in self._appending():
            pool.appended(slots)

    def _appending(self) -> list[Pool]:
        return [pool for pool in self.pools if pool.wants_appends]

    @property
    def pools(self) -> list[Pool]:
        """The attached pools that are still alive."""
        return list(self._pools.values())

    def copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Have every attached pool copy whole pages, in one operation for all layers.

        Args:
            pairs: ``(source, target)`` page ids; each page is held by somebody.

        Raises:
            ValueError: A page is free or unknown, a target twice, or source and target.
        """
        copied = []
        try:
            for source, target in pairs:
                copied.append((source, target))
        except (TypeError, ValueError):
            fail("copy_pages", "pairs must be (source, target) page ids", kind_of(pairs))
        for pair in copied:
            for page_id in pair:
                known = type(page_id) is int and 0 <= page_id < self.total_pages
                if not known or not self._refs[page_id]:
                    self._held("copy_pages", page_id, UseAfterFree)
        if not copied:
            return
        sources, targets = map(set, zip(*copied))
        if len(targets) < len(copied) or not targets.isdisjoint(sources):
            must = "pairs must name each target once, and no source as a target"
            fail("copy_pages", must, copied, PageError)
        for pool in self._pools.values():
            pool.copied(copied)

    def _tell_freed(self, page_ids: Sequence[int]) -> None:
        for pool in self.pools:
            if pool.wants_freed:
                pool.freed(page_ids)

    # Size.

    def grow(self, num_pages: int) -> None:
        """Add ``num_pages`` free pages with new ids; attached pools grow first.

        An error of a pool that cannot grow passes through; the allocator is as before.
        """
        before = self.total_pages
        total = before + whole_number("grow", "num_pages", num_pages, 1)
        self._check_slots("grow", "num_pages, and those there are, times page_size", total)
        for pool in self.pools:
            if pool.num_pages < total:
                pool.grow(total)
        self._set_counts(self._refs + array("i", bytes(4 * (total - before))))
        self.max_pages = max(total, self.max_pages)
        self._put(range(before, total)[::-1])

    def shrink(self, num_pages: int | None = None) -> int:
        """Remove up to ``num_pages`` free pages (default: all) from the top of the id range.

        Returns:
            Pages removed. A page in use, and every id below it, stays; so does page 0.
        """
        before = self.total_pages
        wanted = before if num_pages is None else whole_number("shrink", "num_pages", num_pages)
        used = np.flatnonzero(self._counts)
        lowest = max(int(used[-1]) + 1 if used.size else 1, before - wanted)
        if lowest >= before:
            return 0
        self._set_counts(self._refs[:lowest])
        self._reset_free(np.flatnonzero(self._counts == 0).tolist())
        for pool in self.pools:
            pool.shrink(lowest)
        return before - lowest

    # Checks.

    def check(self, tables: Iterable[Any] | None = None, caches: Iterable[Any] = ()) -> None:
        """Prove that reference counts, free list and evictors agree.

        Args:
            tables: Every page table on this allocator; then each count must equal its holders.
            caches: Every prefix cache on it, counted with the tables.

        Raises:
            AssertionError: It names the difference.
        """
        counts, free = self._counts, sorted(self._free_ids())
        assert len(free) == self.num_free, (
            f"num_free is {self.num_free}, the free list has {len(free)} pages"
        )
        assert (counts >= 0).all(), "a reference count is negative"
        assert free == np.flatnonzero(counts == 0).tolist(), (
            "the free list is not the pages of count 0, each once"
        )
        for page_id in self.evictors.held:
            assert counts[page_id] > 0, f"page {page_id} is held by an evictor and free"
        for page_id in self.sealed:
            assert counts[page_id] > 0, f"page {page_id} is sealed and free"
        for evictor in self.evictors:
            if evictor is not self:
                evictor.check()
        caches = holders("check", "caches", caches, "PrefixCaches")
        if tables is not None:
            self._check_holders(holders("check", "tables", tables, "PageTables") + caches)

    def _check_holders(self, holders: Sequence[Any]) -> None:
        """Prove that every count is the number of holders; each has ``page_ids``."""
        held = self._own_references()
        for holder in holders:
            ids = np.asarray(holder.page_ids, dtype=np.int64)
            assert not ids.size or (0 <= ids.min() and ids.max() < len(held)), (
                f"{holder!r} holds an unknown page"
            )
            assert len(np.unique(ids)) == len(ids), f"{holder!r} holds a page twice"
            held[ids] += 1
        for page_id in np.flatnonzero(held != self._counts).tolist():
            raise AssertionError(
                f"page {page_id} has ref_count {self._counts[page_id]} and {held[page_id]} holders"
            )

    def _own_references(self) -> np.ndarray:
        """References that the allocator itself holds, per page."""
        return np.zeros(self.total_pages, dtype=np.int64)
