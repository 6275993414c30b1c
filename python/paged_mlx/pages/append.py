"""Making room for new tokens, for one sequence or a batch: plan, then do.

The plan counts the pages that all sequences need together, those for copies of shared tail
pages included; they are taken at once or not at all, and only then do the page maps change.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from paged_mlx.errors import OutOfPages, fail, kind_of, whole_number
from paged_mlx.pages.allocator import PageAllocator
from paged_mlx.pages.page_map import PageMap, new_version


@dataclass(frozen=True, slots=True)
class Appended:
    """The result of an append.

    Attributes:
        slots: ``int32 [tokens]``, where to write each new token, in order.
        copies: ``(source, target)`` page ids that the attached pools have copied.
    """

    slots: np.ndarray
    copies: list[tuple[int, int]]


def append(
    maps: Sequence[PageMap],
    num_tokens: Sequence[int],
    allocator: PageAllocator,
    function: str = "append_tokens",
) -> Appended:
    """Append ``num_tokens[i]`` tokens to ``maps[i]``, to all or to none; see ``append_batch``.

    Args:
        function: Whose name errors give.
    """
    counts = _checked_counts(function, num_tokens, len(maps))
    if not isinstance(allocator, PageAllocator):
        fail(function, "allocator must be a PageAllocator", kind_of(allocator))
    if allocator.sealed:
        for pages in maps:
            pages.settle_room()
    slots = _one_each_in_place(maps, counts, allocator)
    if slots is not None:
        if allocator.appends:
            allocator.appended(slots)
        return Appended(slots, [])
    if allocator.appends:
        allocator.before_append([pages.ids[-1] for pages in maps if pages.room])
    needs, num_new = _new_pages(function, maps, counts, allocator)
    rows = _shared_tails(maps, counts, allocator)
    copies: list[tuple[int, int]] = []
    page_ids: list[int] = []
    if rows or num_new:
        rows, page_ids = _take_pages(function, maps, counts, rows, num_new, allocator)
        if allocator.appends:
            _reserve(maps, counts, len(rows), page_ids, allocator)
        copies = _own_tails(maps, rows, page_ids, num_new, allocator)
    starts: list[int] = []  # of runs of slots, and
    lengths: list[int] = []
    for pages, count, need in zip(maps, counts, needs):
        if count:
            pages.allocator = allocator
            _extend(pages, count, page_ids[:need], starts, lengths)
            del page_ids[:need]
    slots = _joined(starts, lengths)
    if allocator.appends:
        allocator.appended(slots)
    return Appended(slots, copies)


def _checked_counts(function: str, num_tokens: Sequence[int], num_maps: int) -> list[int]:
    try:
        counts = list(num_tokens)
    except (TypeError, ValueError):  # ValueError: an mx.array without a dimension
        fail(function, "num_tokens must be a sequence of counts", kind_of(num_tokens))
    if len(counts) != num_maps:
        must = f"num_tokens must have one count per table, {num_maps}"
        fail(function, must, len(counts))
    for index, count in enumerate(counts):
        if type(count) is not int or count < 0:
            counts[index] = whole_number(function, "num_tokens", count)
    return counts


def _one_each_in_place(
    maps: Sequence[PageMap], counts: list[int], allocator: PageAllocator
) -> np.ndarray | None:
    """Append one token to each where that takes no page, as most steps of decoding do.

    Returns:
        The slots. None: it is not so simple, and nothing has changed.
    """
    if counts.count(1) < len(counts) or len(set(map(id, maps))) < len(maps):
        return None
    for pages in maps:
        if not pages.room or pages.allocator is not allocator:
            return None
        if allocator.counts[pages.ids[-1]] > 1:
            return None
    slots = []
    for pages in maps:
        slots.append((pages.ids[-1] + 1) * pages.page_size - pages.room)
        pages.num_tokens += 1
        pages.version = new_version()
        pages.room -= 1
    return np.array(slots, np.int32)


def _new_pages(
    function: str, maps: Sequence[PageMap], counts: list[int], allocator: PageAllocator
) -> tuple[list[int], int]:
    """Return how many pages each needs beyond its tail page, and their sum; check the maps."""
    if len(set(map(id, maps))) < len(maps):
        fail(function, "tables must be different ones", "one twice")
    needs = []
    for pages, count in zip(maps, counts):
        if pages.allocator is not allocator:
            pages.check_allocator(function, allocator)
        missing = count - pages.room
        needs.append(-(-missing // pages.page_size) if missing > 0 else 0)
    return needs, sum(needs)


def _shared_tails(
    maps: Sequence[PageMap], counts: list[int], allocator: PageAllocator
) -> list[int]:
    """Return the rows that would write to a tail page others hold too.

    Of several rows that share one, the last has nobody left to copy for.
    """
    rows: list[int] = []
    leaving: dict[int, int] = {}
    for row, (pages, count) in enumerate(zip(maps, counts)):
        if count and pages.room:
            tail = pages.ids[-1]
            if allocator.counts[tail] - leaving.get(tail, 0) > 1:
                rows.append(row)
                leaving[tail] = leaving.get(tail, 0) + 1
    return rows


def _take_pages(
    function: str,
    maps: Sequence[PageMap],
    counts: list[int],
    rows: list[int],
    num_new: int,
    allocator: PageAllocator,
) -> tuple[list[int], list[int]]:
    """Take ``num_new`` pages and one for each of ``rows`` to copy to, or none at all.

    Returns:
        The rows that copy still, fewer where caches have let go of their tail pages meanwhile,
        and the pages. A fresh pool's lower ids are the new pages, those to copy to follow.
    """
    page_ids = allocator.allocate_pages(len(rows) + num_new)
    if page_ids is None and rows:
        excess = len(rows) + num_new - allocator.num_available
        _own_cached_tails([maps[row].ids[-1] for row in rows], excess, allocator)
        rows = _shared_tails(maps, counts, allocator)
        page_ids = allocator.allocate_pages(len(rows) + num_new)
    if page_ids is None:
        fail(
            function,
            f"the pool must have {len(rows) + num_new} pages to give, {len(rows)} of them "
            "for copies",
            f"{allocator.num_available} of {allocator.total_pages}: release tables, or grow the pool",
            OutOfPages,
        )
    if rows and allocator.evictors.held:  # a cache may have given up a tail page just now
        rows = _shared_tails(maps, counts, allocator)
        for page_id in page_ids[num_new + len(rows) :]:
            allocator.free_page(page_id)
    return rows, page_ids[: num_new + len(rows)]


def _own_cached_tails(tails: list[int], excess: int, allocator: PageAllocator) -> None:
    """Save ``excess`` copies by having caches let go of tail pages that nobody else holds.

    A tail is listed once for each copy. Nothing changes when too few can be saved.
    """
    cached = [
        tail
        for tail in dict.fromkeys(tails)
        if tail in allocator.evictors.held and allocator.counts[tail] == tails.count(tail) + 1
    ]
    if len(cached) >= excess:
        allocator.evictors.forget(cached[:excess])


def _reserve(
    maps: Sequence[PageMap],
    counts: list[int],
    num_copies: int,
    page_ids: list[int],
    allocator: PageAllocator,
) -> None:
    """Have room for the pages that will be part-filled; if there is none, give all pages back."""
    left = [count - pages.room for pages, count in zip(maps, counts)]
    part_filled = sum(1 for pages, more in zip(maps, left) if more > 0 and more % pages.page_size)
    try:
        allocator.reserve(part_filled + num_copies)
    except BaseException:
        allocator.free_pages(page_ids)
        raise


def _own_tails(
    maps: Sequence[PageMap],
    rows: list[int],
    page_ids: list[int],
    num_new: int,
    allocator: PageAllocator,
) -> list[tuple[int, int]]:
    """Give each of ``rows`` a copy of its tail page; if a pool cannot copy, give all pages back."""
    copies = []
    for row, target in zip(rows, page_ids[num_new:]):
        copies.append((maps[row].ids[-1], target))
    try:
        allocator.copy_pages(copies)
    except BaseException:
        allocator.free_pages(page_ids)
        raise
    for row, (source, target) in zip(rows, copies):
        maps[row].ids[-1] = target
        maps[row].version = maps[row].ids_version = new_version()
        allocator.free_page(source)
    return copies


def _extend(
    pages: PageMap, count: int, new: list[int], starts: list[int], lengths: list[int]
) -> None:
    """Append ``count`` tokens, on the tail page as far as it takes them and on the ``new`` pages.

    Their slots, a run in each page, are added to ``starts`` and ``lengths``.
    """
    size, room, old = pages.page_size, pages.room, len(pages.ids)
    if room:
        starts.append((pages.ids[-1] + 1) * size - room)
        lengths.append(min(room, count))
    if new:
        first = pages.num_tokens + room  # position of the first new page
        if pages.starts is None and first < old * size:  # the tail page is sealed part-filled
            pages.starts = array("i", range(0, old * size, size))
        if pages.starts is not None:
            pages.starts.extend(range(first, first + len(new) * size, size))
        pages.ids.extend(new)
        pages.ids_version = new_version()
        for page_id in new:
            starts.append(page_id * size)
        lengths.extend([size] * (len(new) - 1))
        lengths.append(count - room - (len(new) - 1) * size)
    pages.num_tokens += count
    pages.version = new_version()
    pages.room = room + len(new) * size - count


def _joined(starts: list[int], lengths: list[int]) -> np.ndarray:
    """Return the slots of runs, one after the other."""
    slots = np.array(starts, np.int32)
    if len(lengths) == sum(lengths):
        return slots
    ends = np.cumsum(lengths, dtype=np.int32)
    slots = np.repeat(slots - ends + lengths, lengths)
    return (slots + np.arange(len(slots))).astype(np.int32, copy=False)
