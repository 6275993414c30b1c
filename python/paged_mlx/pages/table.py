"""One sequence's pages: from logical positions to page ids.

A table holds one reference to each of its pages. Entry i covers positions
``[i * page_size, (i + 1) * page_size)`` unless the table is *ragged*: a sealed page may be
left part-filled in the middle of a sequence. Entries behind a sliding window that were
given back keep their place and hold NO_PAGE.

Every change is planned first and done second, so a call that raises has changed nothing.
"""

from __future__ import annotations

import itertools
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from paged_mlx.errors import fail, whole_number
from paged_mlx.pages.allocator import PageAllocator
from paged_mlx.pages.append import AppendPlan, append_batch
from paged_mlx.pages.sharing import copy_on_write, share_prefix

if TYPE_CHECKING:
    from paged_mlx.pages.token_hash import Trail

__all__ = ["NO_PAGE", "PageTable", "PageTableEntry", "copy_on_write", "share_prefix"]

NO_PAGE = -1

_versions = itertools.count(1)


@dataclass(frozen=True, slots=True)
class PageTableEntry:
    """Positions ``[logical_start, logical_end)`` lie in one page, from its first slot on.

    ``is_cow``: somebody else holds the page too, so a write to it copies it first.
    """

    logical_start: int
    logical_end: int
    physical_page_id: int
    is_cow: bool


