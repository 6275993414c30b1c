"""Page tables for a case: who holds which page, with shuffled ids and garbage around them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from . import dtypes
from .oracle import first_key

NO_PAGE = -1
INT_MAX = 2**31 - 1


@dataclass
class Entry:
    """Tokens ``[start, end)`` of a sequence, in the first slots of a page."""

    page_id: int
    start: int
    end: int
    length: int  # what page_lens says; in a tail entry it may reach past the context
    visible: bool = True  # to some query token of the sequence


@dataclass
class Tables:
    """The entries of every sequence, and the same as the arrays of a call."""

    num_pages: int
    entries: list[list[Entry]]
    block_tables: np.ndarray
    page_starts: np.ndarray | None = None
    page_lens: np.ndarray | None = None

    def scatter(self, case, contexts: list[np.ndarray], dim: int, rng) -> np.ndarray:
        """Pages ``[num_pages, num_kv_heads, page_size, dim]`` in storage, poison elsewhere."""
        shape = (self.num_pages, case.num_kv_heads, case.page_size, dim)
        pages = poisoned(shape, case.dtype, case.poison, rng)
        for entries, context in zip(self.entries, contexts, strict=True):
            stored = dtypes.encode(context, case.dtype)
            for entry in entries:
                if entry.visible:
                    tokens = np.moveaxis(stored[entry.start : entry.end], 0, 1)
                    pages[entry.page_id, :, : entry.end - entry.start] = tokens
        return pages


def poisoned(shape: tuple, dtype: str, kind: str, rng: np.random.Generator) -> np.ndarray:
    """An array full of what must never be read."""
    huge, tiny = dtypes.HUGE[dtype], dtypes.TINY[dtype]
    choices = {
        "nan": [np.nan],
        "inf": [np.inf, -np.inf],
        "huge": [huge, -huge],
        "denormal": [tiny, -tiny],
        "mixed": [np.nan, np.inf, -np.inf, huge, -huge, tiny],
        "zero": [0.0],
    }[kind]
    with np.errstate(invalid="ignore"):
        stored = dtypes.encode(np.array(choices, np.float32), dtype)
    if len(stored) == 1:
        return np.full(shape, stored[0])
    return stored[rng.integers(0, len(stored), shape, np.uint8)]


def lay_out(case, rng: np.random.Generator) -> Tables:
    """Cut every context into entries, give them pages, and pack the tables."""
    entries: list[list[Entry]] = []
    next_id = 0
    for s, (query_len, context_len) in enumerate(case.sequences):
        own = _shared_entries(case, s, entries)
        covered = own[-1].end if own else 0
        for start, end, length in _cut(case, covered, context_len, rng):
            own.append(Entry(next_id, start, end, length))
            next_id += 1
        first = first_key(context_len, query_len, case.sliding_window)
        for entry in own:
            entry.visible = query_len > 0 and entry.end > first
        entries.append(own)
    _shuffle(entries, next_id, num_pages := next_id + 2 + next_id // 4, rng)
    return _pack(case, entries, num_pages, rng)


def _shared_entries(case, s: int, entries: list[list[Entry]]) -> list[Entry]:
    """Entries that sequence ``s`` takes over: whole pages, or part-filled ones if ragged."""
    best: list[Entry] = []
    for first, last, tokens in case.prefixes:
        if not first < s < last:
            continue
        taken: list[Entry] = []
        for e in entries[first]:
            end = min(e.end, tokens, case.sequences[s][1])
            whole = end - e.start == case.page_size
            if end <= e.start or not (whole or case.ragged):
                break
            taken.append(Entry(e.page_id, e.start, end, end - e.start))
        if len(taken) > len(best):
            best = taken
    return best


def _cut(case, covered: int, context_len: int, rng):
    """``(start, end, length)`` of the entries of ``[covered, context_len)``."""
    while covered < context_len:
        length = case.page_size
        if case.ragged and rng.random() < 0.5:
            length = int(rng.integers(1, case.page_size + 1))
        end = min(covered + length, context_len)
        full = length if rng.random() < 0.5 else end - covered
        yield covered, end, full
        covered = end


def _shuffle(entries, used: int, num_pages: int, rng) -> None:
    ids = rng.permutation(num_pages)[:used]
    for own in entries:
        for entry in own:
            entry.page_id = int(ids[entry.page_id])


def _garbage_id(case, num_pages: int, rng) -> int:
    """What an entry that must not be read may hold."""
    if case.poison == "zero":
        return NO_PAGE
    choices = [NO_PAGE, INT_MAX, num_pages, num_pages + 7, -(2**31), int(rng.integers(num_pages))]
    return int(rng.choice(choices))


def _pack(case, entries, num_pages: int, rng) -> Tables:
    if case.ragged:
        entries = [_drop_hidden(own, rng) for own in entries]
    columns = max((len(own) for own in entries), default=0) + int(rng.integers(0, 3))
    shape = (len(entries), max(columns, 1))
    block_tables = np.empty(shape, np.int32)
    page_starts, page_lens = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for s, own in enumerate(entries):
        for i in range(shape[1]):
            seen = i < len(own) and own[i].visible
            block_tables[s, i] = own[i].page_id if seen else _garbage_id(case, num_pages, rng)
            if i < len(own):
                page_starts[s, i], page_lens[s, i] = own[i].start, own[i].length
    if not case.ragged:
        return Tables(num_pages, entries, block_tables)
    return Tables(num_pages, entries, block_tables, page_starts, page_lens)


def _drop_hidden(own: list[Entry], rng) -> list[Entry]:
    """A ragged table may begin at the first page that is still visible."""
    keep = rng.random() < 0.5
    return [entry for entry in own if keep or entry.visible]
