"""The memory that paging and sharing save, counted with the page manager itself.

static   every sequence reserves max_seq_len tokens
paged    every sequence holds whole pages, and wastes part of its last one
shared   sequences of a group hold the pages of their common prefix together
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from paged_mlx.errors import as_list, check_flag, fail, kind_of, whole_number
from paged_mlx.pages.policies import PageAllocator
from paged_mlx.pages.table import PageTable, share_prefix

LENGTHS = (100, 500, 50, 1500, 200, 800, 150, 1000, 300, 600, 75, 1200, 400, 900, 250, 700)
PAGE_SIZES = (8, 16, 32, 64, 128, 256)


@dataclass(frozen=True, slots=True)
class PrefixGroup:
    """Sequences ``members`` (indices) begin with the same ``length`` tokens."""

    length: int
    members: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """One way to keep K and V of a batch.

    Attributes:
        name: ``"static"``, ``"paged"`` or ``"shared"``.
        page_size: Tokens in a page; for static, those reserved per sequence.
        slots: Tokens there is room for.
        unused_slots: Those that hold no token.
        bytes: The room in bytes.
        saved: Share of the static bytes that is not needed.
    """

    name: str
    page_size: int
    slots: int
    unused_slots: int
    bytes: int
    saved: float

    @property
    def waste(self) -> float:
        """Share of the room that holds no token."""
        return self.unused_slots / self.slots if self.slots else 0.0


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """The three ways at one page size, and paging and sharing at several."""

    static: MemoryUse
    paged: MemoryUse
    shared: MemoryUse
    by_page_size: tuple[tuple[MemoryUse, MemoryUse], ...]  # (paged, shared)
    groups: tuple[PrefixGroup, ...]

    @property
    def saved_by_sharing(self) -> float:
        """Share of the paged bytes that sharing saves."""
        return 1.0 - self.shared.bytes / self.paged.bytes

    def __str__(self) -> str:
        lines = [f"{'':8}{'tokens kept':>12}{'room':>10}{'waste':>8}{'bytes':>16}{'saved':>8}"]
        for use in (self.static, self.paged, self.shared):
            kept = use.slots - use.unused_slots
            room = f"{kept:>12,}{use.slots:>10,}{use.waste:>8.1%}"
            lines.append(f"{use.name:8}{room}{use.bytes:>16,}{use.saved:>8.1%}")
        members = sum(len(group.members) for group in self.groups)
        lines.append(
            f"sharing saves {self.saved_by_sharing:.1%} of the paged bytes "
            f"(prefix groups: {len(self.groups)}, sequences in them: {members})"
        )
        heads = f"{'page size':>9}{'waste':>9}{'paged':>16}{'saved':>8}{'shared':>16}{'saved':>8}"
        lines += ["", heads]
        for paged, shared in self.by_page_size:
            savings = (
                f"{paged.bytes:>16,}{paged.saved:>8.1%}{shared.bytes:>16,}{shared.saved:>8.1%}"
            )
            lines.append(f"{paged.page_size:>9}{paged.waste:>9.1%}{savings}")
        return "\n".join(lines)


def analyze_memory_efficiency(
    lengths: Sequence[int] = LENGTHS,
    *,
    max_seq_len: int | None = None,
    page_size: int = 16,
    prefix_groups: Sequence[PrefixGroup | tuple[int, Sequence[int]]] | None = None,
    token_bytes: int = 8,
    page_sizes: Sequence[int] = PAGE_SIZES,
    show: bool = True,
) -> MemoryReport:
    """Compare static, paged and shared K and V for a batch of sequences.

    Args:
        lengths: Tokens of each sequence; default the course chapter's batch of 16.
        max_seq_len: Tokens that static allocation reserves for each; default 2048, or the longest
            sequence if that is longer.
        page_size: Tokens in a page.
        prefix_groups: ``(length, members)`` of each group that begins alike, no sequence in
            two; default all of the batch with the whole pages that the shortest one fills.
        token_bytes: Bytes of one token's K and V, as from ``bytes_per_token``.
        page_sizes: For the comparison by page size.
        show: Print the report.

    Raises:
        ValueError: An argument is wrong.
    """
    name = "analyze_memory_efficiency"
    show = check_flag(name, "show", show)
    lengths = _numbers("lengths", lengths, 1)
    if not lengths:
        fail(name, "lengths must have at least one sequence", "none")
    longest = max(lengths)
    max_seq_len = (
        max(2048, longest)
        if max_seq_len is None
        else whole_number(name, "max_seq_len", max_seq_len)
    )
    if max_seq_len < longest:
        fail(name, f"max_seq_len must be at least {longest}, the longest sequence", max_seq_len)
    page_size = whole_number(name, "page_size", page_size, 1)
    token_bytes = whole_number(name, "token_bytes", token_bytes, 1)
    groups = _checked_groups(prefix_groups, lengths, page_size)
    static_slots = len(lengths) * max_seq_len

    def use(kind: str, size: int, slots: int, kept: int) -> MemoryUse:
        return MemoryUse(
            kind, size, slots, slots - kept, slots * token_bytes, 1.0 - slots / static_slots
        )

    def at(size: int) -> tuple[MemoryUse, MemoryUse]:
        return use("paged", size, *_count(lengths, (), size)), use(
            "shared", size, *_count(lengths, groups, size)
        )

    paged, shared = at(page_size)
    sizes = sorted(set(_numbers("page_sizes", page_sizes, 1)))
    static = use("static", max_seq_len, static_slots, sum(lengths))
    report = MemoryReport(static, paged, shared, tuple(at(size) for size in sizes), groups)
    if show:
        print(report)
    return report


def _checked_groups(
    groups: Sequence[Any] | None, lengths: Sequence[int], page_size: int
) -> tuple[PrefixGroup, ...]:
    name = "analyze_memory_efficiency"
    if groups is None:
        return (PrefixGroup(min(lengths) // page_size * page_size, tuple(range(len(lengths)))),)
    checked = []
    for group in as_list(name, "prefix_groups", groups, "groups"):
        if isinstance(group, PrefixGroup):
            group = group.length, group.members
        if not isinstance(group, (tuple, list)) or len(group) != 2:
            fail(name, "prefix_groups must be pairs (length, members)", kind_of(group))
        length, members = group
        members = tuple(_numbers("members", members))
        if not members or max(members) >= len(lengths):
            fail(name, f"members must be indices of lengths, below {len(lengths)}", members)
        length, shortest = (
            whole_number(name, "length", length),
            min(lengths[member] for member in members),
        )
        if length > shortest:
            fail(
                name, f"a group's length must be at most {shortest}, its shortest member's", length
            )
        checked.append(PrefixGroup(length, members))
    members = [member for group in checked for member in group.members]
    if len(set(members)) < len(members):
        fail(name, "prefix_groups must have each sequence once at most", "one twice")
    return tuple(checked)


def _numbers(what: str, values: Sequence[int], minimum: int = 0) -> list[int]:
    name = "analyze_memory_efficiency"
    listed = as_list(name, what, values, "whole numbers")
    return [whole_number(name, what, value, minimum) for value in listed]


def _count(
    lengths: Sequence[int], groups: Sequence[PrefixGroup], page_size: int
) -> tuple[int, int]:
    """Build the batch's page tables; return the slots of their pages and the tokens in them."""
    allocator = PageAllocator(sum(-(-length // page_size) for length in lengths), page_size)
    tables = [PageTable(page_size) for _ in lengths]
    for group in groups:
        first, *others = group.members
        tables[first].append_tokens(group.length, allocator)
        for member in others:
            share_prefix(tables[first], tables[member], group.length)
    for table, length in zip(tables, lengths):
        table.append_tokens(length - table.num_tokens, allocator)
    filled = {
        entry.physical_page_id: entry.logical_end - entry.logical_start
        for table in tables
        for entry in table.entries
    }
    return allocator.num_used * page_size, sum(filled.values())
