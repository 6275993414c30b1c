"""The page of each position of a sequence.

A page map is the value that a page table, appends, packed block tables and the canary work
on. It counts no holders: whoever changes its pages shares and frees them.
"""

from __future__ import annotations

import itertools
from array import array
from bisect import bisect_right
from dataclasses import dataclass

import numpy as np

from paged_mlx.errors import fail, kind_of, whole_number
from paged_mlx.pages.allocator import PageAllocator

NO_PAGE = -1

# Names a content. Every change of a map draws one: between two that follow each other, none changed.
new_version = itertools.count(1).__next__


@dataclass(frozen=True, slots=True)
class PageTableEntry:
    """Positions ``[logical_start, logical_end)`` lie in one page, from its first slot on.

    ``is_cow``: somebody else holds the page too, so a write to it copies it first.

    Examples:
        >>> import paged_mlx
        >>> table = paged_mlx.PageTable(page_size=4)
        >>> slots = table.append_tokens(6, PageAllocator(total_pages=8, page_size=4)).slots
        >>> table.entries[1]
        PageTableEntry(logical_start=4, logical_end=6, physical_page_id=1, is_cow=False)
    """

    logical_start: int
    logical_end: int
    physical_page_id: int
    is_cow: bool


class PageMap:
    """The pages of one sequence, in logical order.

    Entry i covers positions ``[i * page_size, (i + 1) * page_size)`` unless the map is
    *ragged*: a sealed page may be left part-filled in the middle of a sequence. Entries
    behind a sliding window that were given back keep their place and hold NO_PAGE.

    Attributes:
        page_size: Tokens in a page.
        allocator: Owner of the pages; None while there are none.
        ids: The page of each entry, ``int32``. No page stands in it twice.
        starts: The first position of each entry, when ragged; else None.
        num_tokens: Positions in all.
        num_freed: Leading entries that hold NO_PAGE.
        room: Slots of the last page that new tokens take; 0 when it is full or sealed.
        version: Names the content; equal versions mean equal entries and lengths.
        ids_version: Names the entries; equal versions mean equal pages and starts.
    """

    __slots__ = (
        "page_size", "allocator", "ids", "starts", "num_tokens", "num_freed", "room", "version",
        "ids_version",
    )  # fmt: skip

    def __init__(self, page_size: int, allocator: PageAllocator | None = None) -> None:
        self.page_size = page_size
        self.allocator = allocator
        self.clear()

    def clear(self) -> None:
        """Hold no entry."""
        self.ids = array("i")
        self.starts: array[int] | None = None
        self.num_tokens = self.num_freed = self.room = 0
        self.touch()

    def touch(self) -> None:
        """Name the new content of the entries."""
        self.version = self.ids_version = new_version()

    def copy(self) -> PageMap:
        """Return an equal map, of the same version."""
        copy = PageMap.__new__(PageMap)
        copy.page_size, copy.allocator = self.page_size, self.allocator
        copy.ids = self.ids[:]
        copy.starts = None if self.starts is None else self.starts[:]
        copy.num_tokens, copy.num_freed, copy.room = self.num_tokens, self.num_freed, self.room
        copy.version, copy.ids_version = self.version, self.ids_version
        return copy

    @property
    def held(self) -> array[int]:
        """The pages of the entries that have one."""
        return self.ids[self.num_freed :]

    def start(self, entry: int) -> int:
        """The first position of an entry; num_tokens past the last one."""
        if entry >= len(self.ids):
            return self.num_tokens
        return entry * self.page_size if self.starts is None else self.starts[entry]

    @property
    def first_held(self) -> int:
        """The first position whose page is held; num_tokens when none is."""
        return self.start(self.num_freed)

    @property
    def tail_tokens(self) -> int:
        """Tokens in the last page; page_size when there is none."""
        return self.num_tokens - self.start(len(self.ids) - 1) if self.ids else self.page_size

    def num_covering(self, length: int) -> int:
        """Entries that positions [0, length) touch."""
        if self.starts is None:
            return -(-length // self.page_size)
        return bisect_right(self.starts, length - 1)

    def num_done_by(self, position: int) -> int:
        """Leading entries without a token at ``position`` or later, nor room for one."""
        if position == self.num_tokens and self.tail_tokens == self.page_size:
            return len(self.ids)
        if self.starts is None:
            return position // self.page_size
        return max(0, bisect_right(self.starts, position) - 1)

    def locate(self, function: str, position: int) -> tuple[int, int]:
        """Return the entry and the offset in its page of a position, which must be held."""
        position = whole_number(function, "logical_pos", position)
        if position >= self.num_tokens:
            must = f"logical_pos must be in [0, {self.num_tokens}), the tokens of the table"
            fail(function, must, position)
        entry = self.num_covering(position + 1) - 1
        if entry < self.num_freed:
            must = (
                f"logical_pos must be at least {self.first_held}, because the pages before "
                "were given back"
            )
            fail(function, must, position)
        return entry, position - self.start(entry)

    def slots(self, start: int, stop: int) -> np.ndarray:
        """Return the slots of positions ``[start, stop)``, all held, ``int32``."""
        positions: np.ndarray = np.arange(start, stop, dtype=np.int32)
        if self.starts is None:
            entry = positions // self.page_size
            offset = positions - entry * self.page_size
        else:
            starts = np.array(self.starts, np.int32)
            entry = np.searchsorted(starts, positions, side="right") - 1
            offset = positions - starts[entry]
        return np.array(self.ids, np.int32)[entry] * np.int32(self.page_size) + offset

    def entries(self) -> list[PageTableEntry]:
        """The entries that hold a page; a snapshot."""
        if self.allocator is None:
            return []
        starts = [self.start(entry) for entry in range(self.num_freed, len(self.ids) + 1)]
        counts = self.allocator.counts
        return [
            PageTableEntry(start, end, page_id, counts[page_id] > 1)
            for start, end, page_id in zip(starts, starts[1:], self.held)
        ]

    def cut(self, length: int) -> None:
        """Keep the entries of positions ``[0, length)``, at least one."""
        kept = self.num_covering(length)
        del self.ids[kept:]
        if self.starts is not None:
            del self.starts[kept:]
            if self.starts[-1] == (kept - 1) * self.page_size:
                self.starts = None
        self.num_tokens = length
        # A tail page that was given back takes no tokens.
        self.room = 0 if kept == self.num_freed else self.page_size - self.tail_tokens
        self.settle_room()
        self.touch()

    def settle_room(self) -> None:
        """Have no room in a tail page that takes no more tokens."""
        if self.room and self.allocator is not None and self.ids[-1] in self.allocator.sealed:
            self.room = 0

    def check_allocator(self, function: str, allocator: PageAllocator) -> None:
        """Refuse an allocator that the pages do not come from, or cannot."""
        if not isinstance(allocator, PageAllocator):
            fail(function, "allocator must be a PageAllocator", kind_of(allocator))
        if allocator is not self.allocator and self.allocator is not None:
            must = "allocator must be the one that the table's pages came from"
            fail(function, must, repr(allocator))
        if allocator.page_size != self.page_size:
            must = f"allocator.page_size must be {self.page_size}, as the table's"
            fail(function, must, allocator.page_size)
