"""Making room for new tokens, for one table or a batch: plan, then do.

The plan counts the pages that all tables need together, those for copies of shared tail
pages included; they are taken at once or not at all, and only then do the tables change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from paged_mlx.errors import OutOfPages, fail, whole_number
from paged_mlx.pages.allocator import PageAllocator

if TYPE_CHECKING:
    from paged_mlx.pages.table import PageTable


@dataclass(frozen=True, slots=True)
class AppendPlan:
    """What an append has decided.

    Attributes:
        copies: ``(source, target)`` page ids, announced to the attached pools already.
        slots: ``int32 [tokens]``, the slot of each new token, in order.
    """

    copies: list[tuple[int, int]]
    slots: np.ndarray


def append_batch(
    tables: Sequence[PageTable], num_tokens: Sequence[int], allocator: PageAllocator
) -> AppendPlan:
    """``append_tokens`` for a batch: all tables or none, one copy operation for all.

    Args:
        tables: Different tables of one allocator.
        num_tokens: New tokens of each.

    Returns:
        The plan of the whole batch: slots are those of the first table, then the second's.

    Raises:
        OutOfPages: There are too few pages for all; nothing has changed.
        ValueError: An argument is wrong.
    """
    counts = [
        count
        if type(count) is int and count >= 0
        else whole_number("append_tokens", "num_tokens", count)
        for count in num_tokens
    ]
    slots = _one_each_in_place(tables, counts, allocator)
    if slots is not None:
        return AppendPlan([], slots)
    needs = _new_pages(tables, counts, allocator)
    copied = _shared_tails(tables, counts, allocator)
    copies, page_ids = [], []
    if copied or any(needs):
        copies, page_ids = _make_room(tables, counts, copied, sum(needs), allocator)
    runs: list[np.ndarray | int] = []
    first = 0
    for table, count, need in zip(tables, counts, needs):
        if count:
            table._allocator = allocator
        runs.append(table._extend(count, page_ids[first : first + need] if need else []))
        first += need
    return AppendPlan(copies, _joined(runs))


def _one_each_in_place(
    tables: Sequence[PageTable], counts: list[int], allocator: PageAllocator
) -> np.ndarray | None:
    """Append one token to each table where that takes no page, as most steps of decoding do.

    Returns:
        The slots. None: it is not so simple, and nothing has changed.
    """
    if len(counts) != len(tables) or len(set(map(id, tables))) < len(tables):
        return None
    for table, count in zip(tables, counts):
        if count != 1 or table._allocator is not allocator or not table._room():
            return None
        if allocator.ref_count(table._pages[-1]) > 1:
            return None
    return np.array([table._extend(1, []) for table in tables], np.int32)


def _make_room(
    tables: Sequence[PageTable],
    counts: list[int],
    copied: list[int],
    num_new: int,
    allocator: PageAllocator,
) -> tuple[list[tuple[int, int]], list[int]]:
    """Give the rows in ``copied`` tail pages of their own; return the copies and new pages.

    All or nothing.
    """
    if copied and len(copied) + num_new > allocator.num_available:
        excess = len(copied) + num_new - allocator.num_available
        _own_cached_tails([tables[row]._pages[-1] for row in copied], excess, allocator)
        copied = _shared_tails(tables, counts, allocator)
    targets, page_ids = _take_pages(len(copied), num_new, allocator)
    still = _shared_tails(tables, counts, allocator) if copied else copied
    if len(still) < len(copied):  # an eviction has made a table its tail's last holder
        allocator.free_pages(targets[len(still) :])
        targets = targets[: len(still)]
    copies = [(tables[row]._pages[-1], target) for row, target in zip(still, targets)]
    _announce(copies, targets + page_ids, allocator)
    for row, target in zip(still, targets):
        tables[row]._replace(-1, target)
    return copies, page_ids


def _new_pages(
    tables: Sequence[PageTable], counts: list[int], allocator: PageAllocator
) -> list[int]:
    """Return how many pages each table needs beyond its tail page; check the arguments."""
    if len(tables) != len(counts):
        fail(
            "append_tokens", f"num_tokens must have one count per table, {len(tables)}", len(counts)
        )
    if len(tables) > 1 and len(set(map(id, tables))) < len(tables):
        fail("append_tokens", "tables must be different ones", "one twice")
    size = allocator.page_size
    needs = []
    for table, count in zip(tables, counts):
        if table._allocator is not allocator or table._page_size != size:
            table._check_allocator("append_tokens", allocator)
        missing = count - table._room()
        needs.append(-(-missing // size) if missing > 0 else 0)
    return needs


def _shared_tails(
    tables: Sequence[PageTable], counts: list[int], allocator: PageAllocator
) -> list[int]:
    """Return the rows that would write to a tail page others hold too.

    Of several rows that share one, the last has nobody left to copy for.
    """
    rows: list[int] = []
    leaving: dict[int, int] = {}
    for row, (table, count) in enumerate(zip(tables, counts)):
        if count and table._room():
            tail = table._pages[-1]
            if allocator.ref_count(tail) - leaving.get(tail, 0) > 1:
                rows.append(row)
                leaving[tail] = leaving.get(tail, 0) + 1
    return rows


def _own_cached_tails(tails: list[int], excess: int, allocator: PageAllocator) -> None:
    """Save ``excess`` copies by having caches let go of tail pages that nobody else holds.

    A tail is listed once for each copy. Nothing changes when too few can be saved.
    """
    cached = [
        tail
        for tail in dict.fromkeys(tails)
        if allocator.is_watched(tail) and allocator.ref_count(tail) == tails.count(tail) + 1
    ]
    if len(cached) >= excess:
        allocator.forget_pages(cached[:excess])


def _take_pages(
    num_copies: int, num_new: int, allocator: PageAllocator
) -> tuple[list[int], list[int]]:
    """Take pages to copy to and new pages, all or none; a fresh pool's lower ids are the new."""
    wanted = num_copies + num_new
    page_ids = allocator.allocate_pages(wanted) if wanted else []
    if page_ids is None:
        fail(
            "append_tokens",
            f"the pool must have {wanted} pages to give, {num_copies} of them for copies",
            f"{allocator.num_available} of {allocator.total_pages}",
            OutOfPages,
        )
    return page_ids[num_new:], page_ids[:num_new]


def _announce(copies: list[tuple[int, int]], taken: list[int], allocator: PageAllocator) -> None:
    """Have the pools copy; if one cannot, give back what was taken."""
    try:
        allocator.copy_pages(copies)
    except BaseException:
        allocator.free_pages(taken)
        raise


def _joined(slots: list[np.ndarray | int]) -> np.ndarray:
    if all(type(slot) is int for slot in slots):
        return np.array(slots, np.int32)
    return np.concatenate([np.atleast_1d(np.asarray(slot, np.int32)) for slot in slots])
