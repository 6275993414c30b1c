"""Stand-ins that the tests of the page manager share."""

from paged_mlx.pages.observers import Pool
from paged_mlx.pages.table import PageTable


class RecordingPool(Pool):
    """A pool without arrays that remembers what it was told; by default of any length."""

    page_size = 4
    num_pages = 0

    def __init__(self, num_pages=2**31):
        self.num_pages = num_pages
        self.copies = []

    def copied(self, pairs):
        self.copies.append(pairs)


class FailingPool(RecordingPool):
    """A pool that can neither copy nor grow."""

    def copied(self, pairs):
        raise MemoryError("no room to copy")

    def grow(self, num_pages):
        raise MemoryError("no room to grow")


def table_of(allocator, num_tokens):
    """A new table of ``num_tokens`` tokens."""
    table = PageTable(allocator.page_size)
    table.append_tokens(num_tokens, allocator)
    return table


def snapshot(allocator, *tables):
    """All that a failed call must leave alone."""
    counts = [allocator.ref_count(page_id) for page_id in range(allocator.total_pages)]
    return (
        counts,
        sorted(allocator._free_ids()),
        [(t.num_tokens, t.entries, t.is_sealed, t.allocator) for t in tables],
    )


def run(cache, tokens, keys=()):
    """Compute a sequence: reuse what is cached, append the rest, cache the result."""
    table = PageTable(4)
    saved = cache.reuse(tokens, table, keys)
    table.append_tokens(len(tokens) - saved, cache._allocator)
    cache.insert(tokens, table, keys)
    return table, saved
