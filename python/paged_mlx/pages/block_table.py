"""The page tables of a batch, packed for the kernel.

``pack`` builds the arrays once; ``BlockTable`` keeps them from step to step and rewrites
only the rows whose pages have changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from paged_mlx.errors import fail, kind_of, whole_number
from paged_mlx.pages.allocator import PageAllocator
from paged_mlx.pages.page_map import NO_PAGE, PageMap, new_version
from paged_mlx.pages.table import PageTable, maps_of


@dataclass(frozen=True, slots=True)
class PackedTables:
    """A batch as host arrays, all ``int32``.

    Attributes:
        block_tables: ``[batch, max_pages]``, page ids; NO_PAGE pads the rows and stands
            for pages behind a sliding window that were given back.
        context_lens: ``[batch]``, the tokens of each table.
        cu_seqlens_q: ``[batch + 1]``, where each sequence's query tokens begin; None when
            every sequence has one.
        page_starts: ``[batch, max_pages]``, the position of each entry's first token; None
            unless a table is ragged.
        page_lens: ``[batch, max_pages]``, the tokens in each entry; 0 in the padding.
        page_size: Tokens in a page of the tables.
        allocator: The allocator of the tables; None while none of them has a page.
        versions: Of each table's content; None of arrays that came from elsewhere.
    """

    block_tables: np.ndarray
    context_lens: np.ndarray
    cu_seqlens_q: np.ndarray | None = None
    page_starts: np.ndarray | None = None
    page_lens: np.ndarray | None = None
    page_size: int | None = None
    allocator: PageAllocator | None = None
    versions: list[int] | None = field(default=None, repr=False, compare=False)


def pack(tables: Sequence[PageTable], query_lens: Sequence[int] | None = None) -> PackedTables:
    """Pack a batch of page tables.

    Args:
        tables: One per sequence, at least one, all of one page size. The same table may
            appear twice.
        query_lens: Query tokens of each sequence, at most its context; default one each.

    Raises:
        ValueError: An argument is wrong.
    """
    return BlockTable().update(tables, query_lens)


class BlockTable:
    """Packs the same batch, or nearly the same, at every step.

    Rows whose pages are unchanged since the last ``update`` are not touched: a decode step
    rewrites one row in ``page_size``. The arrays of ``update`` are views of buffers that the
    next ``update`` changes; a plan has read them by then.

    Attributes:
        rows_written: Rows that the last ``update`` has rewritten.
    """

    def __init__(self) -> None:
        self._ids = np.full((0, 0), NO_PAGE, np.int32)
        self._versions: list[int] = []  # what each row of the buffer holds
        self._lens: list[int] = []  # entries of each row of the buffer
        self._last: tuple = ()  # what the last update packed, and its result
        self._tables: list = []  # which tables those were
        self._drawn = 0  # the version that was new then
        self.rows_written = 0

    def __repr__(self) -> str:
        rows, columns = len(self._versions), self._ids.shape[1]
        return f"BlockTable({rows} rows of {columns} pages, {self.rows_written} just written)"

    def update(
        self, tables: Sequence[PageTable], query_lens: Sequence[int] | None = None
    ) -> PackedTables:
        """Pack ``tables`` as ``pack`` does.

        Returns:
            Arrays that are valid until the next ``update`` of other contents; of the same
            contents, the same object again. ``block_tables`` may be wider than the longest
            table.
        """
        drawn, before = new_version(), self._drawn
        self._drawn = drawn
        is_repeated = drawn == before + 1 and query_lens is None and type(tables) is list
        if is_repeated and self._tables and tables == self._tables:
            self.rows_written = 0
            return self._last[1]
        self._tables = []
        try:
            versions = [table.map.version for table in tables]
        except (TypeError, AttributeError):
            maps_of("pack", tables)  # refuses, and says what is no table
            raise
        query_lens = None if query_lens is None else _whole_numbers(query_lens)
        content = versions, query_lens
        if self._last and self._last[0] == content:
            self.rows_written = 0
            self._tables = list(tables) if query_lens is None else []
            return self._last[1]
        maps = [table.map for table in tables]
        if not maps:
            must = "tables must have at least one table, because a batch of none has no shape"
            fail("pack", must, "0")
        known, size, allocator = self._versions, maps[0].page_size, None
        changed, width, ragged = [], 0, []
        for row, pages in enumerate(maps):
            if pages.page_size != size:
                must = f"tables must have one page_size, {size} as the first"
                fail("pack", must, pages.page_size)
            if pages.allocator is not allocator and pages.allocator is not None:
                if allocator is not None:
                    fail("pack", "tables must hold pages of one allocator", "tables of several")
                allocator = pages.allocator
            if pages.starts is not None:
                ragged.append(row)
            if row >= len(known) or known[row] != pages.ids_version:
                changed.append(row)
                width = max(width, len(pages.ids))
        context_lens = np.array([pages.num_tokens for pages in maps], np.int32)
        cu_seqlens = None if query_lens is None else _cu_seqlens(query_lens, context_lens)
        if changed:
            self._last = ()
            self._reserve(len(maps), width)
        for row in changed:
            self._write_row(row, maps[row])
        self.rows_written = len(changed)
        starts, lens = self._ragged(maps, ragged, context_lens) if ragged else (None, None)
        ids = self._ids[: len(maps)]
        packed = PackedTables(
            ids, context_lens, cu_seqlens, starts, lens, size, allocator, versions
        )
        self._last = content, packed
        self._tables = list(tables) if query_lens is None else []
        return packed

    def _reserve(self, batch: int, max_pages: int) -> None:
        """Make the buffer large enough, with room to grow; keep what it holds."""
        rows, columns = self._ids.shape
        if batch <= rows and max_pages <= columns:
            return
        rows = max(rows, batch)
        columns = max(columns, max_pages + max_pages // 4 if columns else max_pages, 1)
        grown = np.full((rows, columns), NO_PAGE, np.int32)
        grown[: self._ids.shape[0], : self._ids.shape[1]] = self._ids
        self._ids = grown

    def _write_row(self, row: int, pages: PageMap) -> None:
        if row == len(self._versions):
            self._versions.append(0)
            self._lens.append(0)
        count = len(pages.ids)
        target = self._ids[row]
        if count:
            target[:count] = np.frombuffer(pages.ids, np.int32)
        if count < self._lens[row]:
            target[count : self._lens[row]] = NO_PAGE
        self._versions[row], self._lens[row] = pages.ids_version, count

    def _ragged(
        self, maps: Sequence[PageMap], ragged: Sequence[int], context_lens: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return page_starts and page_lens; ``ragged``: the rows that have starts of their own."""
        size, width = maps[0].page_size, self._ids.shape[1]
        starts = np.arange(0, width * size, size, dtype=np.int64)
        starts = np.minimum(starts, context_lens[:, None]).astype(np.int32)
        for row in ragged:
            starts[row, : len(maps[row].ids)] = maps[row].starts
        lens = np.diff(starts, axis=1, append=context_lens[:, None])
        return starts, lens.astype(np.int32, copy=False)


def _whole_numbers(query_lens: Sequence[int]) -> list[int]:
    try:
        lens = list(query_lens)
    except (TypeError, ValueError):  # ValueError: an mx.array without a dimension
        fail("pack", "query_lens must be a sequence of lengths", kind_of(query_lens))
    return [whole_number("pack", "query_lens", length) for length in lens]


def _cu_seqlens(query_lens: list[int], context_lens: np.ndarray) -> np.ndarray:
    lens = np.array(query_lens)
    if len(lens) != len(context_lens):
        fail("pack", f"query_lens must have one length per table, {len(context_lens)}", len(lens))
    if (lens > context_lens).any():
        row = int(np.argmax(lens > context_lens))
        fail(
            "pack",
            "query_lens must be at most the context, which includes the query",
            f"{lens[row]} of {context_lens[row]} in row {row}",
        )
    return np.concatenate([[0], np.cumsum(lens)]).astype(np.int32)
