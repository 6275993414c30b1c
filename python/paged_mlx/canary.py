"""A check that pages hold what their tables say: every slot remembers who wrote it.

A sequence leaves a *trail*: after each token a 64-bit mark that depends on all tokens so
far. Writing a token puts its mark on the slot; copies carry marks along. Before pages are
read, the marks in them are compared with the trail, so a page that is swapped, repeated,
foreign, stale, free or not copied is found at once, and the error names it.

The marks are bookkeeping on the host, beside the arrays: nothing is evaluated, and without
a canary nothing is recorded.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from paged_mlx.errors import fail
from paged_mlx.page_allocator import PageAllocator
from paged_mlx.page_hash import Tokens, pack_tokens
from paged_mlx.page_table import PageTable

_FACTOR = 0x9E3779B97F4A7C15  # odd, so that it has an inverse
_STEP = 0xD1B54A32D192ED03
_BITS = 2**64


class CorruptPage(AssertionError):
    """A page does not hold what its table says.

    Attributes:
        kind: ``"free page"``, ``"never written"``, ``"other sequence"``, ``"other position"``,
            ``"other token"`` or ``"other beginning"``.
        position: The first position that is wrong.
        page_id: Its page.
    """

    def __init__(self, kind: str, position: int, page_id: int, message: str) -> None:
        super().__init__(message)
        self.kind, self.position, self.page_id = kind, position, page_id


class Trail:
    """The tokens of one sequence and the mark after each; see ``Canary.trail``."""

    def __init__(self, sequence: int) -> None:
        self.sequence = sequence
        self._length = 0
        self._marks = np.empty(16, np.uint64)
        self._tokens = np.empty(16, np.int32)

    def __len__(self) -> int:
        return self._length

    @property
    def marks(self) -> np.ndarray:
        """The mark after each token, ``uint64``."""
        return self._marks[: self._length]

    @property
    def tokens(self) -> np.ndarray:
        """The tokens, ``int32``."""
        return self._tokens[: self._length]

    def extend(self, tokens: Tokens) -> np.ndarray:
        """Append tokens; return their marks."""
        added = np.frombuffer(pack_tokens(tokens), "<i4")
        start, end = self._length, self._length + len(added)
        if end > len(self._marks):
            self._marks = np.resize(self._marks, 2 * end)
            self._tokens = np.resize(self._tokens, 2 * end)
        last = int(self._marks[start - 1]) if start else 0
        self._tokens[start:end] = added
        self._marks[start:end] = _marks_after(last, added)
        self._length = end
        return self._marks[start:end]

    def truncate(self, length: int) -> None:
        """Forget the tokens from ``length`` on."""
        self._length = min(length, self._length)


def _marks_after(last: int, tokens: np.ndarray) -> np.ndarray:
    """Return mark[i] = (mark[i - 1] + token[i] + step) * factor, modulo 2**64, without a loop.

    With f the factor, mark[i] = f**(i + 1) * (last + sum over j <= i of (token[j] + step) / f**j).
    """
    count = len(tokens)
    if count == 1:
        mark = (last + int(tokens[0]) + _STEP) * _FACTOR % _BITS
        return np.array([mark], np.uint64)
    powers = np.cumprod(np.full(count, _FACTOR, np.uint64))
    inverses = np.full(count, pow(_FACTOR, -1, _BITS), np.uint64)
    inverses[:1] = 1
    terms = (tokens.astype(np.uint64) + np.uint64(_STEP)) * np.cumprod(inverses)
    return powers * (np.uint64(last) + np.cumsum(terms))


class Canary:
    """The marks of every slot of an allocator, which it follows as an attached pool does."""

    def __init__(self, allocator: PageAllocator) -> None:
        self._allocator = allocator
        self._page_size = allocator.page_size
        self._sequences = 0
        self._marks = np.zeros((0, self._page_size), np.uint64)
        self._writers = np.zeros((0, self._page_size), np.int32)
        self._positions = np.zeros((0, self._page_size), np.int32)
        self._tokens = np.zeros((0, self._page_size), np.int32)
        self.grow(allocator.total_pages)
        allocator.attach(self)

    @property
    def num_pages(self) -> int:
        """Pages that there are marks for."""
        return len(self._marks)

    def grow(self, num_pages: int) -> None:
        """Make room for more pages, never written."""
        added = ((0, num_pages - self.num_pages), (0, 0))
        self._marks = np.pad(self._marks, added)
        self._writers = np.pad(self._writers, added, constant_values=-1)
        self._positions = np.pad(self._positions, added)
        self._tokens = np.pad(self._tokens, added)

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy the marks of whole pages."""
        sources, targets = (list(pages) for pages in zip(*pairs))
        for array in (self._marks, self._writers, self._positions, self._tokens):
            array[targets] = array[sources]

    def trail(self, tokens: Tokens = ()) -> Trail:
        """Return the trail of a new sequence; ``tokens`` are those it found in the cache."""
        trail = Trail(self._sequences)
        self._sequences += 1
        trail.extend(tokens)
        return trail

    def fork(self, trail: Trail) -> Trail:
        """Return the trail of a sequence that begins with all tokens of another."""
        return self.trail(trail.tokens)

    def wrote(self, trail: Trail, tokens: Tokens, slots: np.ndarray) -> None:
        """Note that a sequence's next tokens are written to ``slots``; -1 skips a token.

        Raises:
            ValueError: There is not one slot for each token.
        """
        slots = np.asarray(slots)
        if slots.shape != (len(tokens),):
            fail("wrote", f"slots must have one slot per token, {len(tokens)}", slots.shape)
        first, marks, written = len(trail), trail.extend(tokens), slots >= 0
        slots = slots[written]
        self._marks.reshape(-1)[slots] = marks[written]
        self._writers.reshape(-1)[slots] = trail.sequence
        self._positions.reshape(-1)[slots] = np.arange(first, len(trail))[written]
        self._tokens.reshape(-1)[slots] = trail.tokens[first:][written]

    def verify(self, table: PageTable, trail: Trail) -> None:
        """Compare the pages of a table with the trail of its sequence.

        Raises:
            CorruptPage: They differ; names the first position that does.
            ValueError: The table and the trail have different lengths.
        """
        if table.num_tokens != len(trail):
            fail("verify", f"trail must have {table.num_tokens} tokens, as its table", len(trail))
        page_ids = table.page_ids
        free = self._allocator.ref_counts(table._pages[table.num_freed :]) == 0
        if free.any():
            index = int(np.argmax(free))
            page_id, position = page_ids[index], table.entries[index].logical_start
            message = f"free page: nobody holds page {page_id}, at position {position}"
            raise CorruptPage("free page", position, page_id, message)
        if not table.is_ragged and not table.num_freed:
            self._compare(table, trail, self._marks[page_ids].reshape(-1)[: len(trail)], 0)
            return
        for entry in table.entries:
            length = entry.logical_end - entry.logical_start
            marks = self._marks[entry.physical_page_id, :length]
            self._compare(table, trail, marks, entry.logical_start)

    def _compare(self, table: PageTable, trail: Trail, marks: np.ndarray, start: int) -> None:
        wrong = marks != trail.marks[start : start + len(marks)]
        if wrong.any():
            raise self._corrupt(table, trail, start + int(np.argmax(wrong)))

    def _corrupt(self, table: PageTable, trail: Trail, position: int) -> CorruptPage:
        """Say what a slot holds instead of a sequence's token."""
        page_id, offset = table.logical_to_physical(position)
        place = page_id, offset
        writer, found = int(self._writers[place]), int(self._positions[place])
        token, expected = int(self._tokens[place]), int(trail.tokens[position])
        if writer < 0:
            kind, holds = "never written", "nothing"
        else:
            holds = f"token {token} at position {found} of sequence {writer}"
            kind = "other beginning"
            if found != position:
                kind = "other position" if writer == trail.sequence else "other sequence"
            elif token != expected:
                kind = "other token" if writer == trail.sequence else "other sequence"
        message = (
            f"{kind}: slot {offset} of page {page_id} must hold token {expected} "
            f"at position {position} of sequence {trail.sequence}; it holds {holds}"
        )
        return CorruptPage(kind, position, page_id, message)
