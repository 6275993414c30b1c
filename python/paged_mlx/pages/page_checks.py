"""The proofs behind ``PageAllocator.check``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from paged_mlx.pages.allocator import PageAllocator


def check_counts(allocator: PageAllocator) -> None:
    """Prove that reference counts, free list and evictors agree."""
    counts, free = allocator._counts, sorted(allocator._free_ids())
    assert len(free) == allocator.num_free, (
        f"num_free is {allocator.num_free}, the free list has {len(free)} pages"
    )
    assert len(counts) == allocator.total_pages, (
        f"{len(counts)} counts for {allocator.total_pages} pages"
    )
    assert (counts >= 0).all(), "a reference count is negative"
    assert free == np.flatnonzero(counts == 0).tolist(), (
        "the free list is not the pages of count 0, each once"
    )
    for page_id in allocator._evictors.watched:
        assert counts[page_id] > 0, f"page {page_id} is watched and free"
    for evictor in allocator._evictors:
        if evictor is not allocator and hasattr(evictor, "check"):
            evictor.check()


def check_holders(allocator: PageAllocator, holders: Sequence[Any]) -> None:
    """Prove that every count is the number of holders; each has ``page_ids``."""
    held = allocator._own_references()
    for holder in holders:
        ids = np.asarray(holder.page_ids, dtype=np.int64)
        assert not ids.size or (0 <= ids.min() and ids.max() < len(held)), (
            f"{holder!r} holds an unknown page"
        )
        np.add.at(held, ids, 1)
    for page_id in np.flatnonzero(held != allocator._counts).tolist():
        raise AssertionError(
            f"page {page_id} has ref_count {allocator._counts[page_id]} and {held[page_id]} holders"
        )
