"""The order in which cached pages are given back."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any, Protocol

from paged_mlx.prefix.tree import CachedPage


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
