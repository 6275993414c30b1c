"""Planted faults: what a paged attention gets wrong, one thing at a time.

Each is a small change to ``walk.attend``. ``FAULTS`` names the group of the suite that must
see it; a suite that lets one pass cannot tell a right page from a wrong one.
"""

from __future__ import annotations

import numpy as np

from .walk import PARTITION, Fault, State, Walk


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
        self.shift, self.name = shift, f"window begins {abs(shift)} key {'early' if shift < 0 else 'late'}"

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
        self.shift, self.name = shift, f"causal limit {'past' if shift > 0 else 'before'} the own key"

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


class Option(Fault):
    """An option is lost or changed before it is used."""

    def __init__(self, name: str, option: str, change):
        self.name, self.option, self.change = name, option, change

    def options(self, problem):
        value = getattr(problem, self.option)
        return {} if value is None else {self.option: self.change(value)}


class ScaleOfValues(Fault):
    """The scale is taken from V's head_dim."""

    name = "scale from v_head_dim"

    def options(self, problem):
        return {} if problem.scale else {"scale": problem.v_pages.shape[3] ** -0.5}


class CapLast(Fault):
    """Softcap after ALiBi and mask."""

    name = "softcap after alibi and mask"

    def options(self, problem):
        return {"softcap": None}

    def scores(self, score, walk, problem):
        return problem.softcap * np.tanh(score / problem.softcap) if problem.softcap else score


class CapOverflow(Fault):
    """tanh as a quotient of exponentials, which overflow far in saturation."""

    name = "softcap overflows"

    def options(self, problem):
        return {"softcap": None} if self._alone(problem) else {}

    def scores(self, score, walk, problem):
        if not self._alone(problem):
            return score
        growth = np.exp(np.float32(2) * score / np.float32(problem.softcap))
        return np.float32(problem.softcap) * (growth - 1) / (growth + 1)

    def _alone(self, problem):
        return problem.softcap and problem.mask is None and problem.alibi_slopes is None


class UnsignedDistance(Fault):
    """ALiBi's distance as an unsigned difference."""

    name = "alibi distance wraps"

    def scores(self, score, walk, problem):
        if problem.alibi_slopes is None:
            return score
        behind = walk.position[None, :] < walk.query_positions[:, None]
        return score + problem.alibi_slopes[:, None, None] * behind * np.float32(2.0**32)


class SinkCountedTwice(Fault):
    """The sink enters in every partition."""

    name = "sink counted once per partition"

    def finish(self, state: State, walk, problem):
        if state.sinks is not None and walk.context_len > PARTITION:
            state.sinks = state.sinks + np.float32(np.log(2))


class SinkFillsEmptyRows(Fault):
    """A row that sees nothing gets the sink as its log-sum-exp."""

    name = "an empty row's lse is the sink"

    def result(self, out, lse, walk):
        return out, np.where(np.isneginf(lse), 0, lse)


class EmptyRowsLeft(Fault):
    """A row that sees nothing is not written."""

    name = "an empty row is not written"

    def result(self, out, lse, walk):
        return np.where(np.isneginf(lse)[..., None], 1, out), lse


class ClampedMaximum(Fault):
    """The maximum starts at 0."""

    name = "maximum clamped at 0, denominator + 1e-6"

    def finish(self, state: State, walk, problem):
        seen = state.largest > -np.inf
        new = np.where(seen, np.maximum(state.largest, 0), state.largest)
        decay = np.where(seen, np.exp(state.largest - new), 1)
        state.total = state.total * decay + np.float32(1e-6)
        state.mixed, state.largest = state.mixed * decay[..., None], new


class NoMaximum(Fault):
    """Exponentials without subtracting the maximum."""

    name = "no maximum subtracted"

    def finish(self, state: State, walk, problem):
        growth = np.exp(np.where(state.largest > -np.inf, state.largest, 0))
        state.total, state.mixed = state.total * growth, state.mixed * growth[..., None]
        state.largest = np.where(state.largest > -np.inf, 0, state.largest)


