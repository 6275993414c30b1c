"""Pages of finished and running sequences, found again by their tokens.

The cache holds one reference to each of its pages, like any sequence: there is no page
that is free and cached. Pages that only the cache holds are given back when the allocator
runs out: children before parents, since a beginning is of use without what continues it.
Behind a window it is the other way round, and pages go in any order.

A hash finds a page; its tokens, keys and parent are then compared, so that a collision
can cost a hit and never serve K and V of other tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from paged_mlx.errors import PageError, as_list, check_flag, fail, kind_of, whole_number
from paged_mlx.pages.allocator import MAX_SLOTS, PageAllocator
from paged_mlx.pages.observers import Evictor
from paged_mlx.pages.page_map import NO_PAGE
from paged_mlx.pages.table import PageTable, maps_of
from paged_mlx.pages.tokens import TOKEN_BYTES, Tokens, pack_tokens, unpack_tokens
from paged_mlx.prefix.events import (
    CacheCleared,
    CacheEvent,
    CacheStats,
    EventLog,
    PageRemoved,
    PagesStored,
)
from paged_mlx.prefix.eviction import EvictionPolicy, EvictionQueue, least_recently_used
from paged_mlx.prefix.hash import ExtraKey, HashPage, hash_page, pack_keys
from paged_mlx.prefix.tree import CachedPage, PrefixTree


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """The longest cached beginning of a sequence.

    Attributes:
        num_tokens: Its length; at most all tokens but one, which is left to compute.
        page_ids: Its pages, NO_PAGE for those behind the window; the last may be used in
            part, copy-on-write.
    """

    num_tokens: int
    page_ids: list[int]


class PrefixCache(Evictor):
    """Remembers which pages hold which tokens.

    Examples:
        >>> import paged_mlx
        >>> allocator = paged_mlx.PageAllocator(total_pages=64, page_size=4)
        >>> cache = paged_mlx.PrefixCache(allocator)
        >>> first, second = paged_mlx.PageTable(page_size=4), paged_mlx.PageTable(page_size=4)
        >>> appended = first.append_tokens(10, allocator)
        >>> cache.insert(range(10), first)  # two full pages, once their K and V are written
        2
        >>> cache.reuse([0, 1, 2, 3, 4, 99], second)  # five tokens need no computing
        5
        >>> second.page_ids
        [0, 1]

    Args:
        allocator: Owner of the pages; the cache becomes one of its evictors.
        window: Keys a token may see, its own included; default all. With a window, pages
            behind it need not be there for a hit, nor in a table that is inserted.
        policy: Which page to give up first; see ``paged_mlx.prefix.eviction``.
        max_pages: Pages to hold at most; default no limit but the pool.
        max_events: Events to keep for ``take_events``; default none.
        hash_page: The hash, ``(parent_hash, tokens, keys) -> bytes``.
        clock: Seconds, for the statistics.
    """

    def __init__(
        self,
        allocator: PageAllocator,
        *,
        window: int | None = None,
        policy: EvictionPolicy = least_recently_used,
        max_pages: int | None = None,
        max_events: int = 0,
        hash_page: HashPage = hash_page,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not isinstance(allocator, PageAllocator):
            fail("PrefixCache", "allocator must be a PageAllocator", kind_of(allocator))
        for name, function in (("policy", policy), ("hash_page", hash_page), ("clock", clock)):
            if not callable(function):
                fail("PrefixCache", f"{name} must be a function", kind_of(function))
        self._allocator = allocator
        self._page_size = allocator.page_size
        self._window = None if window is None else whole_number("PrefixCache", "window", window, 1)
        self._max_pages = (
            None if max_pages is None else whole_number("PrefixCache", "max_pages", max_pages, 1)
        )
        self._events = EventLog(whole_number("PrefixCache", "max_events", max_events))
        self._clock = clock
        self._queue = EvictionQueue(policy, self._is_ready)
        self.stats = CacheStats()
        self._tree = PrefixTree(self._page_size, self._window, hash_page, self.stats)
        self._num_idle = 0
        self._time = 0
        allocator.evictors.add(self)

    # Figures.

    @property
    def page_size(self) -> int:
        """Tokens in a page."""
        return self._page_size

    @property
    def page_ids(self) -> list[int]:
        """The pages that the cache holds."""
        return list(self._tree.by_page)

    @property
    def num_pages(self) -> int:
        """How many pages the cache holds."""
        return len(self._tree.by_page)

    @property
    def num_evictable(self) -> int:
        """How many of them nobody else holds."""
        return self._num_idle

    def __repr__(self) -> str:
        return f"PrefixCache(num_pages={self.num_pages}, num_evictable={self.num_evictable})"

    # Finding.

    def _packed(
        self, function: str, tokens: Tokens, keys: Iterable[ExtraKey]
    ) -> tuple[bytes, dict[int, bytes]]:
        return pack_tokens(tokens, function), pack_keys(keys, self._page_size, function)

    def match(self, tokens: Tokens, keys: Iterable[ExtraKey] = ()) -> PrefixMatch:
        """Return the pages that ``reuse`` would share; nothing changes, and no query is counted."""
        packed, packed_keys = self._packed("match", tokens, keys)
        pages, behind, num_tokens = self._tree.find(packed[:-TOKEN_BYTES], packed_keys)
        return PrefixMatch(num_tokens, [NO_PAGE] * behind + [page.page_id for page in pages])

    def reuse(self, tokens: Tokens, table: PageTable, keys: Iterable[ExtraKey] = ()) -> int:
        """Let an empty table begin with the longest cached beginning of ``tokens``.

        Args:
            tokens: The sequence that is to be computed.
            table: Empty; holds the pages found afterwards.
            keys: Everything else that K and V depend on.

        Returns:
            Tokens that need no computing: less than all of them, since the last one's
            output is wanted. The first page that differs is shared up to the difference
            and copied by the next append.

        Raises:
            ValueError: The table is not empty, or of another allocator or page size.
        """
        packed, packed_keys = self._packed("reuse", tokens, keys)
        (pages,) = maps_of("reuse", (table,))
        if table.num_tokens:
            fail("reuse", "table must be empty", f"{table.num_tokens} tokens")
        pages.check_allocator("reuse", self._allocator)
        found, behind, num_tokens = self._tree.find(packed[:-TOKEN_BYTES], packed_keys)
        self.stats.add_query(len(packed) // TOKEN_BYTES, num_tokens, self._page_size)
        if num_tokens:
            self._touch(found)
            for page in found:
                page.hits += 1
            page_ids = [NO_PAGE] * behind + [page.page_id for page in found]
            table.adopt(page_ids, num_tokens, self._allocator)
        return num_tokens

    def _touch(self, pages: Iterable[CachedPage]) -> None:
        self._time += 1
        for page in pages:
            page.last_used = self._time
            self._offer(page)

    # Storing.

    def insert(
        self,
        tokens: Tokens,
        table: PageTable,
        keys: Iterable[ExtraKey] = (),
        priority: int = 0,
        tail: bool = False,
    ) -> int:
        """Remember the full pages of a table by their tokens.

        A page whose tokens are cached already, in another page, is left to the table.

        Args:
            tokens: The table's first tokens; their K and V are written, or will be before
                anything that is computed later.
            table: Who holds the pages; nothing about it changes.
            keys: Everything else that K and V depend on.
            priority: For policies that heed it.
            tail: Remember the part-filled page in which the tokens end too. A table that
                goes on from there copies it first.

        Returns:
            Pages that are new to the cache.

        Raises:
            ValueError: The table is shorter than ``tokens`` or of another allocator, or a
                page of it is cached with other tokens.
        """
        packed, packed_keys = self._packed("insert", tokens, keys)
        num_tokens = len(packed) // TOKEN_BYTES
        (pages,) = maps_of("insert", (table,))
        priority = whole_number("insert", "priority", priority, -MAX_SLOTS)
        tail = check_flag("insert", "tail", tail)
        if num_tokens > table.num_tokens:
            fail("insert", f"table must hold all tokens, {num_tokens}", table.num_tokens)
        pages.check_allocator("insert", self._allocator)
        page_ids = table.leading_pages(num_tokens, tail)
        known, fresh = self._tree.compare(packed, packed_keys, page_ids)
        for place, page_id in fresh:
            self._check_new(place, page_id)
        if self._make_room(len(fresh), known):
            known, fresh = self._tree.compare(packed, packed_keys, page_ids)
        self._touch(known)
        room = None if self._max_pages is None else self._max_pages - self.num_pages
        stored = [self._store(place, page_id, priority) for place, page_id in fresh[:room]]
        self._tell_stored(stored)
        return len(stored)

    def _check_new(self, place: CachedPage, page_id: int) -> None:
        cached = self._tree.by_page.get(page_id)
        if cached is not None and not cached.is_part_of(place):
            fail(
                "insert",
                "tokens must be those that the table's pages hold",
                f"others for page {page_id}, at position {place.depth * self._page_size}",
            )
        if cached is None and page_id in self._allocator.evictors.held:
            fail(
                "insert",
                "table must hold pages that nobody else caches",
                f"page {page_id}",
                PageError,
            )

    def _make_room(self, num_pages: int, known: list[CachedPage]) -> bool:
        """Evict others than ``known`` until so many pages fit; return whether it was tried."""
        excess = 0 if self._max_pages is None else self.num_pages + num_pages - self._max_pages
        if excess > 0:
            held = [place.page_id for place in known if place.held]
            self._allocator.share_pages(held)
            self.evict(excess)
            self._allocator.free_pages(held)
        return excess > 0

    def _store(self, place: CachedPage, page_id: int, priority: int) -> CachedPage:
        """Take a reference to a page, and make it findable where it belongs."""
        part = self._tree.by_page.get(page_id)
        if part is not None:  # a page that was cached part-filled; it keeps its count of hits
            place.hits = part.hits
            self._tree.enter(place)  # so that the gaps before both stay
            self._forget([part])
        self._allocator.hold(page_id, self)
        self._tree.hold(place, page_id)
        place.created = place.last_used = self._time
        place.priority = priority
        place.stored_at = place.idle_at = self._clock()
        self.stats.stored += 1
        for page in place.outgrown():
            if page.idle:
                self._forget([page])
        return place

    def _tell_stored(self, stored: list[CachedPage]) -> None:
        """Note one event for each run of pages that follow one another."""
        runs: list[list[CachedPage]] = []
        for place in stored:
            if runs and place.parent is runs[-1][-1]:
                runs[-1].append(place)
            else:
                runs.append([place])
        for run in runs:
            self._events.add(
                PagesStored,
                run[0].parent.page_hash,
                tuple(place.page_hash for place in run),
                unpack_tokens(b"".join(place.tokens for place in run)),
                self._page_size,
                tuple(place.keys for place in run),
            )

    # Values beside pages.

    def keep(self, tokens: Tokens, value: object, keys: Iterable[ExtraKey] = ()) -> bool:
        """Keep a value with the tokens that it belongs to, for ``kept`` to find.

        It is dropped with the last full page of ``tokens``; False if that is not cached.
        """
        return self._tree.keep(*self._packed("keep", tokens, keys), value)

    def kept(self, tokens: Tokens, keys: Iterable[ExtraKey] = ()) -> list[tuple[int, object]]:
        """Return ``(number of tokens, value)`` for the beginnings of ``tokens``, all of them
        included, that a value is kept with; the shortest first."""
        return self._tree.kept(*self._packed("kept", tokens, keys))

    # Giving up.

    def _is_ready(self, page: CachedPage) -> bool:
        """Whether a page could be evicted now."""
        return page.idle and (self._window is not None or not page.children)

    def _offer(self, page: CachedPage) -> None:
        if self._is_ready(page):
            self._queue.push(page)

    def evict(self, num_pages: int) -> int:
        """Give back up to ``num_pages`` pages that nobody else holds; return how many."""
        num_pages, evicted = whole_number("evict", "num_pages", num_pages), 0
        while evicted < num_pages and self._num_idle:
            self._let_go(self._queue.pop() or self._uncover())
            evicted += 1
        self.stats.evicted += evicted
        return evicted

    def _uncover(self) -> CachedPage:
        """Forget what continues an idle page, all of it in use, and return the page.

        This happens when sequences have given back pages behind a window and hold later ones.
        """
        uncoverable, above_idle = [], set()
        for page in self._tree.root.descendants():
            if page.idle and page not in above_idle:
                uncoverable.append(page)
            if page.idle or page in above_idle:
                above_idle.add(page.parent)
        page = min(uncoverable, key=self._queue.policy)
        self._forget(page.descendants())
        return page

    def forget(self, page_ids: Sequence[int]) -> int:
        """Drop pages, and all that continue them, because their K and V are not to be trusted.

        Returns:
            Pages dropped. Tables that hold them keep them.
        """
        page_ids = as_list("forget", "page_ids", page_ids, "page ids")
        for page_id in page_ids:
            self._allocator.ref_count(page_id)  # refuses what is no page id
        before = self.num_pages
        for page_id in map(int, page_ids):
            page = self._tree.by_page.get(page_id)
            if page is not None:
                self._forget([*page.descendants(), page])
        return before - self.num_pages

    def _forget(self, places: Iterable[CachedPage]) -> None:
        for place in places:
            if place.held:
                self._let_go(place)
                self.stats.forgotten += 1

    def reset(self) -> int:
        """Drop every page; tables keep theirs. Return how many were dropped.

        Nothing is refused while sequences run: their references are their own.
        """
        pages = [place for place in self._tree.root.descendants() if place.held]
        for page in pages:
            self._let_go(page, tell=False)
        self._tree.root.kept.clear()
        self.stats.forgotten += len(pages)
        self._events.add(CacheCleared)
        return len(pages)

    def close(self) -> None:
        """Drop every page and stop being the allocator's evictor."""
        self.reset()
        self._allocator.evictors.remove(self)

    def _let_go(self, page: CachedPage, tell: bool = True) -> None:
        """Give up a page; a gap stays in its place while later pages follow."""
        now, page_id = self._clock(), page.page_id
        self.stats.lifetime += now - page.stored_at
        if page.idle:
            self.stats.idle_time += now - page.idle_at
            self._num_idle -= 1
            page.idle = False
        before = self._tree.drop(page)
        if before is not None:
            self._offer(before)
        self._allocator.let_go(page_id)
        if tell:
            self._events.add(PageRemoved, page.page_hash)

    # Told by the allocator.

    def pages_idle(self, page_ids: Sequence[int]) -> None:
        now = self._clock()
        self._time += 1
        self._num_idle += len(page_ids)
        for page_id in page_ids:
            page = self._tree.by_page[page_id]
            page.idle, page.idle_at, page.last_used = True, now, self._time
            self._offer(page)
        self._queue.compact(self.num_pages)

    def pages_busy(self, page_ids: Sequence[int]) -> None:
        self._num_idle -= len(page_ids)
        for page_id in page_ids:
            self._tree.by_page[page_id].idle = False

    def record_events(self, max_events: int) -> None:
        """Keep so many events for ``take_events`` from now on, the newest ones."""
        self._events.record(whole_number("record_events", "max_events", max_events))

    def take_events(self) -> list[CacheEvent]:
        """Return the events since the last call, oldest first, and forget them."""
        return self._events.take()

    def check(self) -> None:
        """Prove that tree, index, queue and reference counts agree.

        Raises:
            AssertionError: It names the difference.
        """
        self._tree.check()
        pages = list(self._tree.by_page.values())
        for page in pages:
            count = self._allocator.ref_count(page.page_id)
            assert page.idle == (count == 1), (
                f"cached page {page.page_id} is {'idle' if page.idle else 'busy'} "
                f"with ref_count {count}"
            )
        assert {page.page_id for page in pages if self._is_ready(page)} == self._queue.ready(), (
            "the eviction queue is not the idle pages that nothing continues"
        )
        assert self._num_idle == sum(page.idle for page in pages), (
            "the count of idle pages is wrong"
        )
        assert self._max_pages is None or len(pages) <= self._max_pages, (
            "the cache holds more than max_pages"
        )
