"""The places of a prefix cache: a tree by tokens, and an index into it by hash and by page."""

from __future__ import annotations

from paged_mlx.pages.table import NO_PAGE
from paged_mlx.prefix.cached_page import CachedPage
from paged_mlx.prefix.events import CacheStats
from paged_mlx.prefix.hash import TOKEN_BYTES, HashPage, root_hash

PackedKeys = dict[int, bytes]  # extra keys of the pages that have any, by their place


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
        """Put a page in its place; the place and gaps before it enter the tree if they are new."""
        new, above = place, []
        while new is not self.root and new.page_hash not in self.by_hash:
            above.append(new)
            new = new.parent
        for new in reversed(above):
            self.by_hash[new.page_hash] = new
            new.parent.add_child(new)
        place.page_id = page_id
        self.by_page[page_id] = place

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
            place.parent = None
            del self.by_hash[place.page_hash]
            place = parent
        return place if place.held else None

    def check(self) -> None:
        """Prove that tree and index agree.

        Raises:
            AssertionError: With what disagrees.
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
