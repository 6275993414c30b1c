"""Faults in which keys are read: pages, slots, limits, partitions, shared prefixes."""

from __future__ import annotations

import numpy as np

from .walk import PARTITION, Fault, Walk


def _pages(walk: Walk) -> np.ndarray:
    """Columns of the block table that the walk reads, in order."""
    return np.unique(walk.entry)


def _keys_of(walk: Walk, column: int) -> np.ndarray:
    return np.flatnonzero(walk.entry == column)


class DropPage(Fault):
    """A page is not read. ``which`` is its place among those read, 0 first, 1 last."""

    def __init__(self, which: float = 0.5):
        self.which, self.name = which, f"page at {which:g} of the context dropped"

    def walk(self, walk, problem):
        pages = _pages(walk)
        if len(pages) > 1:
            walk.counts[:, _keys_of(walk, pages[round(self.which * (len(pages) - 1))])] = 0


class RepeatPage(DropPage):
    """A page is read twice."""

    def __init__(self, which: float = 0.5):
        super().__init__(which)
        self.name = f"page at {which:g} of the context read twice"

    def walk(self, walk, problem):
        pages = _pages(walk)
        if len(pages) > 1:
            walk.counts[:, _keys_of(walk, pages[round(self.which * (len(pages) - 1))])] *= 2


class SwapPages(Fault):
    """Two neighbours of the block table change places: the last two, or two in the middle."""

    def __init__(self, last: bool):
        self.last, self.name = last, f"{'last' if last else 'middle'} two pages swapped"

    def walk(self, walk, problem):
        pages = _pages(walk)
        at = len(pages) - 2 if self.last else len(pages) // 2 - 1
        if at < 0:
            return
        one, other = _keys_of(walk, pages[at]), _keys_of(walk, pages[at + 1])
        first, second = walk.page[one[0]], walk.page[other[0]]
        walk.page[one], walk.page[other] = second, first