class MergeWithoutWeights(Fault):
    """Partitions are averaged as if each had the same denominator."""

    name = "partitions merged without their weights"

    def walk(self, walk, problem):
        number = walk.position // PARTITION
        if walk.context_len > PARTITION:
            walk.counts *= np.where(number == number.min(), 2, 1).astype(np.float32)


class HalfPrecisionSum(Fault):
    """The denominator is kept in half precision."""

    name = "denominator in float16"

    def finish(self, state: State, walk, problem):
        state.total = state.total.astype(np.float16).astype(np.float32)


class BaseTwoLse(Fault):
    """The log-sum-exp is in base 2."""

    name = "lse in base 2"

    def result(self, out, lse, walk):
        return out, lse * np.float32(1.4426950408889634)


class NextToken(Fault):
    """Query tokens are stored one row on."""

    name = "rows of a sequence rotated"

    def result(self, out, lse, walk):
        return np.roll(out, 1, axis=0), np.roll(lse, 1, axis=0)


class NextHead(Fault):
    """Query heads are stored one on."""

    name = "query heads rotated"

    def result(self, out, lse, walk):
        return np.roll(out, 1, axis=1), np.roll(lse, 1, axis=1)


def _shifted(mask: np.ndarray) -> np.ndarray:
    return np.roll(mask, 1, axis=-1)


#: ``(fault, group that must see it)``.
FAULTS: tuple[tuple[Fault, str], ...] = (
    *((DropPage(which), "needles") for which in (0, 0.25, 0.5, 0.75, 1)),
    *((RepeatPage(which), "needles") for which in (0, 0.5, 1)),
    (SwapPages(last=True), "needles"),
    (SwapPages(last=False), "needles"),
    (PreviousPage(), "needles"),
    (ForeignPage(), "needles"),
    (ForeignKeys(), "needles"),
    (PageEdge(last=False), "needles"),
    (PageEdge(last=True), "needles"),
    (SlotShift(), "needles"),
    (ContextShort(), "needles"),
    (ContextLong(), "needles"),
    (WindowEdge(-1), "needles"),
    (WindowEdge(1), "needles"),
    (CausalEdge(1), "needles"),
    (CausalEdge(-1), "needles"),
    (QueryPositions(), "needles"),
    (PartitionEdge(0), "needles"),
    (PartitionEdge(2), "needles"),
    (PartitionDropped(0), "needles"),
    (PartitionDropped(-1), "needles"),
    (PrefixEdge(0), "needles"),
    (PrefixEdge(2), "needles"),
    (PrefixNext(0), "needles"),
    (PrefixNext(2), "needles"),
    (HeadMap(), "needles"),
    (NextHead(), "needles"),
    (NextToken(), "needles"),
    (StaleValues(), "poison"),
    (ContextLong(), "poison"),
    (ClampedMaximum(), "numbers"),
    (NoMaximum(), "numbers"),
    (SinkFillsEmptyRows(), "numbers"),
    (EmptyRowsLeft(), "numbers"),
    (CapOverflow(), "numbers"),
    (HalfPrecisionSum(), "numbers"),
    (Option("softcap lost", "softcap", lambda cap: None), "grid"),
    (CapLast(), "grid"),
    (ScaleOfValues(), "grid"),
    (UnsignedDistance(), "grid"),
    (Option("alibi of the opposite sign", "alibi_slopes", lambda s: -s), "grid"),
    (Option("alibi slopes of the next head", "alibi_slopes", lambda s: np.roll(s, 1)), "grid"),
    (Option("sinks lost", "sinks", lambda s: None), "grid"),
    (Option("sinks of the next head", "sinks", lambda s: np.roll(s, 1)), "grid"),
    (SinkCountedTwice(), "grid"),
    (Option("mask one key off", "mask", _shifted), "grid"),
    (Option("mask one token off", "mask", lambda m: np.roll(m, 1, axis=-2)), "grid"),
    (Option("mask of head 0 for all", "mask", lambda m: m[:1] if m.ndim == 3 else m), "grid"),
    (MergeWithoutWeights(), "grid"),
    (BaseTwoLse(), "grid"),
)
