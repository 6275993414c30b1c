"""Two tables on the same pages: how that begins and how it ends."""

from __future__ import annotations

from typing import TYPE_CHECKING

from paged_mlx.errors import OutOfPages, fail, whole_number
from paged_mlx.pages.allocator import PageAllocator

if TYPE_CHECKING:
    from paged_mlx.pages.table import PageTable


def share_prefix(
    source_table: PageTable, target_table: PageTable, prefix_length: int, partial: str = "copy"
) -> None:
    """Let an empty table begin with the first ``prefix_length`` tokens of another.

    Args:
        source_table: Holds the tokens.
        target_table: Empty; shares the pages afterwards.
        prefix_length: Tokens to share.
        partial: What happens to a page that the prefix fills in part. ``"copy"``: whoever
            writes to it first copies it, except its last holder. ``"seal"``: it stays
            shared for good, and the next token after the prefix starts a new page.

    Raises:
        ValueError: An argument is wrong, or the source gave back pages of the prefix.
    """
    name, source, target = "share_prefix", source_table, target_table
    prefix_length = whole_number(name, "prefix_length", prefix_length)
    if partial not in ("copy", "seal"):
        fail(name, 'partial must be "copy" or "seal"', repr(partial))
    if prefix_length > source._num_tokens:
        fail(
            name,
            f"prefix_length must be at most {source._num_tokens}, the tokens of the source",
            prefix_length,
        )
    if target._num_tokens or target is source:
        fail(name, "target_table must be empty and not the source", repr(target))
    if target._page_size != source._page_size:
        fail(
            name,
            f"target_table.page_size must be {source._page_size}, as the source's",
            target._page_size,
        )
    if target._allocator not in (None, source._allocator):
        fail(
            name,
            "target_table must belong to no allocator, or to the source's",
            repr(target._allocator),
        )
    if not prefix_length:
        return
    if source._num_freed:
        fail(
            name,
            "source_table must hold its whole prefix",
            f"one whose pages before position {source._first_kept()} were given back",
        )
    kept = source._entries_covering(prefix_length)
    target._adopt(source._pages[:kept], prefix_length, source._allocator)
    if source.trail is not None:
        target.trail = source.trail.fork(prefix_length)
    if source._starts is not None and source._starts[kept - 1] != (kept - 1) * source._page_size:
        target._starts = source._starts[:kept]
    if partial == "seal" and target._tail_len() < target._page_size:
        target.seal()
        if source._num_tokens == prefix_length:
            source.seal()


def copy_on_write(page_table: PageTable, logical_pos: int, page_allocator: PageAllocator) -> bool:
    """Make the page of a position the table's own before it is written to.

    Returns:
        True when the page was shared and has been copied; False when the table is its
        last holder, who never copies.

    Raises:
        OutOfPages: There is no page to copy to; nothing has changed.
        ValueError: The position is not in the table, or the allocator is not its own.
    """
    page_table._check_allocator("copy_on_write", page_allocator)
    index, _ = page_table._locate("copy_on_write", logical_pos)
    source = page_table._pages[index]
    if page_allocator.ref_count(source) == 1:
        return False
    target = page_allocator.allocate_page()
    if target is None and page_allocator.is_watched(source):
        if page_allocator.ref_count(source) == 2:  # the table and a cache, which lets go
            page_allocator.forget_pages([source])
            return False
    if target is None:
        fail(
            "copy_on_write",
            "the pool must have a free page",
            f"0 of {page_allocator.total_pages}",
            OutOfPages,
        )
    try:
        page_allocator.copy_pages([(source, target)])
    except BaseException:
        page_allocator.free_page(target)
        raise
    page_table._replace(index, target)
    return True
