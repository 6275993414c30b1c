"""The open pages: where their K and V lie, and when they may be quantised.

Of a format that quantises a page as a whole. A page of the pool is

    unknown   nothing was written to it since it was free
    open      its tokens lie in a slot of the open arrays, which have one for each open page
    sealed    its tokens are codes, or will be: a step that fills a page quantises it as it writes

No arrays are here: what is decided is plain data, and the pool turns it into operations.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from paged_mlx.errors import fail

_UNKNOWN, _SEALED = -2, -1  # in place of the slot of an open page


@dataclass(frozen=True, slots=True)
class Split:
    """Where a write's tokens go.

    Attributes:
        tokens: Of those for open pages, their indices; None: all are.
        slots: Where they go, ``open slot * page_size + offset``.
        open_slots, ends: The open pages that are written, and where the tokens in each end.
        whole_tokens: ``[pages, page_size]``, the indices of the tokens that fill a page each.
        whole_pages: Those pages.
    """

    tokens: np.ndarray | None
    slots: np.ndarray
    open_slots: np.ndarray
    ends: np.ndarray
    whole_tokens: np.ndarray
    whole_pages: np.ndarray


class OpenPages:
    """The open pages of a pool.

    A page is due to be quantised when every layer has written all its tokens. It waits until no
    append is left whose tokens are not written in all layers: until then a plan may name its
    slot.

    Args:
        num_layers: Layers of the pool.
        num_pages: Pages of the pool.
        page_size: Tokens in a page.
        num_slots: Open pages that there is memory for.

    Attributes:
        version: Changes whenever a page is opened or sealed.
    """

    def __init__(self, num_layers: int, num_pages: int, page_size: int, num_slots: int) -> None:
        self.page_size = page_size
        self.version = 0
        self._slot = np.full(num_pages, _UNKNOWN, np.int32)  # of each page
        self._page = np.full(num_slots, -1, np.int32)  # of each slot
        self._written = np.zeros((num_layers, num_slots), np.int32)
        self._free = list(range(num_slots))[::-1]
        self._awaited: dict[int, np.ndarray] = {}  # appended page -> tokens still to be written

    def __repr__(self) -> str:
        return f"OpenPages({self.num_open} of {self.num_slots} slots)"

    # Size

    @property
    def num_slots(self) -> int:
        """Open pages that there is memory for."""
        return len(self._page)

    @property
    def num_open(self) -> int:
        """Open pages."""
        return self.num_slots - len(self._free)

    @property
    def num_free(self) -> int:
        """Slots that no page has."""
        return len(self._free)

    def add_slots(self, num_slots: int) -> None:
        """There is memory for more open pages."""
        before = self.num_slots
        self._page = np.pad(self._page, (0, num_slots), constant_values=-1)
        self._written = np.pad(self._written, ((0, 0), (0, num_slots)))
        self._free[:0] = range(before, before + num_slots)[::-1]

    def drop_slots(self) -> int:
        """Forget the slots behind the last one that a page has, but one; return how many are left."""
        taken = np.flatnonzero(self._page >= 0)
        left = max(1, int(taken[-1]) + 1 if taken.size else 1)
        self._page, self._written = self._page[:left].copy(), self._written[:, :left].copy()
        self._free = [slot for slot in self._free if slot < left]
        return left

    def resize(self, num_pages: int) -> None:
        """The pool has as many pages; those that are gone are not in use."""
        before = len(self._slot)
        self.forget(range(num_pages, before))
        grown = max(0, num_pages - before)
        self._slot = np.pad(self._slot[:num_pages], (0, grown), constant_values=_UNKNOWN)

    # Reading

    @property
    def page_ids(self) -> list[int]:
        """The open pages, by id."""
        return np.flatnonzero(self._slot >= 0).tolist()

    def is_open(self, page_id: int) -> bool:
        """Whether a page is open."""
        return self._slot[page_id] >= 0

    def is_sealed(self, page_id: int) -> bool:
        """Whether a page takes no more tokens."""
        return self._slot[page_id] == _SEALED

    def slot_of(self, page_id: int) -> int:
        """The slot of an open page."""
        return int(self._slot[page_id])

    def slots_of(self, page_ids: np.ndarray) -> np.ndarray:
        """The slots of those that are open."""
        slots = self._slot[page_ids]
        return slots[slots >= 0]

    def kernel_ids(self, tables: np.ndarray) -> np.ndarray:
        """Block tables as kernels read them: an open page is ``num_pages + slot``."""
        inside = (tables >= 0) & (tables < len(self._slot))
        slots = np.where(inside, self._slot[np.where(inside, tables, 0)], _SEALED)
        return np.where(slots >= 0, len(self._slot) + slots, tables).astype(np.int32)

    def unknown(self, page_ids: np.ndarray) -> np.ndarray:
        """Which of some pages nothing was written to; ids outside the pool are known."""
        inside = (page_ids >= 0) & (page_ids < len(self._slot))
        return inside & (self._slot[np.where(inside, page_ids, 0)] == _UNKNOWN)

    def tokens(self, slot: int) -> int:
        """Tokens that every layer has written to an open page."""
        return int(self._written[:, slot].min())

    # Appending and writing

    def appended(self, slots: np.ndarray) -> list[int]:
        """Tokens are to be written next; return the pages that they fill, sealed now.

        Raises:
            AssertionError: There are fewer slots than pages to open; see ``reserve`` of the pool.
        """
        page_ids, first, counts = np.unique(
            slots // self.page_size, return_index=True, return_counts=True
        )
        offsets = slots[first] % self.page_size
        born = []
        for page_id, offset, count in zip(page_ids.tolist(), offsets.tolist(), counts.tolist()):
            if self._slot[page_id] == _UNKNOWN:
                self.begin(page_id, count)
                if count == self.page_size:
                    born.append(page_id)
            slot = self._slot[page_id]
            left = np.full(len(self._written), offset + count)
            if slot >= 0:
                np.minimum(self._written[:, slot], offset, out=self._written[:, slot])
            self._awaited[page_id] = left
        return born

    def begin(self, page_id: int, num_tokens: int) -> None:
        """Take in an unknown page: it is sealed if it is full at once, else open."""
        if num_tokens == self.page_size:
            self._slot[page_id] = _SEALED
        else:
            slot = self._free.pop()
            self._slot[page_id], self._page[slot] = slot, page_id
            self._written[:, slot] = 0
        self.version += 1

    def split(self, op: str, slots: np.ndarray) -> Split:
        """Where the tokens of a write go, whose pages are all known.

        Raises:
            ValueError: A sealed page is named, and not with all its tokens.
        """
        kept = np.flatnonzero(slots >= 0)
        page_ids, offsets = np.divmod(slots[kept], self.page_size)
        slot_of = self._slot[page_ids]
        to_open = slot_of >= 0
        whole = kept[~to_open]
        order = np.argsort(slots[whole], kind="stable")
        whole = whole[order]
        pages, counts = np.unique(page_ids[~to_open], return_counts=True)
        if (counts != self.page_size).any():
            page_id = int(pages[np.argmax(counts != self.page_size)])
            must = (
                f"slot_mapping must name all {self.page_size} slots of page {page_id} at once, or "
                "none: it is sealed, so a write can only fill it as a whole"
            )
            fail(op, must, f"{int(counts[counts != self.page_size][0])} of them")
        slot_of, offsets = slot_of[to_open], offsets[to_open]
        open_slots, inverse = np.unique(slot_of, return_inverse=True)
        ends = np.zeros(len(open_slots), np.int32)
        np.maximum.at(ends, inverse, offsets + 1)
        return Split(
            None if len(slot_of) == len(slots) else kept[to_open].astype(np.int32),
            (slot_of * self.page_size + offsets).astype(np.int32),
            open_slots,
            ends,
            whole.reshape(len(pages), self.page_size).astype(np.int32),
            pages.astype(np.int32),
        )

    def wrote(self, layer: int, split: Split) -> None:
        """A layer has written the tokens of a split."""
        written = self._written[layer]
        written[split.open_slots] = np.maximum(written[split.open_slots], split.ends)
        if self._awaited:
            pages = self._page[split.open_slots].tolist()
            for page_id, end in zip(pages, written[split.open_slots].tolist()):
                self._no_longer_awaited(layer, page_id, end)
            for page_id in split.whole_pages.tolist():
                self._no_longer_awaited(layer, page_id, self.page_size)

    def _no_longer_awaited(self, layer: int, page_id: int, end: int) -> None:
        left = self._awaited.get(page_id)
        if left is not None and end >= left[layer]:
            left[layer] = 0
            if not left.any():
                del self._awaited[page_id]

    # Sealing

    @property
    def is_awaiting(self) -> bool:
        """Whether tokens were appended that not all layers have written."""
        return bool(self._awaited)

    def due(self, kept: Iterable[int] = ()) -> list[tuple[int, int, int]]:
        """``(slot, page, tokens)`` of the full pages, but those of ``kept``."""
        kept = set(kept)
        full = np.flatnonzero((self._written.min(0) == self.page_size) & (self._page >= 0))
        pages = self._page[full]
        return [
            (slot, page_id, self.page_size)
            for slot, page_id in zip(full.tolist(), pages.tolist())
            if page_id not in kept
        ]

    def seal(self, page_ids: Iterable[int]) -> None:
        """These open pages are codes now; their slots are free."""
        for page_id in page_ids:
            self._release(page_id)
            self._slot[page_id] = _SEALED
        self.version += 1

    # Told by the allocator

    def copied(self, pairs: Sequence[tuple[int, int]]) -> None:
        """The target of each pair holds what its source holds; there are slots for the open ones."""
        for source, target in pairs:
            self._release(target)
            slot = self._slot[source]
            if slot < 0:
                self._slot[target] = slot
                continue
            fresh = self._free.pop()
            self._slot[target], self._page[fresh] = fresh, target
            self._written[:, fresh] = self._written[:, slot]
        self.version += 1

    def forget(self, page_ids: Iterable[int]) -> None:
        """Nothing is in these pages any more."""
        for page_id in page_ids:
            self._release(page_id)
            self._slot[page_id] = _UNKNOWN
            self._awaited.pop(page_id, None)
        self.version += 1

    def _release(self, page_id: int) -> None:
        slot = int(self._slot[page_id])
        if slot >= 0:
            self._page[slot] = -1
            self._free.append(slot)

    # Going back

    def copy(self) -> OpenPages:
        """An equal one, to go back to."""
        copy = OpenPages.__new__(OpenPages)
        copy.page_size, copy.version = self.page_size, self.version
        copy._slot, copy._page = self._slot.copy(), self._page.copy()
        copy._written, copy._free = self._written.copy(), self._free[:]
        copy._awaited = {page_id: left.copy() for page_id, left in self._awaited.items()}
        return copy

    def check(self, counts: Sequence[int] | None, sealed: set[int]) -> None:
        """Prove that slots and pages agree, and that pages in use alone have one.

        Args:
            counts: Holders of each page; None: not known.
            sealed: The pages that take no more tokens, as the allocator knows them.

        Raises:
            AssertionError: It names the difference.
        """
        taken = np.flatnonzero(self._page >= 0)
        assert sorted(self._free) == sorted(set(range(self.num_slots)) - set(taken.tolist())), (
            "the free slots are not those without a page"
        )
        open_pages = np.flatnonzero(self._slot >= 0)
        assert (self._slot[self._page[taken]] == taken).all(), "a slot is of a page that is not its"
        assert len(open_pages) == len(taken), "two open pages have one slot"
        if counts is None:
            return
        held = np.asarray(counts) > 0
        for page_id in open_pages.tolist():
            assert page_id < len(held) and held[page_id], f"page {page_id} is open and free"
        for page_id in np.flatnonzero(self._slot == _SEALED).tolist():
            if page_id < len(held) and held[page_id]:
                assert page_id in sealed, f"page {page_id} is sealed and its allocator says not"
