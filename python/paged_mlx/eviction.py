"""Who gives pages back when none is free, and in which order."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from .cached_page import CachedPage


class Evictor(Protocol):
    """Somebody who holds pages only because they might be useful again."""

    @property
    def num_evictable(self) -> int:
        """Pages that ``evict`` could free now."""

    def evict(self, num_pages: int) -> int:
        """Free up to ``num_pages`` pages that no table holds; return how many."""

    def pages_idle(self, page_ids: Sequence[int]) -> None:
        """The evictor is now the only holder of these watched pages."""

    def pages_busy(self, page_ids: Sequence[int]) -> None:
        """Somebody else now holds these watched pages too."""


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
    """The cached pages without children that no table holds, in the order of a policy.

    A page that was pushed and is in use again, or has a child again, is passed over when
    its turn comes. Push and pop are O(log), amortised.
    """

    def __init__(self, policy: EvictionPolicy) -> None:
        self.policy = policy
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
            if _is_ready(page, stamp):
                return page
        return None

    def compact(self, num_pages: int) -> None:
        """Forget outdated places once they outnumber ``num_pages``, the pages in the cache."""
        if len(self._heap) > 2 * num_pages + 64:
            self._heap = [place for place in self._heap if _is_ready(place[2], place[1])]
            heapq.heapify(self._heap)

    def ready(self) -> set[int]:
        """The ids of the pages that ``pop`` would return, one after the other."""
        return {page.page_id for _, stamp, page in self._heap if _is_ready(page, stamp)}


def _is_ready(page: CachedPage, stamp: int) -> bool:
    return page.stamp == stamp and page.idle and not page.children and page.parent is not None
