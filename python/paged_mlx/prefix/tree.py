"""The tree of a prefix cache: a page's children continue the sequence it ends."""

from __future__ import annotations

from bisect import bisect_left
from itertools import takewhile
from operator import attrgetter

import numpy as np

from paged_mlx.pages.page_map import NO_PAGE
from paged_mlx.pages.tokens import TOKEN_BYTES
from paged_mlx.prefix.events import CacheStats
from paged_mlx.prefix.hash import HashPage, root_hash

PackedKeys = dict[int, bytes]  # extra keys of the pages that have any, by their place

_by_tokens = attrgetter("tokens")


class CachedPage:
    """One place in the tree of a prefix cache; the root has no page and no tokens.

    Attributes:
        page_id: The page; the cache holds one reference to it. NO_PAGE: a *gap*, a place
            whose page is not held while later ones are.
        page_hash: Its hash, which names the whole sequence up to its end.
        tokens: Its tokens, packed; fewer than a page takes when a sequence ended in it.
        keys: Its extra keys, packed.
        parent: The place before it; None once it has left the tree.
        children: The places after it, by their keys, each list ascending in ``tokens``.
        kept: Values kept beside it, by the packed tokens and keys that follow it.
        idle: Whether the cache is the page's only holder.
        created, last_used: Logical time; larger is later.
        hits: How often the page was reused.
        priority: Given by whoever inserted it; larger stays longer where the policy heeds it.
        stored_at, idle_at: Seconds on the cache's clock.
        stamp: The page's newest place in the eviction queue.
    """

    __slots__ = (
        "page_id", "page_hash", "tokens", "keys", "parent", "children", "kept", "idle",
        "created", "last_used", "hits", "priority", "stored_at", "idle_at", "stamp",
    )  # fmt: skip

    def __init__(
        self,
        page_hash: bytes,
        tokens: bytes = b"",
        keys: bytes = b"",
        parent: CachedPage | None = None,
    ) -> None:
        self.page_id = NO_PAGE
        self.page_hash = page_hash
        self.tokens = tokens
        self.keys = keys
        self.parent: CachedPage = parent  # type: ignore[assignment]  # the root has none
        self.children: dict[bytes, list[CachedPage]] = {}
        self.kept: dict[tuple[bytes, bytes], object] = {}
        self.idle = False
        self.created = self.last_used = self.hits = self.priority = self.stamp = 0
        self.stored_at = self.idle_at = 0.0

    @property
    def held(self) -> bool:
        """Whether the cache holds its page."""
        return self.page_id != NO_PAGE

    @property
    def depth(self) -> int:
        """Places between it and the root."""
        depth, place = 0, self.parent
        while place is not None and place.parent is not None:
            depth, place = depth + 1, place.parent
        return depth

    def is_page(self, parent: CachedPage, tokens: bytes, keys: bytes) -> bool:
        """Whether this is exactly the page asked for, whatever its hash."""
        return self.tokens == tokens and self.parent is parent and self.keys == keys

    def is_part_of(self, other: CachedPage) -> bool:
        """Whether the other place's tokens begin with this one's, after the same tokens."""
        same = self.parent is other.parent and self.keys == other.keys
        return same and other.tokens.startswith(self.tokens)

    def add_child(self, child: CachedPage) -> None:
        siblings = self.children.setdefault(child.keys, [])
        siblings.insert(bisect_left(siblings, child.tokens, key=_by_tokens), child)

    def remove_child(self, child: CachedPage) -> None:
        siblings = self.children[child.keys]
        del siblings[bisect_left(siblings, child.tokens, key=_by_tokens)]
        if not siblings:
            del self.children[child.keys]

    def closest_child(self, tokens: bytes, keys: bytes) -> tuple[CachedPage | None, int]:
        """Return the held child that begins with most of ``tokens``, and how many that is.

        In sorted order the longest common prefix is with a neighbour.
        """
        siblings = self.children.get(keys, ())
        at = bisect_left(siblings, tokens, key=_by_tokens)
        best, length = None, 0
        for side in (range(at, len(siblings)), range(at - 1, -1, -1)):
            child = next((siblings[i] for i in side if siblings[i].held), None)
            common = _common_tokens(child.tokens, tokens) if child else 0
            if common > length:
                best, length = child, common
        return best, length

    def outgrown(self) -> list[CachedPage]:
        """The siblings next to it whose tokens are the beginning of its own."""
        siblings = self.parent.children[self.keys]
        if len(siblings) == 1:
            return []
        at = bisect_left(siblings, self.tokens, key=_by_tokens)
        before = (siblings[i] for i in range(at - 1, -1, -1))
        return list(takewhile(lambda sibling: sibling.is_part_of(self), before))

    def descendants(self) -> list[CachedPage]:
        """Every place below this one, each before its parent."""
        order, pending = [], [self]
        while pending:
            page = pending.pop()
            below = [child for siblings in page.children.values() for child in siblings]
            order.extend(below)
            pending.extend(below)
        return order[::-1]