class PageTable:
    """The page table of one sequence, empty at first.

    A table belongs to one allocator from its first page until it is released.

    Attributes:
        trail: The tokens, where a canary has been told them; see ``Canary.note``.
    """

    trail: Trail | None

    def __init__(self, page_size: int) -> None:
        self._page_size = whole_number("PageTable", "page_size", page_size, 1)
        self._allocator: PageAllocator | None = None
        self._clear()

    def _clear(self) -> None:
        self._pages = array("i")
        self._starts: array[int] | None = None  # of every entry, when ragged
        self._num_tokens = 0
        self._num_freed = 0  # leading entries that hold NO_PAGE
        self._sealed = False
        self.trail = None
        self._touch()

    def _touch(self) -> None:
        """Name the new content of the entries; equal versions mean equal entries."""
        self._version = next(_versions)

    # Reading.

    @property
    def page_size(self) -> int:
        """Tokens in a page."""
        return self._page_size

    @property
    def num_tokens(self) -> int:
        """Positions in the table, those behind a window included."""
        return self._num_tokens

    @property
    def num_pages(self) -> int:
        """Pages that the table holds."""
        return len(self._pages) - self._num_freed

    @property
    def num_freed(self) -> int:
        """Leading entries whose pages were given back by ``free_before``."""
        return self._num_freed

    @property
    def page_ids(self) -> list[int]:
        """The pages held, in logical order."""
        return self._pages[self._num_freed :].tolist()

    @property
    def allocator(self) -> PageAllocator | None:
        """The allocator of the pages; None while there are none."""
        return self._allocator

    @property
    def is_ragged(self) -> bool:
        """Whether a page before the last is part-filled."""
        return self._starts is not None

    @property
    def is_sealed(self) -> bool:
        """Whether the next token starts a new page whatever the tail page has room for."""
        return self._sealed

    @property
    def entries(self) -> list[PageTableEntry]:
        """The entries that hold a page, in logical order; a snapshot."""
        if self._allocator is None:
            return []
        held = self._pages[self._num_freed :]
        shared = (self._allocator.ref_counts(held) > 1).tolist()
        starts = [self._start(index) for index in range(self._num_freed, len(self._pages))]
        ends = [*starts[1:], self._num_tokens]
        return [PageTableEntry(*entry) for entry in zip(starts, ends, held, shared)]

    def __len__(self) -> int:
        return self._num_tokens

    def __repr__(self) -> str:
        return f"PageTable(num_tokens={self._num_tokens}, page_ids={self.page_ids})"

    def logical_to_physical(self, logical_pos: int) -> tuple[int, int]:
        """Return ``(page_id, offset)`` of a position; O(1), or O(log) in a ragged table.

        Raises:
            ValueError: The position is not in the table, or its page was given back.
        """
        index, offset = self._locate("logical_to_physical", logical_pos)
        return self._pages[index], offset

    def slots(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return the slots of positions ``[start, stop)``, ``int32``.

        Raises:
            ValueError: A position is not in the table, or its page was given back.
        """
        stop = self._num_tokens if stop is None else stop
        if not 0 <= start <= stop <= self._num_tokens:
            fail(
                "slots",
                f"start and stop must lie in order in [0, {self._num_tokens}]",
                f"{start} and {stop}",
            )
        if start == stop:
            return np.empty(0, np.int32)
        self._locate("slots", start)
        positions = np.arange(start, stop, dtype=np.int32)
        if self._starts is None:
            index = positions // self._page_size
            offset = positions - index * self._page_size
        else:
            starts = np.array(self._starts, np.int32)
            index = np.searchsorted(starts, positions, side="right") - 1
            offset = positions - starts[index]
        return np.array(self._pages, np.int32)[index] * np.int32(self._page_size) + offset

    def leading_pages(self, num_tokens: int, tail: bool = False) -> list[int]:
        """Return the pages of entries i = 0, 1, ... that are full of ``[0, num_tokens)``, as
        long as entry i covers ``[i * page_size, (i + 1) * page_size)``; NO_PAGE if given back.

        ``tail``: the page too that the rest of the tokens begins, unless the table is ragged.
        """
        num_tokens = min(num_tokens, self._num_tokens)
        count = num_tokens // self._page_size
        if self._starts is None:
            count += tail and num_tokens % self._page_size > 0
        else:
            uniform = (
                start == i * self._page_size
                for i, start in enumerate(self._starts[1 : count + 1], 1)
            )
            count = min(count, sum(itertools.takewhile(bool, uniform)))
        return self._pages[:count].tolist()

    def _start(self, index: int) -> int:
        return index * self._page_size if self._starts is None else self._starts[index]

    def _locate(self, function: str, logical_pos: int) -> tuple[int, int]:
        if type(logical_pos) is not int:
            logical_pos = whole_number(function, "logical_pos", logical_pos)
        if not 0 <= logical_pos < self._num_tokens:
            fail(
                function,
                f"logical_pos must be in [0, {self._num_tokens}), the tokens of the table",
                logical_pos,
            )
        if self._starts is None:
            index, offset = divmod(logical_pos, self._page_size)
        else:
            index = bisect_right(self._starts, logical_pos) - 1
            offset = logical_pos - self._starts[index]
        if index < self._num_freed:
            fail(
                function,
                f"logical_pos must be at least {self._first_kept()}, because "
                "the pages before were given back",
                logical_pos,
            )
        return index, offset

    def _first_kept(self) -> int:
        """The first position whose page is held; num_tokens when none is."""
        return (
            self._start(self._num_freed) if self._num_freed < len(self._pages) else self._num_tokens
        )

    def _tail_len(self) -> int:
        """Tokens in the last page; page_size when there is none, so there is no room."""
        return (
            self._num_tokens - self._start(len(self._pages) - 1) if self._pages else self._page_size
        )

    def _room(self) -> int:
        """Tokens that the tail page can still take."""
        return 0 if self._sealed or not self._pages else self._page_size - self._tail_len()

    # Changing.

    def append_tokens(self, num_tokens: int, allocator: PageAllocator) -> AppendPlan:
        """Make room for ``num_tokens`` more tokens at the end.

        A part-filled tail page that others hold too is copied first, unless it is sealed.

        Raises:
            OutOfPages: The allocator has too few pages; nothing has changed, anywhere.
            ValueError: The allocator is not the table's, or has another page size.
        """
        return append_batch([self], [num_tokens], allocator)

    def truncate(self, length: int) -> None:
        """Forget the tokens at ``[length, num_tokens)`` and give back pages without any left.

        Raises:
            ValueError: ``length`` is past the end, or before a page that was given back.
        """
        length = whole_number("truncate", "length", length)
        if length > self._num_tokens:
            fail(
                "truncate",
                f"length must be at most {self._num_tokens}, the tokens of the table",
                length,
            )
        if length == self._num_tokens:
            return
        if not length:
            return self._drop_all()
        if length < self._first_kept():
            fail(
                "truncate",
                f"length must be 0 or at least {self._first_kept()}, because "
                "the pages before were given back",
                length,
            )
        kept = self._entries_covering(length)
        self._give_back(kept, len(self._pages))
        del self._pages[kept:]
        if self._starts is not None:
            del self._starts[kept:]
            if self._starts[-1] == (kept - 1) * self._page_size:
                self._starts = None
        self._num_tokens = length
        self._sealed = kept == self._num_freed  # a tail that was given back takes no tokens
        if self.trail is not None:
            self.trail.truncate(length)
        self._touch()

    def fork(self) -> PageTable:
        """Return a table of the same tokens on the same pages; no bytes move."""
        if self._allocator is not None:
            self._allocator.share_pages(self._pages[self._num_freed :])
        child = PageTable.__new__(PageTable)
        child._page_size = self._page_size
        child._allocator = self._allocator
        child._pages = self._pages[:]
        child._starts = None if self._starts is None else self._starts[:]
        child._num_tokens = self._num_tokens
        child._num_freed = self._num_freed
        child._sealed = self._sealed
        child._version = self._version
        child.trail = None if self.trail is None else self.trail.fork()
        return child

    def skip(self, num_tokens: int, allocator: PageAllocator) -> None:
        """Begin an empty table with ``num_tokens`` positions behind a window, without pages.

        Raises:
            ValueError: The table is not empty, or ``num_tokens`` is not of full pages.
        """
        num_tokens = whole_number("skip", "num_tokens", num_tokens)
        if self._num_tokens:
            fail("skip", "table must be empty", f"{self._num_tokens} tokens")
        if num_tokens % self._page_size:
            fail("skip", f"num_tokens must be a multiple of {self._page_size}", num_tokens)
        self._check_allocator("skip", allocator)
        if num_tokens:
            self._adopt([NO_PAGE] * (num_tokens // self._page_size), num_tokens, allocator)

    def release(self) -> None:
        """Give back every page; the table is empty and belongs to no allocator."""
        self._drop_all()
        self._allocator = None

    def seal(self) -> None:
        """Leave the tail page as it is for good: the next token starts a new page."""
        self._sealed = True

    def free_before(self, position: int) -> int:
        """Give back the pages whose tokens all lie before ``position``.

        Positions keep their numbers. A part-filled tail page stays.

        Returns:
            Pages given back.
        """
        position = whole_number("free_before", "position", position)
        if position > self._num_tokens:
            fail(
                "free_before",
                f"position must be at most {self._num_tokens}, the tokens of the table",
                position,
            )
        first = self._num_freed
        end = self._entries_ending_by(position)
        if end <= first:
            return 0
        self._give_back(first, end)
        for index in range(first, end):
            self._pages[index] = NO_PAGE
        self._num_freed = end
        self._touch()
        return end - first

    def _entries_covering(self, length: int) -> int:
        """Entries that positions [0, length) touch."""
        if self._starts is None:
            return -(-length // self._page_size)
        return bisect_right(self._starts, length - 1)

    def _entries_ending_by(self, position: int) -> int:
        """Leading entries without a token at ``position`` or later, nor room for one."""
        if position == self._num_tokens and self._tail_len() == self._page_size:
            return len(self._pages)
        return (
            position // self._page_size
            if self._starts is None
            else max(0, bisect_right(self._starts, position) - 1)
        )

    def _give_back(self, first: int, end: int) -> None:
        """Release entries [first, end), the last one first."""
        first = max(first, self._num_freed)
        if end > first:
            self._allocator.free_pages(self._pages[first:end][::-1])

    def _drop_all(self) -> None:
        self._give_back(0, len(self._pages))
        self._clear()

    def _check_allocator(self, function: str, allocator: PageAllocator) -> None:
        if allocator is not self._allocator and self._allocator is not None:
            fail(
                function,
                "allocator must be the one that the table's pages came from",
                repr(allocator),
            )
        if allocator.page_size != self._page_size:
            fail(
                function,
                f"allocator.page_size must be {self._page_size}, as the table's",
                allocator.page_size,
            )

    def _replace(self, index: int, page_id: int) -> None:
        """Put a page of ours in an entry's place and give the old one back."""
        old = self._pages[index]
        self._pages[index] = page_id
        self._touch()
        self._allocator.free_page(old)

    def _adopt(self, page_ids: Sequence[int], num_tokens: int, allocator: PageAllocator) -> None:
        """Fill an empty table with pages that somebody holds, sharing them.

        The first of ``page_ids`` may be NO_PAGE: those behind a window.
        """
        num_freed = sum(itertools.takewhile(bool, (page_id == NO_PAGE for page_id in page_ids)))
        allocator.share_pages(page_ids[num_freed:])
        self._clear()
        self._allocator = allocator
        self._pages.extend(page_ids)
        self._num_freed = num_freed
        self._num_tokens = num_tokens

    def _extend(self, num_tokens: int, page_ids: list[int]) -> np.ndarray | int:
        """Append tokens on the tail page and ``page_ids``; return their slots."""
        size, tail_len, index = self._page_size, self._tail_len(), len(self._pages) - 1
        if self._sealed and num_tokens:
            if tail_len < size and self._starts is None:
                self._starts = array("i", range(0, len(self._pages) * size, size))
            self._sealed, tail_len = False, size
        if page_ids:
            if self._starts is not None:
                first = self._num_tokens + size - tail_len
                self._starts.extend(range(first, first + len(page_ids) * size, size))
            self._pages.extend(page_ids)
            self._touch()
        self._num_tokens += num_tokens
        if num_tokens == 1:
            return self._pages[-1] * size + (0 if page_ids else tail_len)
        run = np.array(self._pages[max(index, 0) :], np.int32) * np.int32(size)
        first = tail_len if index >= 0 else 0
        return (run[:, None] + np.arange(size, dtype=np.int32)).ravel()[first : first + num_tokens]