class PreviousPage(Fault):
    """A page is read in place of the one after it."""

    name = "a page read in place of the next"

    def walk(self, walk, problem):
        pages = _pages(walk)
        if len(pages) > 1:
            keys = _keys_of(walk, pages[len(pages) // 2])
            walk.page[keys] = walk.page[_keys_of(walk, pages[len(pages) // 2 - 1])[0]]


class ForeignPage(Fault):
    """A page of the sequence after this one is read; of nobody, if it is alone."""

    name = "a page of another sequence"

    def walk(self, walk, problem):
        if not walk.page.size:
            return
        tables = problem.block_tables
        column = _pages(walk)[0]
        foreign = tables[(walk.sequence + 1) % len(tables), column]
        if foreign == tables[walk.sequence, column] or not 0 <= foreign < len(problem.k_pages):
            foreign = (tables[walk.sequence, column] + 1) % len(problem.k_pages)
        walk.page[_keys_of(walk, column)] = foreign


class ForeignKeys(Fault):
    """Every sequence reads the pages of the first."""

    name = "the block table row of sequence 0 for all"

    def walk(self, walk, problem):
        row = problem.block_tables[0]
        walk.page = row[np.minimum(walk.entry, len(row) - 1)].astype(np.int64)


class PageEdge(Fault):
    """The first or the last slot of every page is skipped."""

    def __init__(self, last: bool):
        self.last, self.name = last, f"{'last' if last else 'first'} slot of every page skipped"

    def walk(self, walk, problem):
        for column in _pages(walk):
            keys = _keys_of(walk, column)
            if len(keys) > 1:
                walk.counts[:, keys[-1 if self.last else 0]] = 0


class SlotShift(Fault):
    """Slots are read one further on, the last from the next page's place in memory."""

    name = "slots shifted by one"

    def walk(self, walk, problem):
        slot = walk.slot + 1
        page_size = problem.k_pages.shape[2]
        walk.page = (walk.page + slot // page_size) % len(problem.k_pages)
        walk.slot = slot % page_size


class ContextShort(Fault):
    """The last key of the context is not seen."""

    name = "context one key short"

    def walk(self, walk, problem):
        walk.counts[:, walk.position == walk.context_len - 1] = 0


class ContextLong(Fault):
    """One slot past the context is read, in the last page or in the next entry's."""

    name = "context one key long"

    def walk(self, walk, problem):
        if walk.page.size:
            page_size = problem.k_pages.shape[2]
            slot = (walk.slot[-1] + 1) % page_size
            page = walk.page[-1] if slot else (walk.page[-1] + 1) % len(problem.k_pages)
            _append(walk, page, slot, walk.context_len)


def _append(walk: Walk, page: int, slot: int, position: int) -> None:
    walk.page = np.append(walk.page, page)
    walk.slot = np.append(walk.slot, slot)
    walk.position = np.append(walk.position, position)
    walk.entry = np.append(walk.entry, walk.entry[-1])
    walk.counts = np.hstack([walk.counts, np.ones((len(walk.counts), 1), np.float32)])


class WindowEdge(Fault):
    """The window begins one key early or late."""

    def __init__(self, shift: int):
        self.shift, self.name = (
            shift,
            f"window begins {abs(shift)} key {'early' if shift < 0 else 'late'}",
        )

    def walk(self, walk, problem):
        if problem.sliding_window is None:
            return
        first = walk.first_key(problem.sliding_window)[:, None]
        if self.shift > 0:
            walk.counts[walk.position[None] == first] = 0
        else:
            walk.counts[(walk.position[None] == first - 1)] = 1


class CausalEdge(Fault):
    """A token sees one key too many, or not its own."""

    def __init__(self, shift: int):
        self.shift, self.name = (
            shift,
            f"causal limit {'past' if shift > 0 else 'before'} the own key",
        )

    def walk(self, walk, problem):
        if not problem.causal or len(walk.query_positions) < 2:
            return
        own = walk.query_positions[:, None]
        if self.shift > 0:
            walk.counts[walk.position[None] == own + 1] = 1
        else:
            walk.counts[walk.position[None] == own] = 0


class QueryPositions(Fault):
    """Positions of a query longer than one token start at 0, as if nothing were cached."""

    name = "query positions without the cached tokens"

    def walk(self, walk, problem):
        if problem.causal and len(walk.query_positions) > 1:
            limit = np.arange(len(walk.query_positions))[:, None]
            walk.counts[walk.position[None] > limit] = 0


class PartitionEdge(Fault):
    """The key where two partitions meet is in both, or in none."""

    def __init__(self, times: int):
        self.times, self.name = times, f"partition boundary key counted {times} times"

    def walk(self, walk, problem):
        meets = (walk.position % PARTITION == 0) & (walk.position > 0)
        walk.counts[:, meets] *= self.times


class PartitionDropped(Fault):
    """One partition is left out of the merge."""

    def __init__(self, which: int):
        self.which, self.name = which, f"partition {which} left out of the merge"

    def walk(self, walk, problem):
        if walk.context_len > PARTITION:
            number = walk.position // PARTITION
            walk.counts[:, number == (number.max() if self.which < 0 else self.which)] = 0


class PrefixEdge(Fault):
    """The last key of a shared prefix is read by nobody, or twice."""

    def __init__(self, times: int):
        self.times, self.name = times, f"last key of a shared prefix counted {times} times"

    def walk(self, walk, problem):
        walk.counts[:, walk.position == walk.shared_len - 1] *= self.times


class PrefixNext(PrefixEdge):
    """The first key after a shared prefix is read by nobody, or twice."""

    def __init__(self, times: int):
        super().__init__(times)
        self.name = f"first key after a shared prefix counted {times} times"

    def walk(self, walk, problem):
        if walk.shared_len:
            walk.counts[:, walk.position == walk.shared_len] *= self.times


class HeadMap(Fault):
    """Query head h reads KV head ``h % num_kv_heads``."""

    name = "query heads grouped the wrong way"

    def walk(self, walk, problem):
        walk.kv_heads = np.arange(len(walk.kv_heads)) % problem.k_pages.shape[1]


class StaleValues(Fault):
    """Slots past the context get weight 0 but are multiplied in."""

    name = "weight 0 times what lies past the context"

    def walk(self, walk, problem):
        if walk.page.size and walk.slot[-1] + 1 < problem.k_pages.shape[2]:
            _append(walk, walk.page[-1], walk.slot[-1] + 1, walk.context_len)
            walk.counts[:, -1] = 0

    def values(self, values, seen):
        return values


class NoCausality(Fault):
    """Every token of a query sees the whole context."""

    name = "no causality"

    def walk(self, walk, problem):
        if problem.causal and problem.sliding_window is None:
            walk.counts[:] = 1


class WindowOfTheLastToken(Fault):
    """Every token of a query has the window of its last token."""

    name = "the last token's window for all"

    def walk(self, walk, problem):
        if problem.sliding_window is not None:
            walk.counts[:, walk.position < walk.first_key(problem.sliding_window)[-1]] = 0


class WindowWithoutCausality(Fault):
    """The window is forgotten when attention is not causal."""

    name = "no window without causality"

    def walk(self, walk, problem):
        if problem.sliding_window is not None and not problem.causal:
            walk.counts[:] = 1


class KeysOfTheSlotBefore(Fault):
    """The first slot of a page is read in place of its second."""

    name = "slot 0 in place of slot 1"

    def walk(self, walk, problem):
        walk.slot = np.where(walk.slot == 1, 0, walk.slot)
