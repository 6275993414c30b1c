"""Pages of finished and running sequences, found again by their tokens.

The cache holds one reference to each of its pages, like any sequence: there is no page
that is free and cached. Pages that only the cache holds are given back when the allocator
runs out, children before parents.

A hash finds a page; its tokens, keys and parent are then compared, so that a collision
can cost a hit and never serve K and V of other tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from paged_mlx.cache_events import (
    CacheCleared,
    CacheEvent,
    CacheStats,
    EventLog,
    PageRemoved,
    PagesStored,
)
from paged_mlx.cached_page import CachedPage
from paged_mlx.errors import PageError, fail, whole_number
from paged_mlx.eviction import EvictionPolicy, EvictionQueue, least_recently_used
from paged_mlx.page_allocator import PageAllocator
from paged_mlx.page_hash import (
    TOKEN_BYTES,
    ExtraKey,
    HashPage,
    Tokens,
    hash_page,
    pack_keys,
    pack_tokens,
    root_hash,
    unpack_tokens,
)
from paged_mlx.page_table import NO_PAGE, PageTable


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """The longest cached beginning of a sequence.

    Attributes:
        num_tokens: Its length; at most all tokens but one, which is left to compute.
        page_ids: Its pages; the last may be used in part, copy-on-write.
    """

    num_tokens: int
    page_ids: list[int]


class PrefixCache:
    """Remembers which pages hold which tokens.

    Args:
        allocator: Whose pages; the cache becomes one of its evictors.
        policy: Which page to give up first; see ``eviction``.
        max_pages: Pages to hold at most; default no limit but the pool.
        max_events: Events to keep for ``take_events``; default none.
        hash_page: The hash, ``(parent_hash, tokens, keys) -> bytes``.
        clock: Seconds, for the statistics.
    """

    def __init__(
        self,
        allocator: PageAllocator,
        *,
        policy: EvictionPolicy = least_recently_used,
        max_pages: int | None = None,
        max_events: int = 0,
        hash_page: HashPage = hash_page,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._allocator = allocator
        self._page_size = allocator.page_size
        self._width = self._page_size * TOKEN_BYTES
        self._max_pages = (
            None if max_pages is None else whole_number("PrefixCache", "max_pages", max_pages, 1)
        )
        self._events = EventLog(whole_number("PrefixCache", "max_events", max_events))
        self._hash_page = hash_page
        self._clock = clock
        self._queue = EvictionQueue(policy)
        self._root = CachedPage(NO_PAGE, root_hash(self._page_size))
        self._by_hash: dict[bytes, CachedPage] = {}
        self._by_page: dict[int, CachedPage] = {}
        self._num_idle = 0
        self._time = 0
        self.stats = CacheStats()
        allocator.add_evictor(self)

    # Figures.

    @property
    def page_ids(self) -> list[int]:
        """The pages that the cache holds."""
        return list(self._by_page)

    @property
    def num_pages(self) -> int:
        """How many pages the cache holds."""
        return len(self._by_page)

    @property
    def num_evictable(self) -> int:
        """How many of them nobody else holds."""
        return self._num_idle

    def __repr__(self) -> str:
        return f"PrefixCache(num_pages={self.num_pages}, num_evictable={self.num_evictable})"

    # Finding.

    def match(self, tokens: Tokens, keys: Iterable[ExtraKey] = ()) -> PrefixMatch:
        """Return what ``reuse`` would share; nothing changes, and no query is counted."""
        pages, num_tokens = self._find(pack_tokens(tokens), pack_keys(keys, self._page_size))
        return PrefixMatch(num_tokens, [page.page_id for page in pages])

    def reuse(self, tokens: Tokens, table: PageTable, keys: Iterable[ExtraKey] = ()) -> int:
        """Let an empty table begin with the longest cached beginning of ``tokens``.

        Args:
            tokens: The sequence that is to be computed.
            table: Empty; holds the pages found afterwards.
            keys: What else K and V depend on.

        Returns:
            Tokens that need no computing: less than all of them, since the last one's
            output is wanted. The first page that differs is shared up to the difference
            and copied by the next append.

        Raises:
            ValueError: The table is not empty, or of another allocator or page size.
        """
        packed, packed_keys = pack_tokens(tokens), pack_keys(keys, self._page_size)
        if table.num_tokens:
            fail("reuse", "table must be empty", f"{table.num_tokens} tokens")
        table._check_allocator("reuse", self._allocator)
        pages, num_tokens = self._find(packed, packed_keys)
        self.stats.add_query(len(packed) // TOKEN_BYTES, num_tokens, self._page_size)
        if num_tokens:
            self._touch(pages)
            for page in pages:
                page.hits += 1
            table._adopt([page.page_id for page in pages], num_tokens, self._allocator)
        return num_tokens

    def _find(self, tokens: bytes, keys: dict[int, bytes]) -> tuple[list[CachedPage], int]:
        wanted = max(0, len(tokens) // TOKEN_BYTES - 1)
        pages = self._chain(tokens[: wanted * TOKEN_BYTES], keys)
        found = len(pages)
        rest = tokens[found * self._width : min((found + 1) * self._width, wanted * TOKEN_BYTES)]
        parent = pages[-1] if pages else self._root
        partial, length = parent.closest_child(rest, keys.get(found, b"")) if rest else (None, 0)
        if partial is not None:
            pages.append(partial)
        return pages, found * self._page_size + length

    def _chain(self, tokens: bytes, keys: dict[int, bytes]) -> list[CachedPage]:
        """Return the cached pages that ``tokens`` begins with, as far as they go."""
        pages: list[CachedPage] = []
        parent = self._root
        for index in range(len(tokens) // self._width):
            chunk = tokens[index * self._width : (index + 1) * self._width]
            page_keys = keys.get(index, b"")
            page = self._by_hash.get(self._hash_page(parent.page_hash, chunk, page_keys))
            if page is None:
                break
            if not page.is_page(parent, chunk, page_keys):
                self.stats.collisions += 1
                break
            pages.append(page)
            parent = page
        return pages

    def _touch(self, pages: Iterable[CachedPage]) -> None:
        self._time += 1
        for page in pages:
            page.last_used = self._time
            if page.idle and not page.children:
                self._queue.push(page)

    # Storing.

    def insert(
        self, tokens: Tokens, table: PageTable, keys: Iterable[ExtraKey] = (), priority: int = 0
    ) -> int:
        """Remember the full pages of a table by their tokens.

        A page whose tokens are cached already, in another page, is left to the table.

        Args:
            tokens: The table's first tokens; their K and V are written, or will be before
                anything that is computed later.
            table: Who holds the pages; nothing about it changes.
            keys: What else K and V depend on.
            priority: For policies that heed it.

        Returns:
            Pages that are new to the cache.

        Raises:
            ValueError: The table is shorter than ``tokens`` or of another allocator, or a
                page of it is cached with other tokens.
        """
        packed, packed_keys = pack_tokens(tokens), pack_keys(keys, self._page_size)
        if len(packed) // TOKEN_BYTES > table.num_tokens:
            fail(
                "insert",
                f"table must hold all tokens, {len(packed) // TOKEN_BYTES}",
                table.num_tokens,
            )
        table._check_allocator("insert", self._allocator)
        known = self._chain(packed, packed_keys)
        fresh = self._continue(known, packed, packed_keys, table)
        self._touch(known)
        stored = fresh[: self._room_for(len(fresh), known)]
        for page in stored:
            self._store(page, priority)
        if stored:
            self._events.add(
                PagesStored,
                stored[0].parent.page_hash,
                tuple(page.page_hash for page in stored),
                unpack_tokens(b"".join(page.tokens for page in stored)),
                self._page_size,
                tuple(page.keys for page in stored),
            )
        return len(stored)

    def _continue(
        self, known: list[CachedPage], tokens: bytes, keys: dict[int, bytes], table: PageTable
    ) -> list[CachedPage]:
        """Return pages, not stored yet, for the full pages of ``table`` after the known ones."""
        fresh: list[CachedPage] = []
        parent = known[-1] if known else self._root
        page_ids, names = table.full_pages(len(tokens) // TOKEN_BYTES), set()
        for index in range(len(known), len(page_ids)):
            chunk = tokens[index * self._width : (index + 1) * self._width]
            page_keys = keys.get(index, b"")
            name = self._hash_page(parent.page_hash, chunk, page_keys)
            if name in self._by_hash or name in names:
                self.stats.collisions += 1
                break
            if page_ids[index] == NO_PAGE:
                break
            if page_ids[index] in self._by_page:
                fail(
                    "insert",
                    "tokens must be those that the table's pages hold",
                    f"others for page {page_ids[index]}, at position {index * self._page_size}",
                )
            if self._allocator.is_watched(page_ids[index]):
                fail(
                    "insert",
                    "table must hold pages that nobody else caches",
                    f"page {page_ids[index]}",
                    PageError,
                )
            parent = CachedPage(page_ids[index], name, chunk, page_keys, parent)
            fresh.append(parent)
            names.add(name)
        return fresh

    def _room_for(self, num_pages: int, known: list[CachedPage]) -> int:
        """Return how many pages may be stored, after evicting others than ``known`` for them."""
        if self._max_pages is None:
            return num_pages
        excess = self.num_pages + num_pages - self._max_pages
        if excess > 0:
            held = [page.page_id for page in known]
            self._allocator.share_pages(held)
            self.evict(excess)
            self._allocator.free_pages(held)
        return min(num_pages, self._max_pages - self.num_pages)

    def _store(self, page: CachedPage, priority: int) -> None:
        """Take a reference to a page whose parent is stored, and make it findable."""
        self._allocator.share_page(page.page_id)
        self._allocator.watch(page.page_id, self)
        self._by_hash[page.page_hash] = self._by_page[page.page_id] = page
        page.parent.add_child(page)
        page.created = page.last_used = self._time
        page.priority = priority
        page.stored_at = page.idle_at = self._clock()
        self.stats.stored += 1

    # Giving up.

    def evict(self, num_pages: int) -> int:
        """Give back up to ``num_pages`` pages that nobody else holds; return how many."""
        evicted = 0
        while evicted < num_pages and self._num_idle:
            page = self._queue.pop() or self._uncover()
            self._remove(page)
            self._events.add(PageRemoved, page.page_hash)
            evicted += 1
        self.stats.evicted += evicted
        return evicted

    def _uncover(self) -> CachedPage:
        """Forget what continues an idle page, all of it in use, and return the page.

        This happens when sequences have given back pages behind a window and hold later ones.
        """
        uncoverable, above_idle = [], set()
        for page in self._root.descendants():
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
        before = self.num_pages
        for page_id in page_ids:
            page = self._by_page.get(page_id)
            if page is not None:
                self._forget([*page.descendants(), page])
        return before - self.num_pages

    def _forget(self, pages: Iterable[CachedPage]) -> None:
        for page in pages:
            self._remove(page)
            self._events.add(PageRemoved, page.page_hash)
            self.stats.forgotten += 1

    def reset(self) -> int:
        """Drop every page; tables keep theirs. Return how many were dropped.

        Nothing is refused while sequences run: their references are their own.
        """
        pages = self._root.descendants()
        for page in pages:
            self._remove(page)
        self.stats.forgotten += len(pages)
        self._events.add(CacheCleared)
        return len(pages)

    def close(self) -> None:
        """Drop every page and stop being the allocator's evictor."""
        self.reset()
        self._allocator.remove_evictor(self)

    def _remove(self, page: CachedPage) -> None:
        """Drop a page that nothing continues."""
        parent, now = page.parent, self._clock()
        parent.remove_child(page)
        page.parent = None
        del self._by_hash[page.page_hash], self._by_page[page.page_id]
        self.stats.lifetime += now - page.stored_at
        self._allocator.unwatch(page.page_id)
        if page.idle:
            self.stats.idle_time += now - page.idle_at
            self._num_idle -= 1
        self._allocator.free_page(page.page_id)
        if parent.idle and not parent.children:
            self._queue.push(parent)

    # Told by the allocator.

    def pages_idle(self, page_ids: Sequence[int]) -> None:
        now = self._clock()
        self._time += 1
        self._num_idle += len(page_ids)
        for page_id in page_ids:
            page = self._by_page[page_id]
            page.idle, page.idle_at, page.last_used = True, now, self._time
            if not page.children:
                self._queue.push(page)
        self._queue.compact(self.num_pages)

    def pages_busy(self, page_ids: Sequence[int]) -> None:
        self._num_idle -= len(page_ids)
        for page_id in page_ids:
            self._by_page[page_id].idle = False

    def take_events(self) -> list[CacheEvent]:
        """Return the events since the last call, oldest first, and forget them."""
        return self._events.take()

    def check(self) -> None:
        """Prove that tree, index, queue and reference counts agree.

        Raises:
            AssertionError: With what disagrees.
        """
        pages = self._root.descendants()
        assert {page.page_id for page in pages} == set(self._by_page), (
            "the tree and the index hold different pages"
        )
        assert len(pages) == len(self._by_page) == len(self._by_hash), (
            "a page is in the cache twice"
        )
        for page in pages:
            name = f"cached page {page.page_id}"
            siblings = page.parent.children[page.keys]
            assert siblings == sorted(siblings, key=lambda sibling: sibling.tokens), (
                f"{name} is out of order"
            )
            assert self._by_hash.get(page.page_hash) is page, f"{name} is not found by its hash"
            expected = self._hash_page(page.parent.page_hash, page.tokens, page.keys)
            assert page.page_hash == expected, f"{name} has another hash than its tokens"
            count = self._allocator.ref_count(page.page_id)
            assert page.idle == (count == 1), (
                f"{name} is {'idle' if page.idle else 'busy'} with ref_count {count}"
            )
        leaves = {page.page_id for page in pages if page.idle and not page.children}
        assert leaves == self._queue.ready(), (
            "the eviction queue is not the idle pages that nothing continues"
        )
        assert self._num_idle == sum(page.idle for page in pages), (
            "the count of idle pages is wrong"
        )
        assert self._max_pages is None or len(pages) <= self._max_pages, (
            "the cache holds more than max_pages"
        )
