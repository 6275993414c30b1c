"""How often each page is held, and whether an id is one that can be held."""

from __future__ import annotations

import operator
from array import array
from collections.abc import Sequence
from typing import NoReturn

import numpy as np

from paged_mlx.errors import PageError, UnknownPage, fail


class PageCounts:
    """The reference counts of the pages ``[0, total_pages)``, all 0 at first."""

    def __init__(self, total_pages: int) -> None:
        self._total = total_pages
        self._set_counts(array("i", bytes(4 * total_pages)))

    def _set_counts(self, refs: array[int]) -> None:
        """One buffer, two views: ``_refs`` is fast for one page, ``_counts`` for many."""
        self._refs = refs
        self._counts = np.frombuffer(refs, dtype=np.int32)

    @property
    def total_pages(self) -> int:
        """Pages in the pool, free or not."""
        return self._total

    def ref_count(self, page_id: int) -> int:
        """How many tables and caches hold the page; 0 for a free page."""
        return self._refs[self._known("ref_count", page_id)]

    def ref_counts(self, page_ids: array[int] | Sequence[int]) -> np.ndarray:
        """``ref_count`` of many different pages at once, ``int32``."""
        return self._counts[self._distinct("ref_counts", page_ids)]

    def _known(self, function: str, page_id: int) -> int:
        try:
            if 0 <= page_id < self._total:
                return operator.index(page_id)
        except TypeError:
            pass
        fail(
            function,
            f"page_id must be in [0, {self._total}), the pages of this pool",
            repr(page_id),
            UnknownPage,
        )

    def _held(self, function: str, ids: np.ndarray, error: type[PageError]) -> np.ndarray:
        """Return the counts of pages, which must all be held."""
        counts = self._counts[ids]
        if not counts.all():
            fail_free(function, int(ids[np.argmin(counts)]), error)
        return counts

    def _distinct(self, function: str, page_ids: array[int] | Sequence[int]) -> np.ndarray:
        """Return known ids, each given once. A table's pages, an array, differ already."""
        if isinstance(page_ids, array):
            ids = np.frombuffer(page_ids, np.int32) if page_ids else np.empty(0, np.int32)
        else:
            ids = np.array([self._known(function, page_id) for page_id in page_ids], np.int32)
            if len(set(page_ids)) < len(ids):
                fail(function, "page_ids must be different pages", "one twice", PageError)
        if ids.size and int(ids.view(np.uint32).max()) >= self._total:
            page_id = int(ids[np.argmax(ids.view(np.uint32))])
            fail(
                function,
                f"page_ids must be in [0, {self._total}), the pages of this pool",
                page_id,
                UnknownPage,
            )
        return ids


def fail_free(function: str, page_id: int, error: type[PageError]) -> NoReturn:
    """Refuse a page that nobody holds."""
    must = "page_id must be held by somebody, because free pages are reused"
    fail(function, must, f"{page_id}, which is free", error)