class PrefixTree:
    """Which sequences of pages are known, and which of their pages are held.

    Tokens and keys are packed, see ``page_hash``.

    Args:
        page_size: Tokens in a page.
        window: Keys a token may see; None: all, and there are no gaps.
        hash_page: The hash of a page.
        stats: Where collisions are counted.

    Attributes:
        root: The place before every first page.
        by_hash: Every place but the root.
        by_page: Those whose page is held, by page id.
    """

    def __init__(
        self, page_size: int, window: int | None, hash_page: HashPage, stats: CacheStats
    ) -> None:
        self.root = CachedPage(root_hash(page_size))
        self.by_hash: dict[bytes, CachedPage] = {}
        self.by_page: dict[int, CachedPage] = {}
        self._page_size = page_size
        self._width = page_size * TOKEN_BYTES
        self._window = window
        self._hash_page = hash_page
        self._stats = stats

    # Finding.

    def find(self, tokens: bytes, keys: PackedKeys) -> tuple[list[CachedPage], int, int]:
        """Return the pages of the longest cached beginning, how many places before them lie
        behind the window, and how many tokens that is."""
        places = self.chain(tokens, keys)
        num_tokens = len(places) * self._page_size
        rest = self._rest(tokens, places)
        if rest:
            parent = places[-1] if places else self.root
            partial, length = parent.closest_child(rest, keys.get(len(places), b""))
            if partial is not None:
                places.append(partial)
                num_tokens += length
        return self._within_window(places, num_tokens)

    def _within_window(
        self, places: list[CachedPage], num_tokens: int
    ) -> tuple[list[CachedPage], int, int]:
        """Go back to where the pages of a whole window are held."""
        if self._window is None:
            return places, 0, num_tokens
        held_since = [0]
        for index, place in enumerate(places):
            held_since.append(held_since[-1] if place.held else index + 1)
        while True:
            behind = max(0, num_tokens - self._window + 1) // self._page_size
            if held_since[len(places)] <= behind:
                return places[behind:], behind, num_tokens
            places.pop()
            num_tokens = len(places) * self._page_size

    def chain(self, tokens: bytes, keys: PackedKeys) -> list[CachedPage]:
        """Return the places of the full pages that ``tokens`` begin with, as far as they go."""
        places: list[CachedPage] = []
        parent = self.root
        for index in range(len(tokens) // self._width):
            chunk = tokens[index * self._width : (index + 1) * self._width]
            page_keys = keys.get(index, b"")
            place = self.by_hash.get(self._hash_page(parent.page_hash, chunk, page_keys))
            if place is None:
                break
            if not place.is_page(parent, chunk, page_keys):
                self._stats.collisions += 1
                break
            places.append(place)
            parent = place
        return places

    def _rest(self, tokens: bytes, places: list[CachedPage]) -> bytes:
        """Return the tokens of the page that comes after ``places``."""
        start = len(places) * self._width
        return tokens[start : start + self._width]

    # Values beside pages.

    def keep(self, tokens: bytes, keys: PackedKeys, value: object) -> bool:
        places = self.chain(tokens, keys)
        place = places[-1] if places else self.root
        if len(places) < len(tokens) // self._width or places and not place.held:
            return False
        place.kept[self._rest(tokens, places), keys.get(len(places), b"")] = value
        return True

    def kept(self, tokens: bytes, keys: PackedKeys) -> list[tuple[int, object]]:
        found = []
        for index, place in enumerate([self.root, *self.chain(tokens, keys)]):
            start = index * self._width
            for (rest, rest_keys), value in place.kept.items():
                if tokens.startswith(rest, start) and rest_keys == keys.get(index, b""):
                    found.append(((start + len(rest)) // TOKEN_BYTES, value))
        return sorted(found, key=lambda entry: entry[0])

    # Storing.

    def compare(
        self, tokens: bytes, keys: PackedKeys, page_ids: list[int]
    ) -> tuple[list[CachedPage], list[tuple[CachedPage, int]]]:
        """Compare a table with the tree, which stays as it is.

        Args:
            page_ids: Pages of the table's entries, the last one's perhaps part-filled.

        Returns:
            The places of the table's tokens that are known, and ``(place, page_id)`` for the
            pages that ``hold`` could put into places of theirs.
        """
        known, fresh = self.chain(tokens, keys), []
        parent, names = self.root, set()
        for index, page_id in enumerate(page_ids):
            place: CachedPage | None
            if index < len(known):
                place = known[index]
            else:
                place = self._new_place(parent, index, tokens, keys)
                if place is None or page_id == NO_PAGE and self._window is None:
                    break
                if place.page_hash in self.by_hash or place.page_hash in names:
                    self._stats.collisions += 1
                    break
                names.add(place.page_hash)
            if not place.held and page_id != NO_PAGE:
                fresh.append((place, page_id))
            parent = place
        return known, fresh

    def _new_place(
        self, parent: CachedPage, index: int, tokens: bytes, keys: PackedKeys
    ) -> CachedPage | None:
        """Return a place after ``parent``; None for part of a page that another begins with."""
        chunk = tokens[index * self._width : (index + 1) * self._width]
        page_keys = keys.get(index, b"")
        if len(chunk) < self._width:
            _, length = parent.closest_child(chunk, page_keys)
            if length * TOKEN_BYTES == len(chunk):
                return None
        page_hash = self._hash_page(parent.page_hash, chunk, page_keys)
        return CachedPage(page_hash, chunk, page_keys, parent)

    def hold(self, place: CachedPage, page_id: int) -> None:
        """Put a page in its place, which enters the tree if it is new."""
        self.enter(place)
        place.page_id = page_id
        self.by_page[page_id] = place

    def enter(self, place: CachedPage) -> None:
        """Have a place and the gaps before it in the tree."""
        new, above = place, []
        while new is not self.root and new.page_hash not in self.by_hash:
            above.append(new)
            new = new.parent
        for new in reversed(above):
            self.by_hash[new.page_hash] = new
            new.parent.add_child(new)

    def drop(self, place: CachedPage) -> CachedPage | None:
        """Empty a place; it leaves the tree with all gaps before it that nothing follows.

        Returns:
            The page, if any, that one place less follows now.
        """
        del self.by_page[place.page_id]
        place.page_id = NO_PAGE
        place.kept.clear()
        while place is not self.root and not place.held and not place.children:
            parent = place.parent
            parent.remove_child(place)
            place.parent = None  # type: ignore[assignment]
            del self.by_hash[place.page_hash]
            place = parent
        return place if place.held else None

    def check(self) -> None:
        """Prove that tree and index agree.

        Raises:
            AssertionError: It names the difference.
        """
        places = self.root.descendants()
        held = [place for place in places if place.held]
        assert {place.page_id for place in held} == set(self.by_page), (
            "the tree and the index hold different pages"
        )
        assert len(held) == len(self.by_page) and len(places) == len(self.by_hash), (
            "a page is in the cache twice"
        )
        assert self._window is not None or len(held) == len(places), "a gap where all keys are seen"
        for place in places:
            name = f"cached page {place.page_id}"
            siblings = place.parent.children[place.keys]
            assert siblings == sorted(siblings, key=lambda sibling: sibling.tokens), (
                f"{name} is out of order"
            )
            assert self.by_hash.get(place.page_hash) is place, f"{name} is not found by its hash"
            expected = self._hash_page(place.parent.page_hash, place.tokens, place.keys)
            assert place.page_hash == expected, f"{name} has another hash than its tokens"
            assert place.held or place.children, "nothing follows a gap"
            assert place.held or not place.kept, "a value is kept beside no page"


def _common_tokens(left: bytes, right: bytes) -> int:
    """How many tokens two packed sequences begin with in common."""
    size = min(len(left), len(right)) // TOKEN_BYTES
    differ = np.frombuffer(left, "<i4", size) != np.frombuffer(right, "<i4", size)
    return int(np.argmax(differ)) if differ.any() else size
