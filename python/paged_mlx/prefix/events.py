"""News of a prefix cache: events for an outside index, and statistics."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class PagesStored:
    """Pages that continue ``parent_hash`` were stored, in this order.

    ``number`` counts events; a gap means that events were lost. ``tokens`` are those of
    all the pages, ``page_size`` for each but perhaps the last, which may be part-filled.
    ``keys`` are the packed extra keys per page.
    """

    number: int
    parent_hash: bytes
    page_hashes: tuple[bytes, ...]
    tokens: tuple[int, ...]
    page_size: int
    keys: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class PageRemoved:
    """A page has left the cache; those that continue it left before."""

    number: int
    page_hash: bytes


@dataclass(frozen=True, slots=True)
class CacheCleared:
    """Every page has left the cache at once."""

    number: int


CacheEvent = PagesStored | PageRemoved | CacheCleared


class EventLog:
    """Keeps the newest ``capacity`` events until they are taken."""

    def __init__(self, capacity: int) -> None:
        self._events: deque[CacheEvent] = deque(maxlen=capacity)
        self._number = 0

    def record(self, capacity: int) -> None:
        """Keep the newest ``capacity`` events from now on."""
        self._events = deque(self._events, maxlen=capacity)

    def add(self, kind: Callable[..., CacheEvent], *fields: object) -> None:
        """Record an event; without capacity it is only counted."""
        self._number += 1
        if self._events.maxlen:
            self._events.append(kind(self._number, *fields))

    def take(self) -> list[CacheEvent]:
        """Return the events since the last call, oldest first, and forget them."""
        events = list(self._events)
        self._events.clear()
        return events


@dataclass(slots=True)
class CacheStats:
    """Figures since the cache was made.

    Attributes:
        queries, query_tokens: Lookups that wanted to reuse pages, and their tokens.
        hits, hit_tokens: Those that found some, and the tokens saved.
        partial_hits: Hits that end inside a page.
        stored, evicted, forgotten: Pages that came, left for want of pages, or left on request.
        collisions: Hashes that named other tokens; served to nobody.
        lifetime, idle_time: Seconds in the cache, and seconds unused before leaving, summed
            over the pages that have left.
        recent: Tokens and tokens saved of the latest queries.
    """

    queries: int = 0
    query_tokens: int = 0
    hits: int = 0
    hit_tokens: int = 0
    partial_hits: int = 0
    stored: int = 0
    evicted: int = 0
    forgotten: int = 0
    collisions: int = 0
    lifetime: float = 0.0
    idle_time: float = 0.0
    recent: deque[tuple[int, int]] = field(default_factory=lambda: deque(maxlen=1000))

    def add_query(self, tokens: int, saved: int, page_size: int) -> None:
        self.queries += 1
        self.query_tokens += tokens
        self.hits += saved > 0
        self.hit_tokens += saved
        self.partial_hits += saved % page_size > 0
        self.recent.append((tokens, saved))

    @property
    def hit_rate(self) -> float | None:
        """Share of all query tokens that was saved; None without queries."""
        return self.hit_tokens / self.query_tokens if self.query_tokens else None

    @property
    def recent_hit_rate(self) -> float | None:
        """The same over the latest queries."""
        tokens = sum(tokens for tokens, _ in self.recent)
        return sum(saved for _, saved in self.recent) / tokens if tokens else None

    @property
    def mean_lifetime(self) -> float | None:
        """Seconds that a page stayed; None before one has left."""
        left = self.evicted + self.forgotten
        return self.lifetime / left if left else None

    @property
    def mean_idle_time(self) -> float | None:
        """Seconds that a page went unused before it left; None before one has left."""
        left = self.evicted + self.forgotten
        return self.idle_time / left if left else None
