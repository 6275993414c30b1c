"""A check that pages hold what their tables say: every slot remembers who wrote it.

A sequence leaves a *trail*: after each token a 64-bit mark that depends on all tokens so
far. Writing a token puts its mark on the slot; copies carry marks along. Before pages are
read, the marks in them are compared with the trail, so a page that is swapped, repeated,
foreign, stale, free or not copied is found at once, and the error names it.

The marks are bookkeeping on the host, beside the arrays: nothing is evaluated, and without
a canary nothing is recorded. They tell what was written where, not which bits came out.

``PagePool(..., canary=True)`` has one. Each step: append, ``note`` whose tokens they are,
write every layer, attend; ``paged_mlx.paged_attention`` verifies each read by itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from paged_mlx.errors import fail
from paged_mlx.pages.allocator import PageAllocator
from paged_mlx.pages.table import PageTable
from paged_mlx.pages.token_hash import Trail, extend_all
from paged_mlx.prefix.hash import Tokens


class CorruptPage(AssertionError):
    """A page does not hold what its table says.

    Attributes:
        kind: ``"free page"``, ``"never written"``, ``"missed layer"``, ``"other sequence"``,
            ``"other position"``, ``"other token"`` or ``"other beginning"``.
        position: The first position that is wrong.
        page_id: Its page.
    """

    def __init__(self, kind: str, position: int, page_id: int, message: str) -> None:
        super().__init__(message)
        self.kind, self.position, self.page_id = kind, position, page_id


class Canary:
    """The marks of every slot of an allocator, which it follows as an attached pool does.

    Args:
        allocator: Whose pages.
        num_layers: Layers whose writes are told by ``wrote_layer``; 0 if none are.
    """

    wants_freed = True

    def __init__(self, allocator: PageAllocator, num_layers: int = 0) -> None:
        self._allocator = allocator
        self._page_size = allocator.page_size
        self._sequences = itertools.count()
        self._marks = np.zeros((0, self._page_size), np.uint64)
        self._writers = np.zeros((0, self._page_size), np.int32)
        self._positions = np.zeros((0, self._page_size), np.int32)
        self._tokens = np.zeros((0, self._page_size), np.int32)
        self._due = np.zeros((num_layers, 0, self._page_size), bool)  # noted, not written yet
        self._num_due = np.zeros(num_layers, np.int64)
        self._verified: object = None  # what was found right, until something changes
        self.grow(allocator.total_pages)
        allocator.attach(self)

    # Told as an attached pool.

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
        self._due = np.pad(self._due, ((0, 0), *added))

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy the marks of whole pages."""
        sources, targets = (list(pages) for pages in zip(*pairs))
        for array in (self._marks, self._writers, self._positions, self._tokens):
            array[targets] = array[sources]
        self._set_due(targets, self._due[:, sources])

    def freed(self, page_ids: Sequence[int]) -> None:
        """Forget the marks of pages that became free."""
        page_ids = list(page_ids)
        self._marks[page_ids] = 0
        self._writers[page_ids] = -1
        self._set_due(page_ids, False)

    def _set_due(self, page_ids: list[int], due: np.ndarray | bool) -> None:
        self._num_due -= self._due[:, page_ids].sum((1, 2))
        self._due[:, page_ids] = due
        self._num_due += self._due[:, page_ids].sum((1, 2))
        self._verified = None

    # Writing.

    def trail(self, tokens: Tokens = ()) -> Trail:
        """Return the trail of a new sequence; ``tokens`` are those it found in the cache."""
        trail = Trail(self._sequences)
        trail.extend(tokens)
        return trail

    def fork(self, trail: Trail) -> Trail:
        """Return the trail of a sequence that begins with all tokens of another."""
        return trail.fork()

    def begin(self, table: PageTable, tokens: Tokens) -> None:
        """Say which tokens a table found in the prefix cache.

        Raises:
            ValueError: They are not as many as the table has.
        """
        if len(tokens) != table.num_tokens:
            must = f"tokens must be all tokens of the table, {table.num_tokens}"
            fail("begin", must, len(tokens))
        table.trail = self.trail(tokens)
        self._verified = None

    def note(
        self, tables: Sequence[PageTable], tokens: Sequence[Tokens], slots: np.ndarray
    ) -> None:
        """Say which tokens an append is for, before any layer writes them.

        Args:
            tables: Those that were appended to.
            tokens: The new tokens of each.
            slots: ``AppendPlan.slots``, of the first table's tokens, then the second's.

        Raises:
            ValueError: A table's tokens, noted or new, are not those it has room for.
        """
        for table, added in zip(tables, tokens, strict=True):
            known = 0 if table.trail is None else len(table.trail)
            if known + len(added) != table.num_tokens:
                must = (
                    f"tokens must be the {table.num_tokens - known} of the table that "
                    "were not noted yet"
                )
                fail("note", must, len(added))
        for table in tables:
            if table.trail is None:
                table.trail = self.trail()
        self._note("note", [table.trail for table in tables], tokens, slots)

    def wrote(self, trail: Trail, tokens: Tokens, slots: np.ndarray) -> None:
        """Note that a sequence's next tokens are written to ``slots``; -1 skips a token.

        Raises:
            ValueError: There is not one slot for each token.
        """
        self._note("wrote", [trail], [tokens], slots)

    def _note(
        self, op: str, trails: Sequence[Trail], tokens: Sequence[Tokens], slots: np.ndarray
    ) -> None:
        slots, counts = np.asarray(slots), [len(added) for added in tokens]
        if slots.shape != (sum(counts),):
            fail(op, f"slots must have one slot per token, {sum(counts)}", slots.shape)
        if not counts:
            return
        written = slots >= 0
        marks = extend_all(trails, tokens)
        ends = np.repeat([len(trail) for trail in trails], counts)
        after = np.repeat(np.cumsum(counts), counts)  # tokens up to the end of this sequence's
        slots = slots[written]
        self._marks.reshape(-1)[slots] = marks[written]
        self._writers.reshape(-1)[slots] = _each(trails, counts)[written]
        self._positions.reshape(-1)[slots] = (ends - after + np.arange(len(marks)))[written]
        added = [trail.tokens[len(trail) - count :] for trail, count in zip(trails, counts)]
        self._tokens.reshape(-1)[slots] = np.concatenate(added)[written]
        due = self._due.reshape(len(self._due), self._marks.size)
        self._num_due += len(slots) - due[:, slots].sum(1)
        due[:, slots] = True
        self._verified = None

    def wrote_layer(self, layer: int, slots: np.ndarray) -> None:
        """Follow one layer's write.

        Raises:
            CorruptPage: A page of it is free.
        """
        slots = slots[slots >= 0]
        free = self._allocator._counts[slots // self._page_size] == 0
        if free.any():
            page_id = int(slots[np.argmax(free)]) // self._page_size
            message = f"free page: nobody holds page {page_id}, which layer {layer} writes to"
            raise CorruptPage("free page", -1, page_id, message)
        due = self._due[layer].reshape(-1)
        self._num_due[layer] -= np.count_nonzero(due[slots])
        due[slots] = False

    # Reading.

    def read(self, layer: int, tables: Sequence[PageTable]) -> None:
        """Verify all that a layer's attention over these tables is going to read.

        Raises:
            CorruptPage: A slot does not hold what its table says.
            ValueError: A table's tokens were never noted.
        """
        state = _state_of(tables)
        if self._verified != state:
            self._verify_batch(tables, state[0])
            self._verified = state
        if self._num_due[layer]:
            for table in tables:
                self._verify_layer(layer, table)

    def _verify_batch(self, tables: Sequence[PageTable], pages: bytes) -> None:
        """Verify tables; ``pages`` are the entries of all, one after the other."""
        page_ids = np.frombuffer(pages, np.int32)
        held = self._allocator._counts[page_ids].all()
        marks, end = self._marks[page_ids].reshape(-1), 0
        for table in tables:
            start, end = end, end + len(table._pages) * self._page_size
            trail, length = table.trail, table._num_tokens
            alike = held and table._starts is None and not table._num_freed
            if not alike or trail is None or len(trail) != length:
                self._verify_noted(table)
            elif (marks[start : start + length] != trail.marks).any():
                self._verify_noted(table)

    def _verify_noted(self, table: PageTable) -> None:
        noted = 0 if table.trail is None else len(table.trail)
        if table.num_tokens and table.trail is None:
            fail("read", "table must have noted tokens, see Canary.note", repr(table))
        if noted < table.num_tokens:
            page_id, offset = table.logical_to_physical(noted)
            message = (
                f"never written: slot {offset} of page {page_id} must hold position {noted} of "
                f"sequence {table.trail.sequence}, which has noted {noted} tokens"
            )
            raise CorruptPage("never written", noted, page_id, message)
        if noted:
            self.verify(table, table.trail)

    def _verify_layer(self, layer: int, table: PageTable) -> None:
        for entry in table.entries:
            length = entry.logical_end - entry.logical_start
            due = self._due[layer, entry.physical_page_id, :length]
            if due.any():
                offset = int(np.argmax(due))
                position, page_id = entry.logical_start + offset, entry.physical_page_id
                message = (
                    f"missed layer: slot {offset} of page {page_id} must hold position "
                    f"{position}; layer {layer} has not written it"
                )
                raise CorruptPage("missed layer", position, page_id, message)

    def check(self) -> None:
        """Prove that the counts of slots to be written are those of the slots.

        Raises:
            AssertionError: They are not.
        """
        due = self._due.sum((1, 2))
        assert (self._num_due == due).all(), f"{self._num_due} slots to be written, found {due}"

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


def _each(trails: Sequence[Trail], counts: Sequence[int]) -> np.ndarray:
    """Return the sequence number of each token."""
    return np.repeat([trail.sequence for trail in trails], counts)


def _state_of(tables: Sequence[PageTable]) -> tuple[bytes, list[int], list[int]]:
    """Return all of the tables that bears on what they should hold; equal means unchanged."""
    return (
        b"".join([table._pages for table in tables]),
        [table._version for table in tables],
        [table._num_tokens for table in tables],
    )
