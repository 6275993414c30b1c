"""Page tables: one sequence's pages, and how two sequences come to share them, or stop to.

A table holds one reference to each of its pages. Every change is planned first and done
second, so a call that raises has changed nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from paged_mlx.errors import OutOfPages, as_list, check_flag, fail, kind_of, whole_number
from paged_mlx.pages.allocator import MAX_SLOTS, PageAllocator
from paged_mlx.pages.append import Appended, append
from paged_mlx.pages.page_map import NO_PAGE, PageMap, PageTableEntry
from paged_mlx.pages.token_hash import RollingHash


class PageTable:
    """The page table of one sequence, empty at first.

    A table belongs to one allocator from its first page until it is released, and no page
    stands in it twice.

    Examples:
        >>> import paged_mlx
        >>> allocator = paged_mlx.PageAllocator(total_pages=64, page_size=16)
        >>> table = paged_mlx.PageTable(page_size=16)
        >>> table.append_tokens(20, allocator).slots[-4:].tolist()
        [16, 17, 18, 19]
        >>> table.logical_to_physical(17)
        (1, 1)
        >>> table
        PageTable(20 tokens in pages [0, 1])

    Args:
        page_size: Tokens in a page.

    Attributes:
        map: Which page covers which position; for reading only.
        token_hash: The tokens, where a canary has been told them; see ``Canary.note``.
    """

    def __init__(self, page_size: int) -> None:
        size = whole_number("PageTable", "page_size", page_size, 1)
        if size > MAX_SLOTS:
            must = f"page_size must be at most {MAX_SLOTS}, because a slot is an int32"
            fail("PageTable", must, size)
        self.map = PageMap(size)
        self.token_hash: RollingHash | None = None

    # Reading.

    @property
    def page_size(self) -> int:
        """Tokens in a page."""
        return self.map.page_size

    @property
    def num_tokens(self) -> int:
        """Positions in the table, those behind a window included."""
        return self.map.num_tokens

    @property
    def num_pages(self) -> int:
        """Pages that the table holds."""
        return len(self.map.ids) - self.map.num_freed

    @property
    def num_freed(self) -> int:
        """Leading entries whose pages were given back by ``free_before``."""
        return self.map.num_freed

    @property
    def page_ids(self) -> list[int]:
        """The pages held, in logical order."""
        return self.map.held.tolist()

    @property
    def allocator(self) -> PageAllocator | None:
        """The allocator of the pages; None while there are none."""
        return self.map.allocator

    @property
    def is_ragged(self) -> bool:
        """Whether a page before the last is part-filled."""
        return self.map.starts is not None

    @property
    def is_sealed(self) -> bool:
        """Whether the tail page is part-filled and takes no more tokens."""
        self.map.settle_room()
        return not self.map.room and self.map.tail_tokens < self.map.page_size

    @property
    def entries(self) -> list[PageTableEntry]:
        """The entries that hold a page, in logical order; a snapshot."""
        return self.map.entries()

    def __len__(self) -> int:
        return self.map.num_tokens

    def __repr__(self) -> str:
        notes = f", {self.num_freed} given back" if self.num_freed else ""
        notes += ", ragged" if self.is_ragged else ""
        notes += ", sealed" if self.is_sealed else ""
        return f"PageTable({self.num_tokens} tokens in pages {self.page_ids}{notes})"

    def logical_to_physical(self, logical_pos: int) -> tuple[int, int]:
        """Return ``(page_id, offset)`` of a position; O(1), or O(log) in a ragged table.

        Raises:
            ValueError: The position is not in the table, or its page was given back.
        """
        entry, offset = self.map.locate("logical_to_physical", logical_pos)
        return self.map.ids[entry], offset

    def slots(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return the slots of positions ``[start, stop)``, ``int32``.

        Raises:
            ValueError: A position is not in the table, or its page was given back.
        """
        start = whole_number("slots", "start", start)
        stop = self.num_tokens if stop is None else whole_number("slots", "stop", stop)
        if not start <= stop <= self.num_tokens:
            must = f"start and stop must lie in order in [0, {self.num_tokens}]"
            fail("slots", must, f"{start} and {stop}")
        if start < stop:
            self.map.locate("slots", start)
        return self.map.slots(start, stop)

    def leading_pages(self, num_tokens: int, tail: bool = False) -> list[int]:
        """Return the pages of entries i = 0, 1, ... that are full of ``[0, num_tokens)``, as
        long as entry i covers ``[i * page_size, (i + 1) * page_size)``; NO_PAGE if given back.

        ``tail``: the page too that the rest of the tokens begins, unless the table is ragged.
        """
        pages, size = self.map, self.map.page_size
        num_tokens = min(whole_number("leading_pages", "num_tokens", num_tokens), self.num_tokens)
        tail = check_flag("leading_pages", "tail", tail)
        count = num_tokens // size
        if pages.starts is None:
            count += tail and num_tokens % size > 0
        else:
            uniform = (start == i * size for i, start in enumerate(pages.starts[1 : count + 1], 1))
            count = min(count, sum(itertools.takewhile(bool, uniform)))
        return pages.ids[:count].tolist()

    # Changing.

    def append_tokens(self, num_tokens: int, allocator: PageAllocator) -> Appended:
        """Make room for ``num_tokens`` more tokens at the end.

        A part-filled tail page that others hold too is copied first, unless it is sealed.

        Returns:
            The slots to write the tokens' K and V to, and the pages that were copied.

        Raises:
            OutOfPages: The allocator has too few pages; nothing has changed, anywhere.
            ValueError: The allocator is not the table's, or has another page size.
        """
        return append((self.map,), (num_tokens,), allocator)

    def adopt(self, page_ids: Sequence[int], num_tokens: int, allocator: PageAllocator) -> None:
        """Begin an empty table with pages that somebody holds, sharing them.

        Args:
            page_ids: Pages full of the tokens, the last one perhaps part-filled, each named
                once. The first may be NO_PAGE: those behind a window.
            num_tokens: Tokens in them.
            allocator: Owner of the pages.

        Raises:
            ValueError: The table is not empty, a page is free or named twice, or they are not
                as many as the tokens take.
        """
        num_tokens = whole_number("adopt", "num_tokens", num_tokens)
        if self.num_tokens:
            fail("adopt", "table must be empty", f"{self.num_tokens} tokens")
        self.map.check_allocator("adopt", allocator)
        pages = PageMap(self.page_size, allocator)
        page_ids = as_list("adopt", "page_ids", page_ids, "page ids")
        count = pages.num_covering(num_tokens)
        if len(page_ids) != count:
            fail("adopt", f"page_ids must be {count} pages for {num_tokens} tokens", len(page_ids))
        for page_id in page_ids:
            if type(page_id) is not int or page_id != NO_PAGE:
                break
            pages.num_freed += 1
        allocator.share_pages(page_ids[pages.num_freed :])
        pages.ids.extend(page_ids)
        pages.num_tokens = num_tokens
        if pages.num_freed < len(page_ids):
            pages.room = self.page_size - pages.tail_tokens
            pages.settle_room()
        self.map, self.token_hash = pages, None

    def skip(self, num_tokens: int, allocator: PageAllocator) -> None:
        """Begin an empty table with ``num_tokens`` positions behind a window, without pages.

        Raises:
            ValueError: The table is not empty, or ``num_tokens`` is not of full pages.
        """
        num_tokens = whole_number("skip", "num_tokens", num_tokens)
        if self.num_tokens:
            fail("skip", "table must be empty", f"{self.num_tokens} tokens")
        if num_tokens % self.page_size:
            fail("skip", f"num_tokens must be a multiple of {self.page_size}", num_tokens)
        self.map.check_allocator("skip", allocator)
        if num_tokens:
            self.adopt([NO_PAGE] * (num_tokens // self.page_size), num_tokens, allocator)

    def fork(self) -> PageTable:
        """Return a table of the same tokens on the same pages; no bytes move.

        A sealed tail page, pages given back and a canary's tokens are the fork's too.
        """
        if self.map.allocator is not None:
            self.map.allocator.share_pages(self.map.held)
        child = PageTable.__new__(PageTable)
        child.map = self.map.copy()
        child.token_hash = None if self.token_hash is None else self.token_hash.fork()
        return child

    def truncate(self, length: int) -> None:
        """Forget the tokens at ``[length, num_tokens)`` and give back pages without any left.

        Raises:
            ValueError: ``length`` is past the end, or before a page that was given back.
        """
        pages = self.map
        length = whole_number("truncate", "length", length)
        if length > pages.num_tokens:
            must = f"length must be at most {pages.num_tokens}, the tokens of the table"
            fail("truncate", must, length)
        if 0 < length < pages.first_held:
            must = (
                f"length must be 0 or at least {pages.first_held}, because the pages before "
                "were given back"
            )
            fail("truncate", must, length)
        if length == pages.num_tokens:
            return
        self._give_back(pages.num_covering(length), len(pages.ids))
        if length:
            pages.cut(length)
        else:
            pages.clear()
        if self.token_hash is not None:
            self.token_hash.truncate(length)

    def release(self) -> None:
        """Give back every page; the table is empty and belongs to no allocator."""
        self._give_back(0, len(self.map.ids))
        self.map.clear()
        self.map.allocator = self.token_hash = None

    def seal(self) -> None:
        """Leave the tail page as it is for good: the next token starts a new page."""
        self.map.room = 0

    def free_before(self, position: int) -> int:
        """Give back the pages whose tokens all lie before ``position``.

        Positions keep their numbers. A part-filled tail page stays.

        Returns:
            Pages given back.
        """
        pages = self.map
        position = whole_number("free_before", "position", position)
        if position > pages.num_tokens:
            must = f"position must be at most {pages.num_tokens}, the tokens of the table"
            fail("free_before", must, position)
        first, end = pages.num_freed, pages.num_done_by(position)
        if end <= first:
            return 0
        self._give_back(first, end)
        for entry in range(first, end):
            pages.ids[entry] = NO_PAGE
        pages.num_freed = end
        pages.touch()
        return end - first

    def _give_back(self, first: int, end: int) -> None:
        """Release the pages of entries [first, end), the last one first."""
        page_ids = self.map.ids[max(first, self.map.num_freed) : end]
        if page_ids and self.map.allocator is not None:
            self.map.allocator.free_pages(page_ids[::-1])


def maps_of(function: str, tables: Sequence[PageTable]) -> list[PageMap]:
    """Return the page maps of tables, for a function that names itself in the error."""
    maps = []
    try:
        tables = list(tables)
    except (TypeError, ValueError):  # ValueError: an mx.array without a dimension
        fail(function, "tables must be a list of PageTables", kind_of(tables))
    for table in tables:
        if not isinstance(table, PageTable):
            fail(function, "tables must be PageTables", kind_of(table))
        maps.append(table.map)
    return maps


def append_batch(
    tables: Sequence[PageTable], num_tokens: Sequence[int], allocator: PageAllocator
) -> Appended:
    """``append_tokens`` for a batch: all tables or none, one copy operation for all.

    Args:
        tables: Different tables of one allocator.
        num_tokens: New tokens of each.

    Returns:
        That of the whole batch: slots are those of the first table, then the second's.

    Raises:
        OutOfPages: There are too few pages for all; nothing has changed.
        ValueError: An argument is wrong.

    Examples:
        >>> allocator = PageAllocator(total_pages=8, page_size=4)
        >>> tables = [PageTable(page_size=4), PageTable(page_size=4)]
        >>> append_batch(tables, [5, 2], allocator).slots.tolist()
        [0, 1, 2, 3, 4, 8, 9]
    """
    return append(maps_of("append_batch", tables), num_tokens, allocator, "append_batch")


def share_prefix(
    source_table: PageTable, target_table: PageTable, prefix_length: int, partial: str = "copy"
) -> None:
    """Let an empty table begin with the first ``prefix_length`` tokens of another.

    Examples:
        >>> import paged_mlx
        >>> allocator = paged_mlx.PageAllocator(total_pages=64, page_size=4)
        >>> a, b = paged_mlx.PageTable(page_size=4), paged_mlx.PageTable(page_size=4)
        >>> appended = a.append_tokens(6, allocator)
        >>> paged_mlx.share_prefix(a, b, 6)
        >>> b.append_tokens(1, allocator).copies  # the first write to the shared page 1
        [(1, 2)]

    Args:
        source_table: Holds the tokens.
        target_table: Empty; shares the pages afterwards.
        prefix_length: Tokens to share.
        partial: Treatment of a page that the prefix fills in part. ``"copy"``: whoever
            writes to it first copies it, except its last holder. ``"seal"``: it stays
            shared for good, and the next token after the prefix starts a new page.

    Raises:
        ValueError: An argument is wrong, or the source gave back pages of the prefix.
    """
    name = "share_prefix"
    source, target = maps_of(name, (source_table, target_table))
    prefix_length = whole_number(name, "prefix_length", prefix_length)
    if not isinstance(partial, str) or partial not in ("copy", "seal"):
        fail(name, 'partial must be "copy" or "seal"', repr(partial))
    if prefix_length > source.num_tokens:
        must = f"prefix_length must be at most {source.num_tokens}, the tokens of the source"
        fail(name, must, prefix_length)
    if target.num_tokens or target is source:
        fail(name, "target_table must be empty and not the source", repr(target_table))
    if target.page_size != source.page_size:
        must = f"target_table.page_size must be {source.page_size}, as the source's"
        fail(name, must, target.page_size)
    if target.allocator not in (None, source.allocator):
        must = "target_table must belong to no allocator, or to the source's"
        fail(name, must, repr(target.allocator))
    if not prefix_length or source.allocator is None:
        return
    if source.num_freed:
        must = "source_table must hold its whole prefix"
        got = f"one whose pages before position {source.first_held} were given back"
        fail(name, must, got)
    prefix = source.copy()
    prefix.cut(prefix_length)
    source.allocator.share_pages(prefix.ids)
    target_table.map = prefix
    if source_table.token_hash is not None:
        target_table.token_hash = source_table.token_hash.fork(prefix_length)
    if partial == "seal" and prefix.room:
        target_table.seal()
        if source.num_tokens == prefix_length:
            source_table.seal()


def copy_on_write(page_table: PageTable, logical_pos: int, page_allocator: PageAllocator) -> bool:
    """Make the page of a position the table's own before it is written to.

    Returns:
        True when the page was shared and has been copied; False when the table is its
        last holder, who never copies.

    Raises:
        OutOfPages: There is no page to copy to; nothing has changed.
        ValueError: The position is not in the table, or the allocator is not its own.

    Examples:
        >>> allocator = PageAllocator(total_pages=8, page_size=4)
        >>> table = PageTable(page_size=4)
        >>> slots = table.append_tokens(6, allocator).slots
        >>> fork = table.fork()
        >>> copy_on_write(fork, 5, allocator), fork.page_ids, table.page_ids
        (True, [0, 2], [0, 1])
        >>> copy_on_write(table, 5, allocator)
        False
    """
    (pages,), allocator = maps_of("copy_on_write", (page_table,)), page_allocator
    pages.check_allocator("copy_on_write", allocator)
    entry, _ = pages.locate("copy_on_write", logical_pos)
    source = pages.ids[entry]
    if allocator.counts[source] == 1:
        return False
    target = allocator.allocate_page()
    if target is None:
        if allocator.counts[source] == 2 and source in allocator.evictors.held:
            allocator.evictors.forget([source])  # a cache, the only other holder, lets go
            return False
        must = "the pool must have a free page"
        fail("copy_on_write", must, f"0 of {allocator.total_pages}", OutOfPages)
    try:
        allocator.copy_pages([(source, target)])
    except BaseException:
        allocator.free_page(target)
        raise
    pages.ids[entry] = target
    pages.touch()
    allocator.free_page(source)
    return True
