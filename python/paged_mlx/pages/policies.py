"""The allocators: they differ in which free page they hand out next."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

import numpy as np

from paged_mlx.errors import PageError, as_list, fail, whole_number
from paged_mlx.pages.allocator import PageAllocator

__all__ = ["BuddyPageAllocator", "FIFOPageAllocator", "LRUPageAllocator", "PageAllocator"]


class FIFOPageAllocator(PageAllocator):
    """Reuses pages in the order they were freed.

    Examples:
        >>> allocator = FIFOPageAllocator(total_pages=3, page_size=4)
        >>> first, second = allocator.allocate_pages(2)
        >>> allocator.free_page(first)
        True
        >>> allocator.allocate_pages(2)  # page 2 has waited longest
        [2, 0]
    """

    def _reset_free(self, page_ids: Iterable[int]) -> None:
        self._queue = deque(page_ids)

    def _take_one(self) -> int | None:
        return self._queue.popleft() if self._queue else None

    def _take(self, num_pages: int) -> list[int] | None:
        if num_pages > len(self._queue):
            return None
        return [self._queue.popleft() for _ in range(num_pages)]

    def _put(self, page_ids: Sequence[int]) -> None:
        self._queue.extend(page_ids)

    def _free_ids(self) -> Iterator[int]:
        return iter(self._queue)

    @property
    def num_free(self) -> int:
        return len(self._queue)


class LRUPageAllocator(PageAllocator):
    """Keeps pages marked as cached until they are needed, and evicts the least recently used.

    A cached page is held by the allocator itself, a reference like any other. Once it is
    the only one the page may be evicted, in the order in which tables let go of them. A
    page that a table holds is never taken.

    Args:
        on_evict: Called with the id of each page that is to be evicted, before any of them is
            freed, wiped or reused. If it raises, nothing is evicted and the call that asked
            for pages changes nothing.

    Raises:
        ValueError: A size is wrong, or ``on_evict`` cannot be called.

    Examples:
        >>> allocator = LRUPageAllocator(total_pages=2, page_size=4)
        >>> page, other = allocator.allocate_pages(2)
        >>> allocator.cache_page(page)
        >>> allocator.free_page(page)  # the allocator itself still holds it
        False
        >>> allocator.allocate_page() == page  # taken, because no page is free
        True
    """

    def __init__(
        self,
        total_pages: int,
        page_size: int,
        *,
        on_evict: Callable[[int], None] | None = None,
        max_pages: int | None = None,
        slab_pages: int | None = None,
    ) -> None:
        if on_evict is not None and not callable(on_evict):
            fail("LRUPageAllocator", "on_evict must be a function of a page id", repr(on_evict))
        super().__init__(total_pages, page_size, max_pages=max_pages, slab_pages=slab_pages)
        self._cached: set[int] = set()
        self._idle: OrderedDict[int, None] = OrderedDict()  # oldest first
        self._on_evict = on_evict
        self.evictors.add(self)

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, {len(self._cached)} cached)"

    def cache_page(self, page_id: int) -> None:
        """Keep a page after its last table let go of it, until its place is needed.

        Raises:
            UseAfterFree: Nobody holds the page now.
            PageError: It is cached already, here or by a prefix cache.
        """
        self._cached.add(self._hold("cache_page", page_id, self))

    def uncache_page(self, page_id: int) -> None:
        """Undo ``cache_page``; the page becomes free if no table holds it."""
        (page_id,) = self._cached_ones("uncache_page", (page_id,))
        self._cached.discard(page_id)
        self._idle.pop(page_id, None)
        self.let_go(page_id)

    def _cached_ones(self, function: str, page_ids: Iterable[int]) -> list[int]:
        """The ids as ints; refuse a page that is not cached."""
        listed = as_list(function, "page_ids", page_ids, "page ids")
        ids = [self._known(function, page_id) for page_id in listed]
        for page_id in ids:
            if page_id not in self._cached:
                fail(function, "page_id must be cached", page_id, PageError)
        if len(set(ids)) < len(ids):
            fail(function, "page_ids must be different pages", "one twice", PageError)
        return ids

    @property
    def cached_pages(self) -> list[int]:
        """Pages that the allocator holds, ascending."""
        return sorted(self._cached)

    @property
    def num_evictable(self) -> int:
        return len(self._idle) + sum(e.num_evictable for e in self.evictors if e is not self)

    def evict(self, num_pages: int) -> int:
        """Free up to ``num_pages`` cached pages that no table holds, oldest first."""
        num_pages = whole_number("evict", "num_pages", num_pages)
        return self.forget(list(islice(self._idle, num_pages)))

    def forget(self, page_ids: Sequence[int]) -> int:
        """Stop caching these pages; those that no table holds become free."""
        page_ids = self._cached_ones("forget", page_ids)
        if self._on_evict is not None:
            for page_id in page_ids:
                self._on_evict(page_id)
        for page_id in page_ids:
            self.uncache_page(page_id)
        return len(page_ids)

    def pages_idle(self, page_ids: Sequence[int]) -> None:
        """Evict these pages when room is wanted, after those that are idle already."""
        for page_id in page_ids:
            self._idle[page_id] = None

    def pages_busy(self, page_ids: Sequence[int]) -> None:
        """Keep these pages, which a table holds again."""
        for page_id in page_ids:
            self._idle.pop(page_id, None)

    def _own_references(self) -> np.ndarray:
        held = super()._own_references()
        held[list(self._cached)] = 1
        return held

    def check(self, tables: Iterable[object] | None = None, caches: Iterable[object] = ()) -> None:
        super().check(tables, caches)
        idle = {page_id for page_id in self._cached if self._refs[page_id] == 1}
        assert set(self._idle) == idle, (
            "the evictable pages are not the cached ones that nobody else holds"
        )


class BuddyPageAllocator(PageAllocator):
    """Keeps free pages in runs of a power of two, aligned to their size, and merges them.

    ``allocate_run`` gives contiguous ids; pages of a run are shared and freed one by one.
    Pages freed since the last run was asked for are *loose*: they are handed out first,
    and merged when a run is asked for. Every operation is O(log total_pages), amortised.

    Examples:
        >>> allocator = BuddyPageAllocator(total_pages=16, page_size=4)
        >>> allocator.allocate_run(3)
        [0, 1, 2]
        >>> allocator.allocate_run(4)  # a run of four begins at a multiple of four
        [4, 5, 6, 7]
    """

    def _reset_free(self, page_ids: Iterable[int]) -> None:
        self._runs: list[dict[int, None]] = []
        self._loose = list(page_ids)[::-1]
        self._num_free = len(self._loose)
        self._merge()

    def _put(self, page_ids: Sequence[int]) -> None:
        self._loose.extend(page_ids)
        self._num_free += len(page_ids)

    def _merge(self) -> None:
        """Make runs of the loose pages."""
        while len(self._runs) < self.max_pages.bit_length():
            self._runs.append({})
        for page_id in self._loose:
            self._add_run(page_id, 0)
        self._loose.clear()

    def _add_run(self, start: int, order: int) -> None:
        """Add a free run, merged with its buddy as far as that goes."""
        while start ^ (1 << order) in self._runs[order]:
            del self._runs[order][start ^ (1 << order)]
            start &= ~(1 << order)
            order += 1
        self._runs[order][start] = None

    def _take_run(self, order: int) -> int | None:
        """Remove a run of ``2**order`` pages, split from the shortest that is long enough."""
        for longer in range(order, len(self._runs)):
            if self._runs[longer]:
                start = self._runs[longer].popitem()[0]
                for half in range(longer - 1, order - 1, -1):
                    self._runs[half][start + (1 << half)] = None
                self._num_free -= 1 << order
                return start
        return None

    def _take_one(self) -> int | None:
        if self._loose:
            self._num_free -= 1
            return self._loose.pop()
        return self._take_run(0)

    def _take(self, num_pages: int) -> list[int] | None:
        if num_pages > self._num_free:
            return None
        self._merge()
        taken: list[int] = []
        while len(taken) < num_pages:
            order = min(
                (num_pages - len(taken)).bit_length() - 1, self.longest_run.bit_length() - 1
            )
            start = self._take_run(order)
            assert start is not None, "the longest run is not there"
            taken.extend(range(start, start + (1 << order)))
        return taken

    def allocate_run(self, num_pages: int) -> list[int] | None:
        """Take ``num_pages`` pages with contiguous ids, each held once.

        The run starts at a multiple of the next power of two. None, and nothing taken,
        when no free run is long enough; pages are evicted and the pool grown for it only
        if there are too few free pages.
        """
        num_pages = whole_number("allocate_run", "num_pages", num_pages, 1)
        if num_pages > self.num_free and not self._make_room(num_pages):
            return None
        self._merge()
        order = (num_pages - 1).bit_length()
        start = self._take_run(order) if order < len(self._runs) else None
        if start is None:
            return None
        self._put(range(start + num_pages, start + (1 << order))[::-1])
        page_ids = list(range(start, start + num_pages))
        for page_id in page_ids:
            self._refs[page_id] = 1
        return page_ids

    def _free_ids(self) -> Iterator[int]:
        yield from self._loose
        for order, runs in enumerate(self._runs):
            for start in runs:
                yield from range(start, start + (1 << order))

    @property
    def num_free(self) -> int:
        return self._num_free

    @property
    def longest_run(self) -> int:
        """The longest free run, in pages."""
        self._merge()
        return max((1 << order for order, runs in enumerate(self._runs) if runs), default=0)

    def fragmentation(self) -> float:
        if not self._num_free:
            return 0.0
        return 1.0 - self.longest_run / (1 << (self._num_free.bit_length() - 1))

    def check(self, tables: Iterable[object] | None = None, caches: Iterable[object] = ()) -> None:
        super().check(tables, caches)
        for order, runs in enumerate(self._runs):
            for start in runs:
                assert start % (1 << order) == 0, (
                    f"run {start} of {1 << order} pages is not aligned"
                )
                assert start ^ (1 << order) not in runs, (
                    f"run {start} and its buddy of {1 << order} pages are not merged"
                )
