"""Who gives pages back when none is free, and in which order."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, KeysView, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from paged_mlx.errors import PageError, fail

if TYPE_CHECKING:
    from paged_mlx.prefix.cached_page import CachedPage


class Evictor(Protocol):
    """Somebody who holds pages only because they might be useful again."""

    @property
    def num_evictable(self) -> int:
        """Pages that ``evict`` could free now."""

    def evict(self, num_pages: int) -> int:
        """Free up to ``num_pages`` pages that no table holds; return how many."""

    def forget(self, page_ids: Sequence[int]) -> int:
        """Let go of these watched pages, whoever else holds them; return how many."""

    def pages_idle(self, page_ids: Sequence[int]) -> None:
        """The evictor is now the only holder of these watched pages."""

    def pages_busy(self, page_ids: Sequence[int]) -> None:
        """Somebody else now holds these watched pages too."""


class Evictors:
    """An allocator's evictors, in the order they are asked, and the pages that each watches."""

    def __init__(self) -> None:
        self._evictors: list[Evictor] = []
        self._watchers: dict[int, Evictor] = {}

    def __iter__(self) -> Iterator[Evictor]:
        return iter(self._evictors)

    def add(self, evictor: Evictor) -> None:
        self._evictors.append(evictor)

    def remove(self, evictor: Evictor) -> None:
        if evictor not in self._evictors or evictor in self._watchers.values():
            must = "evictor must be one that was added and watches no page"
            fail("remove_evictor", must, repr(evictor))
        self._evictors.remove(evictor)

    def watch(self, page_id: int, evictor: Evictor) -> None:
        if page_id in self._watchers:
            fail("watch", "page_id must be watched by one evictor alone", page_id, PageError)
        self._watchers[page_id] = evictor

    def unwatch(self, page_id: int) -> None:
        if page_id not in self._watchers:
            fail("unwatch", "page_id must be watched", page_id, PageError)
        del self._watchers[page_id]

    @property
    def watched(self) -> KeysView[int]:
        """The pages that somebody watches."""
        return self._watchers.keys()

    def idle(self, page_ids: Iterable[int]) -> None:
        """Tell who watches these pages that nobody else holds them any more."""
        for evictor, watched in self._by_watcher(page_ids):
            evictor.pages_idle(watched)

    def busy(self, page_ids: Iterable[int]) -> None:
        """Tell who watches these pages that somebody else holds them now."""
        for evictor, watched in self._by_watcher(page_ids):
            evictor.pages_busy(watched)

    def forget(self, page_ids: Iterable[int]) -> None:
        """Have who watches these pages let go of them."""
        for evictor, watched in self._by_watcher(page_ids):
            evictor.forget(watched)

    def _by_watcher(self, page_ids: Iterable[int]) -> list[tuple[Evictor, list[int]]]:
        told: dict[int, tuple[Evictor, list[int]]] = {}
        for page_id in page_ids:
            evictor = self._watchers.get(page_id)
            if evictor is not None:
                told.setdefault(id(evictor), (evictor, []))[1].append(page_id)
        return list(told.values())


class EvictionPolicy(Protocol):
    """Orders cached pages that could be evicted: the smallest goes first."""

    def __call__(self, page: CachedPage) -> Any: ...


def least_recently_used(page: CachedPage) -> Any:
    """The page goes first whose last user left longest ago."""
    return page.last_used


def first_in_first_out(page: CachedPage) -> Any:
    """The page goes first that was stored first."""
    return page.created


def least_frequently_used(page: CachedPage) -> Any:
    """The page goes first that was reused least often; then the least recently used."""
    return page.hits, page.last_used


def lowest_priority(page: CachedPage) -> Any:
    """The page of lowest priority goes first; then the least recently used."""
    return page.priority, page.last_used


class EvictionQueue:
    """The cached pages that could be evicted, in the order of a policy.

    A page that was pushed and is no longer ready is passed over when its turn comes. Push
    and pop are O(log), amortised.

    Args:
        policy: Which page goes first.
        is_ready: Whether a page could be evicted now.
    """

    def __init__(self, policy: EvictionPolicy, is_ready: Callable[[CachedPage], bool]) -> None:
        self.policy = policy
        self.is_ready = is_ready
        self._heap: list[tuple[Any, int, CachedPage]] = []
        self._stamps = 0

    def push(self, page: CachedPage) -> None:
        """Add a page, or move it to the place that it has now."""
        self._stamps += 1
        page.stamp = self._stamps
        heapq.heappush(self._heap, (self.policy(page), page.stamp, page))

    def pop(self) -> CachedPage | None:
        """Remove and return the page to evict next; None when there is none."""
        while self._heap:
            _, stamp, page = heapq.heappop(self._heap)
            if self._counts(page, stamp):
                return page
        return None

    def compact(self, num_pages: int) -> None:
        """Forget outdated places once they outnumber ``num_pages``, the pages in the cache."""
        if len(self._heap) > 2 * num_pages + 64:
            self._heap = [place for place in self._heap if self._counts(place[2], place[1])]
            heapq.heapify(self._heap)

    def ready(self) -> set[int]:
        """The ids of the pages that ``pop`` would return, one after the other."""
        return {page.page_id for _, stamp, page in self._heap if self._counts(page, stamp)}

    def _counts(self, page: CachedPage, stamp: int) -> bool:
        """Whether a place in the queue is the page's newest, and the page is ready."""
        return page.stamp == stamp and self.is_ready(page)
