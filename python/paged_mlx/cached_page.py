"""The tree of cached pages: a page's children continue the sequence it ends."""

from __future__ import annotations

from bisect import bisect_left
from operator import attrgetter

import numpy as np

from paged_mlx.page_hash import TOKEN_BYTES

_by_tokens = attrgetter("tokens")


class CachedPage:
    """One page in the prefix cache; the root has page_id -1 and no tokens.

    Attributes:
        page_id: The page; the cache holds one reference to it.
        page_hash: Its hash, which names the whole sequence up to its end.
        tokens: Its tokens, packed.
        keys: Its extra keys, packed.
        parent: The page before it; None once it has left the cache.
        children: The pages after it, by their keys, each list ascending in ``tokens``.
        idle: Whether the cache is the page's only holder.
        created, last_used: Logical time; larger is later.
        hits: How often the page was reused.
        priority: Given by whoever inserted it; larger stays longer where the policy heeds it.
        stored_at, idle_at: Seconds on the cache's clock.
        stamp: The page's newest place in the eviction queue.
    """

    __slots__ = (
        "page_id", "page_hash", "tokens", "keys", "parent", "children", "idle",
        "created", "last_used", "hits", "priority", "stored_at", "idle_at", "stamp",
    )  # fmt: skip

    def __init__(
        self,
        page_id: int,
        page_hash: bytes,
        tokens: bytes = b"",
        keys: bytes = b"",
        parent: CachedPage | None = None,
    ) -> None:
        self.page_id = page_id
        self.page_hash = page_hash
        self.tokens = tokens
        self.keys = keys
        self.parent = parent
        self.children: dict[bytes, list[CachedPage]] = {}
        self.idle = False
        self.created = self.last_used = self.hits = self.priority = self.stamp = 0
        self.stored_at = self.idle_at = 0.0

    def is_page(self, parent: CachedPage, tokens: bytes, keys: bytes) -> bool:
        """Whether this is exactly the page asked for, whatever its hash."""
        return self.tokens == tokens and self.parent is parent and self.keys == keys

    def add_child(self, child: CachedPage) -> None:
        siblings = self.children.setdefault(child.keys, [])
        siblings.insert(bisect_left(siblings, child.tokens, key=_by_tokens), child)

    def remove_child(self, child: CachedPage) -> None:
        siblings = self.children[child.keys]
        del siblings[bisect_left(siblings, child.tokens, key=_by_tokens)]
        if not siblings:
            del self.children[child.keys]

    def closest_child(self, tokens: bytes, keys: bytes) -> tuple[CachedPage | None, int]:
        """Return the child that begins with most of ``tokens``, and how many tokens that is.

        In sorted order the longest common prefix is with a neighbour.
        """
        siblings = self.children.get(keys, ())
        at = bisect_left(siblings, tokens, key=_by_tokens)
        best, length = None, 0
        for child in siblings[max(at - 1, 0) : at + 1]:
            common = common_tokens(child.tokens, tokens)
            if common > length:
                best, length = child, common
        return best, length

    def descendants(self) -> list[CachedPage]:
        """Every page below this one, each before its parent."""
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
