"""A check that pages hold what their tables say: every slot remembers who wrote it.

Each sequence has a rolling hash of its tokens. Writing a token notes on its slot the
sequence, position, token and hash; copies carry the notes along. Before pages are read, the
notes in them are compared with the sequence's hashes, so a page that is swapped, repeated,
foreign, stale, free or not copied is found at once, and the error names it.

The notes are bookkeeping on the host, beside the arrays: nothing is evaluated, and without
a canary nothing is recorded. They tell what was written where, not which bits came out.

``PagePool(..., canary=True)`` has one. Each step: append, ``note`` whose tokens they are,
write every layer, attend; ``paged_mlx.paged_attention`` verifies each read by itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from paged_mlx.errors import as_list, check_kind, fail, kind_of, whole_number
from paged_mlx.pages.allocator import PageAllocator
from paged_mlx.pages.observers import Pool
from paged_mlx.pages.page_map import PageTableEntry
from paged_mlx.pages.table import PageTable, maps_of
from paged_mlx.pages.token_hash import RollingHash, extend_all
from paged_mlx.pages.tokens import Tokens, pack_tokens

_NOTE = np.dtype([("hash", "u8"), ("sequence", "i4"), ("position", "i4"), ("token", "i4")])
_NOTHING = np.array((0, -1, 0, 0), _NOTE)


class CorruptPage(AssertionError):
    """A page does not hold what its table says.

    Attributes:
        kind: ``"free page"``, ``"never written"``, ``"missed layer"``, ``"other sequence"``,
            ``"other position"``, ``"other token"`` or ``"other beginning"``.
        position: The first position that is wrong.
        page_id: Its page.
    """

    def __init__(self, kind: str, position: int, page_id: int, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind, self.position, self.page_id = kind, position, page_id


class Canary(Pool):
    """The notes on every slot of an allocator, which it follows as an attached pool does.

    Args:
        allocator: Owner of the pages.
        num_layers: Layers whose writes are told by ``wrote_layer``; 0 if none are.
    """

    wants_freed = True

    def __init__(self, allocator: PageAllocator, num_layers: int = 0) -> None:
        check_kind("Canary", "allocator", allocator, PageAllocator)
        num_layers = whole_number("Canary", "num_layers", num_layers)
        self.page_size = allocator.page_size
        self._allocator = allocator
        self._sequences = itertools.count()
        self._notes = np.full((0, self.page_size), _NOTHING)
        self._due = np.zeros((num_layers, 0, self.page_size), bool)  # noted, not written yet
        self._num_due = np.zeros(num_layers, np.int64)
        self._verified: object = None  # what was found right, until something changes
        self.grow(allocator.total_pages)
        allocator.attach(self)

    def __repr__(self) -> str:
        noted = int((self._notes["sequence"] >= 0).sum())
        return (
            f"Canary({self.num_pages} pages of {self.page_size}, {len(self._due)} layers, "
            f"{noted} slots noted)"
        )

    # Told as an attached pool.

    @property
    def num_pages(self) -> int:
        """Pages that there are notes for."""
        return len(self._notes)

    def grow(self, num_pages: int) -> None:
        """Make room for more pages, never written."""
        added = num_pages - self.num_pages
        self._notes = np.concatenate([self._notes, np.full((added, self.page_size), _NOTHING)])
        self._due = np.pad(self._due, ((0, 0), (0, added), (0, 0)))

    def copied(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy the notes of whole pages."""
        sources, targets = (list(pages) for pages in zip(*pairs))
        self._notes[targets] = self._notes[sources]
        self._set_due(targets, self._due[:, sources])

    def freed(self, page_ids: Sequence[int]) -> None:
        """Forget the notes of pages that became free."""
        page_ids = list(page_ids)
        self._notes[page_ids] = _NOTHING
        self._set_due(page_ids, False)

    def _set_due(self, page_ids: list[int], due: np.ndarray | bool) -> None:
        self._num_due -= self._due[:, page_ids].sum((1, 2))
        self._due[:, page_ids] = due
        self._num_due += self._due[:, page_ids].sum((1, 2))
        self._verified = None

    # Writing.

    def begin(self, table: PageTable, tokens: Tokens) -> None:
        """Say which tokens a table found in the prefix cache.

        Raises:
            ValueError: They are not as many as the table has.
        """
        maps_of("begin", (table,))
        known = _tokens("begin", tokens)
        if len(known) != table.num_tokens:
            must = f"tokens must be all tokens of the table, {table.num_tokens}"
            fail("begin", must, len(known))
        token_hash = RollingHash(self._sequences)
        token_hash.extend(known)
        table.token_hash = token_hash
        self._verified = None

    def note(
        self, tables: Sequence[PageTable], tokens: Sequence[Tokens], slots: np.ndarray
    ) -> None:
        """Say which tokens an append is for, before any layer writes them.

        Args:
            tables: Those that were appended to.
            tokens: The new tokens of each.
            slots: ``int32 [tokens]``, of the first table's tokens, then the second's, as the
                append has returned them; -1: the token is not written.

        Raises:
            ValueError: A table's tokens, noted or new, are not those it has room for.
        """
        maps_of("note", tables)
        tables = list(tables)
        tokens = [_tokens("note", each) for each in as_list("note", "tokens", tokens, "tokens")]
        counts = [len(added) for added in tokens]
        if len(counts) != len(tables):
            fail("note", f"tokens must be those of {len(tables)} tables", len(counts))
        for table, count in zip(tables, counts):
            known = 0 if table.token_hash is None else len(table.token_hash)
            if known + count != table.num_tokens:
                must = (
                    f"tokens must be the {table.num_tokens - known} of the table that "
                    "were not noted yet"
                )
                fail("note", must, count)
        slots = self._slots("note", slots)
        if len(slots) != sum(counts):
            fail("note", f"slots must have one slot per token, {sum(counts)}", len(slots))
        hashes = []
        for table in tables:
            if table.token_hash is None:
                table.token_hash = RollingHash(self._sequences)
            hashes.append(table.token_hash)
        if hashes:
            self._write_notes(hashes, tokens, counts, slots)

    def _write_notes(
        self,
        hashes: Sequence[RollingHash],
        tokens: Sequence[Tokens],
        counts: list[int],
        slots: np.ndarray,
    ) -> None:
        notes = np.empty(len(slots), _NOTE)
        notes["hash"] = extend_all(hashes, tokens)
        notes["sequence"] = np.repeat([one.sequence for one in hashes], counts)
        notes["position"] = np.concatenate(
            [np.arange(len(one) - count, len(one)) for one, count in zip(hashes, counts)]
        )
        notes["token"] = np.concatenate(
            [one.tokens[len(one) - count :] for one, count in zip(hashes, counts)]
        )
        written = slots >= 0
        slots = slots[written]
        self._notes.reshape(-1)[slots] = notes[written]
        due = self._due.reshape(len(self._due), self._notes.size)
        self._num_due += len(slots) - due[:, slots].sum(1)
        due[:, slots] = True
        self._verified = None

    def wrote_layer(self, layer: int, slots: np.ndarray) -> None:
        """Follow one layer's write.

        Raises:
            CorruptPage: A page of it is free.
            ValueError: An argument is wrong.
        """
        self._check_layer("wrote_layer", layer)
        slots = self._slots("wrote_layer", slots)
        slots = slots[slots >= 0]
        free = self._counts_of(slots // self.page_size) == 0
        if free.any():
            page_id = int(slots[np.argmax(free)]) // self.page_size
            message = f"nobody holds page {page_id}, which layer {layer} writes to"
            raise CorruptPage("free page", -1, page_id, message)
        due = self._due[layer].reshape(-1)
        self._num_due[layer] -= np.count_nonzero(due[slots])
        due[slots] = False

    def _check_layer(self, function: str, layer: int) -> None:
        if type(layer) is not int or not 0 <= layer < len(self._due):
            whole_number(function, "layer", layer, 0, len(self._due) - 1)

    def _slots(self, function: str, slots: np.ndarray) -> np.ndarray:
        """``slots`` as an array of one dimension, all of pages that there are notes for."""
        try:
            array = np.asarray(slots)
        except (TypeError, ValueError):  # ValueError: lists of several lengths
            fail(function, "slots must be an array of slots", kind_of(slots))
        if array.shape == (0,):
            return np.zeros(0, np.int32)
        if array.ndim != 1 or array.dtype.kind not in "iu":
            fail(function, "slots must be whole numbers [tokens]", f"{array.dtype} {array.shape}")
        if not -1 <= array.min() <= array.max() < self._notes.size:
            fail(function, f"slots must be in [-1, {self._notes.size})", array.tolist())
        return array

    def _counts_of(self, page_ids: np.ndarray) -> np.ndarray:
        return np.asarray(self._allocator.counts)[page_ids]

    # Reading.

    def read(self, layer: int, tables: Sequence[PageTable]) -> None:
        """Verify all that a layer's attention over these tables is going to read.

        Raises:
            CorruptPage: A slot does not hold what its table says.
            ValueError: A table's tokens were never noted.
        """
        self._check_layer("read", layer)
        maps_of("read", tables)
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
        held = self._counts_of(page_ids).all()
        hashes, end = self._notes["hash"][page_ids].reshape(-1), 0
        for table in tables:
            start, end = end, end + len(table.map.ids) * self.page_size
            noted = table.token_hash
            alike = held and table.map.starts is None and not table.map.num_freed
            if not alike or noted is None or len(noted) != table.map.num_tokens:
                self._verify("read", table)
            elif (hashes[start : start + len(noted)] != noted.hashes).any():
                self._verify("read", table)

    def verify(self, table: PageTable) -> None:
        """Compare the pages of a table with the tokens noted for it.

        Raises:
            CorruptPage: They differ; names the first position that does.
            ValueError: The table's tokens were never noted, or more than it has.
        """
        maps_of("verify", (table,))
        self._verify("verify", table)

    def _verify(self, function: str, table: PageTable) -> None:
        noted, length = table.token_hash, table.num_tokens
        if noted is None:
            if length:
                fail(function, "table must have noted tokens, see Canary.note", repr(table))
            return
        if len(noted) < length:
            page_id, offset = table.logical_to_physical(len(noted))
            message = (
                f"slot {offset} of page {page_id} must hold position {len(noted)} of "
                f"sequence {noted.sequence}, which has noted {len(noted)} tokens"
            )
            raise CorruptPage("never written", len(noted), page_id, message)
        if len(noted) > length:
            fail(function, f"table must have the {len(noted)} tokens noted for it", repr(table))
        entries = table.entries
        for entry in entries:
            if not self._allocator.counts[entry.physical_page_id]:
                message = (
                    f"nobody holds page {entry.physical_page_id}, at position {entry.logical_start}"
                )
                raise CorruptPage("free page", entry.logical_start, entry.physical_page_id, message)
        for entry in entries:
            expected = noted.hashes[entry.logical_start : entry.logical_end]
            wrong = self._notes["hash"][entry.physical_page_id, : len(expected)] != expected
            if wrong.any():
                raise self._corrupt(noted, entry, int(np.argmax(wrong)))

    def _corrupt(self, noted: RollingHash, entry: PageTableEntry, offset: int) -> CorruptPage:
        """Say what a slot holds instead of a sequence's token."""
        page_id, position = entry.physical_page_id, entry.logical_start + offset
        _, sequence, at, token = self._notes[page_id, offset].tolist()
        expected = int(noted.tokens[position])
        kind, holds = "other beginning", f"token {token} at position {at} of sequence {sequence}"
        if sequence < 0:
            kind, holds = "never written", "nothing"
        elif at != position or token != expected:
            kind = "other position" if at != position else "other token"
            kind = kind if sequence == noted.sequence else "other sequence"
        message = (
            f"slot {offset} of page {page_id} must hold token {expected} "
            f"at position {position} of sequence {noted.sequence}; it holds {holds}"
        )
        return CorruptPage(kind, position, page_id, message)

    def _verify_layer(self, layer: int, table: PageTable) -> None:
        for entry in table.entries:
            start, page_id = entry.logical_start, entry.physical_page_id
            due = self._due[layer, page_id, : entry.logical_end - start]
            if due.any():
                position = start + int(np.argmax(due))
                message = (
                    f"slot {position - start} of page {page_id} must hold position "
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


def _tokens(function: str, tokens: Tokens) -> np.ndarray:
    """Token ids as int32."""
    return np.frombuffer(pack_tokens(tokens, function), "<i4")


def _state_of(tables: Sequence[PageTable]) -> tuple[bytes, list[int], list[int]]:
    """Return all of the tables that bears on what they should hold; equal means unchanged."""
    return (
        b"".join([table.map.ids for table in tables]),
        [table.map.version for table in tables],
        [table.map.num_tokens for table in tables],
    )
