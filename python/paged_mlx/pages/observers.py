"""Observers of an allocator: pools, which hold the bytes, and evictors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from paged_mlx.errors import PageError, fail, kind_of


@runtime_checkable
class Pool(Protocol):
    """Something that has bytes, or notes, for every page of an allocator.

    A class that inherits from it defines ``num_pages``, ``page_size`` and ``copied``; the rest
    does nothing by default.

    Attributes:
        page_size: Tokens in a page.
    """

    page_size: int

    @property
    def num_pages(self) -> int:
        """Pages that it has bytes for, at least as many as there are ids."""

    @property
    def wants_freed(self) -> bool:
        """Whether it is to be told which pages become free."""
        return False

    @property
    def wants_appends(self) -> bool:
        """Whether the allocator is to say which slots are to be written next."""
        return False

    def before_append(self, page_ids: Sequence[int]) -> None:
        """Tokens are about to be appended, to these part-filled pages among others."""

    def reserve(self, num_pages: int) -> None:
        """Have room for so many more part-filled pages; an error refuses the append."""

    def appended(self, slots: np.ndarray) -> None:
        """These slots are to be written next."""

    def copied(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole pages, ``(source, target)`` each, before any later write.

        The ids are of pages that are held; no page is a target twice, or source and target.
        """

    def freed(self, page_ids: Sequence[int]) -> None:
        """These pages have no holder any more."""

    def grow(self, num_pages: int) -> None:
        """Make it ``num_pages`` long."""
        fail("grow", f"the attached pools must be able to grow to {num_pages} pages", repr(self))

    def shrink(self, num_pages: int) -> None:
        """No id of ``num_pages`` or above is left."""

    def attached(self, allocator: Any) -> None:
        """It belongs to this allocator now; an error refuses that."""

    def detached(self) -> None:
        """It belongs to no allocator now."""


@runtime_checkable
class Evictor(Protocol):
    """Something that holds pages only because they might be useful again."""

    @property
    def num_evictable(self) -> int:
        """Pages that ``evict`` could free now."""

    def evict(self, num_pages: int) -> int:
        """Free up to ``num_pages`` pages that no table holds; return how many."""

    def forget(self, page_ids: Sequence[int]) -> int:
        """Let go of these pages, whoever else holds them; return how many."""

    def pages_idle(self, page_ids: Sequence[int]) -> None:
        """The evictor is now the only holder of these pages."""

    def pages_busy(self, page_ids: Sequence[int]) -> None:
        """Somebody else now holds these pages too."""

    def check(self) -> None:
        """Raise an AssertionError if the pages it holds are not in order."""


class Evictors:
    """An allocator's evictors, in the order they are asked, and which pages each one holds.

    Attributes:
        held: The evictor of each page that one holds.
    """

    def __init__(self) -> None:
        self._evictors: list[Evictor] = []
        self.held: dict[int, Evictor] = {}

    def __iter__(self) -> Iterator[Evictor]:
        return iter(self._evictors)

    def __repr__(self) -> str:
        return f"Evictors({len(self._evictors)} evictors, {len(self.held)} pages)"

    def add(self, evictor: Evictor) -> None:
        """Ask ``evictor`` for pages, after those added before it, when none is free."""
        if not isinstance(evictor, Evictor):
            fail("add", "evictor must have all that observers.Evictor has", kind_of(evictor))
        self._evictors.append(evictor)

    def remove(self, evictor: Evictor) -> None:
        """Ask ``evictor`` no more.

        Raises:
            ValueError: It was never added, or still holds pages.
        """
        others = [other for other in self._evictors if other is not evictor]
        holds = any(holder is evictor for holder in self.held.values())
        if holds or len(others) == len(self._evictors):
            fail("remove", "evictor must be one that was added and holds no page", kind_of(evictor))
        self._evictors = others

    def forget(self, page_ids: Iterable[int]) -> None:
        """Have the evictors that hold these pages let go of them; other holders keep them."""
        for evictor, held in self._by_evictor(page_ids):
            evictor.forget(held)

    def start(self, function: str, page_id: int, evictor: Evictor) -> None:
        """Note that ``evictor`` holds a page; at most one does."""
        if not any(added is evictor for added in self._evictors):
            fail(function, "evictor must be one that was added", kind_of(evictor))
        if page_id in self.held:
            fail(function, "page_id must be held by one evictor alone", page_id, PageError)
        self.held[page_id] = evictor

    def stop(self, page_id: int) -> None:
        """Note that the page's evictor holds it no more."""
        if page_id not in self.held:
            fail("let_go", "page_id must be held by an evictor", repr(page_id), PageError)
        del self.held[page_id]

    def idle(self, page_ids: Iterable[int]) -> None:
        """Tell the evictors of these pages that nobody else holds them any more."""
        for evictor, held in self._by_evictor(page_ids):
            evictor.pages_idle(held)

    def busy(self, page_ids: Iterable[int]) -> None:
        """Tell the evictors of these pages that somebody else holds them now."""
        for evictor, held in self._by_evictor(page_ids):
            evictor.pages_busy(held)

    def _by_evictor(self, page_ids: Iterable[int]) -> list[tuple[Evictor, list[int]]]:
        told: dict[int, tuple[Evictor, list[int]]] = {}
        for page_id in page_ids:
            evictor = self.held.get(page_id)
            if evictor is not None:
                told.setdefault(id(evictor), (evictor, []))[1].append(page_id)
        return list(told.values())
