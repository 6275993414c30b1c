"""The tree of cached pages: a page's children continue the sequence it ends."""

from __future__ import annotations

from bisect import bisect_left
from itertools import takewhile
from operator import attrgetter

import numpy as np

from paged_mlx.pages.table import NO_PAGE
from paged_mlx.prefix.hash import TOKEN_BYTES

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
        self.parent = parent
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
            common = common_tokens(child.tokens, tokens) if child else 0
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


def common_tokens(left: bytes, right: bytes) -> int:
    """How many tokens two packed sequences begin with in common."""
    size = min(len(left), len(right)) // TOKEN_BYTES
    differ = np.frombuffer(left, "<i4", size) != np.frombuffer(right, "<i4", size)
    return int(np.argmax(differ)) if differ.any() else size
