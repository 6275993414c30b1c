"""From logical positions to pages: append, truncate, fork, release, seal, free_before."""

import numpy as np
import pytest
from page_helpers import FailingPool, RecordingPool, snapshot, table_of
from paged_mlx.errors import OutOfPages
from paged_mlx.pages.page_map import PageTableEntry
from paged_mlx.pages.policies import BuddyPageAllocator, FIFOPageAllocator, PageAllocator
from paged_mlx.pages.table import PageTable, append_batch, share_prefix


@pytest.fixture
def allocator():
    return PageAllocator(16, 4)


def test_append_fills_the_tail_page_before_it_takes_a_new_one(allocator):
    table = PageTable(4)
    plans = [table.append_tokens(n, allocator) for n in (3, 1, 2)]
    assert [plan.slots.tolist() for plan in plans] == [[0, 1, 2], [3], [4, 5]]
    assert all(plan.copies == [] and plan.slots.dtype == np.int32 for plan in plans)
    assert table.entries == [PageTableEntry(0, 4, 0, False), PageTableEntry(4, 6, 1, False)]
    allocator.check([table])


def test_append_of_no_tokens_changes_nothing(allocator):
    table = PageTable(4)
    assert table.append_tokens(0, allocator).slots.shape == (0,)
    assert table.num_pages == 0 and table.allocator is None
    table.append_tokens(3, allocator)
    before = snapshot(allocator, table)
    table.append_tokens(0, allocator)
    assert snapshot(allocator, table) == before


def test_every_position_is_where_append_said_it_would_be(allocator):
    table = PageTable(4)
    slots = np.concatenate([table.append_tokens(n, allocator).slots for n in (5, 1, 9, 4)])
    assert len(set(slots.tolist())) == 19
    for position, slot in enumerate(slots.tolist()):
        assert table.logical_to_physical(position) == divmod(slot, 4)
    assert table.slots().tolist() == slots.tolist()
    assert table.slots(3, 7).tolist() == slots[3:7].tolist()
    assert table.slots(3, 3).shape == (0,)


@pytest.mark.parametrize("position", [-1, 6, 2**40, "0", 1.0])
def test_positions_outside_the_table_are_errors(allocator, position):
    table = table_of(allocator, 6)
    with pytest.raises(ValueError, match=r"^\[logical_to_physical\] logical_pos must be .*; got"):
        table.logical_to_physical(position)


def test_append_that_runs_out_of_pages_changes_nothing(allocator):
    pool = RecordingPool()
    allocator.attach(pool)
    table = table_of(allocator, 6)
    fork = table.fork()
    others = table_of(allocator, 13 * 4)
    before = snapshot(allocator, table, fork, others)
    with pytest.raises(
        OutOfPages,
        match=r"^\[append_tokens\] the pool must have 2 pages .*, 1 of them for copies; got 1 of 16",
    ):
        fork.append_tokens(3, allocator)
    assert snapshot(allocator, table, fork, others) == before and pool.copies == []
    others.release()
    assert fork.append_tokens(3, allocator).copies == pool.copies[0]
    allocator.check([table, fork])


def test_append_whose_copy_fails_changes_nothing(allocator):
    pool = FailingPool()
    allocator.attach(pool)
    table = table_of(allocator, 6)
    fork = table.fork()
    before = snapshot(allocator, table, fork)
    with pytest.raises(MemoryError):
        fork.append_tokens(3, allocator)
    assert snapshot(allocator, table, fork) == before


@pytest.mark.parametrize("count", [-1, 1.5, "3", None])
def test_append_of_an_impossible_count_is_an_error(allocator, count):
    table = table_of(allocator, 6)
    before = snapshot(allocator, table)
    with pytest.raises(ValueError, match=r"^\[append_tokens\] num_tokens must be a whole number"):
        table.append_tokens(count, allocator)
    assert snapshot(allocator, table) == before


def test_a_table_keeps_to_its_allocator_until_it_is_released(allocator):
    other = PageAllocator(16, 4)
    table = table_of(allocator, 3)
    with pytest.raises(
        ValueError, match="allocator must be the one that the table's pages came from"
    ):
        table.append_tokens(1, other)
    table.release()
    assert table.append_tokens(1, other).slots.tolist() == [0]
    allocator.check([])


def test_a_table_refuses_an_allocator_of_another_page_size():
    with pytest.raises(ValueError, match="allocator.page_size must be 4, as the table's; got 8"):
        PageTable(4).append_tokens(1, PageAllocator(4, 8))
    with pytest.raises(ValueError, match=r"^\[PageTable\] page_size must be .* at least 1; got 0"):
        PageTable(0)


# A batch.


def test_append_batch_takes_pages_for_all_tables_or_for_none(allocator):
    tables = [table_of(allocator, n) for n in (4, 3, 8)]
    plan = append_batch(tables, [1, 2, 0], allocator)
    assert [t.num_tokens for t in tables] == [5, 5, 8]
    assert plan.slots.tolist() == [*tables[0].slots(4), *tables[1].slots(3)]
    before = snapshot(allocator, *tables)
    with pytest.raises(OutOfPages):
        append_batch(tables, [4, 4, 40], allocator)
    assert snapshot(allocator, *tables) == before
    allocator.check(tables)


def test_append_batch_copies_for_every_fork_but_the_last_in_one_operation(allocator):
    pool = RecordingPool()
    allocator.attach(pool)
    first = table_of(allocator, 3)
    tables = [first, first.fork(), first.fork()]
    plan = append_batch(tables, [1, 1, 1], allocator)
    assert pool.copies == [plan.copies] and [source for source, _ in plan.copies] == [0, 0]
    assert tables[2].page_ids == [0] and len({t.page_ids[0] for t in tables}) == 3
    allocator.check(tables)


def test_append_batch_refuses_a_table_given_twice_and_missing_counts(allocator):
    table = table_of(allocator, 3)
    before = snapshot(allocator, table)
    with pytest.raises(ValueError, match="tables must be different ones"):
        append_batch([table, table], [1, 1], allocator)
    with pytest.raises(ValueError, match="num_tokens must have one count per table, 1; got 2"):
        append_batch([table], [1, 1], allocator)
    assert snapshot(allocator, table) == before


# Truncate.


def test_truncate_gives_back_the_pages_past_the_new_end(allocator):
    table = table_of(allocator, 11)
    table.truncate(5)
    assert table.entries == [PageTableEntry(0, 4, 0, False), PageTableEntry(4, 5, 1, False)]
    assert allocator.num_used == 2
    assert table.append_tokens(1, allocator).slots.tolist() == [5]
    table.truncate(4)
    assert table.num_pages == 1
    table.truncate(0)
    assert table.num_pages == 0 and allocator.num_used == 0
    allocator.check([table])


def test_truncate_into_a_shared_page_copies_it_at_the_next_append(allocator):
    table = table_of(allocator, 8)
    fork = table.fork()
    fork.truncate(6)
    plan = fork.append_tokens(1, allocator)
    assert plan.copies == [(1, 2)] and plan.slots.tolist() == [2 * 4 + 2]
    assert table.page_ids == [0, 1] and fork.page_ids == [0, 2]
    allocator.check([table, fork])


def test_truncate_past_the_end_is_an_error(allocator):
    table = table_of(allocator, 6)
    with pytest.raises(ValueError, match=r"^\[truncate\] length must be at most 6"):
        table.truncate(7)
    assert table.num_tokens == 6


# Fork and release.


def test_fork_shares_every_page_and_takes_none(allocator):
    table = table_of(allocator, 6)
    fork = table.fork()
    assert fork.page_ids == table.page_ids == [0, 1] and allocator.num_used == 2
    assert all(entry.is_cow for entry in table.entries + fork.entries)
    table.release()
    assert [entry.is_cow for entry in fork.entries] == [False, False]
    assert fork.num_tokens == 6 and table.num_tokens == 0
    fork.release()
    fork.release()
    assert allocator.num_used == 0
    allocator.check([table, fork])


def test_fork_of_an_empty_table_is_empty(allocator):
    assert PageTable(4).fork().append_tokens(1, allocator).slots.tolist() == [0]


def test_a_fork_of_a_sealed_table_is_sealed(allocator):
    table = table_of(allocator, 2)
    table.seal()
    fork = table.fork()
    assert fork.is_sealed
    assert fork.append_tokens(1, allocator).copies == [] and fork.is_ragged
    assert fork.page_ids == [0, 1] and table.page_ids == [0] and table.is_sealed
    allocator.check([table, fork])


def test_a_fork_has_the_window_and_the_gaps_of_its_table_and_changes_alone(allocator):
    table = table_of(allocator, 6)
    table.seal()
    table.append_tokens(5, allocator)
    table.free_before(6)
    fork = table.fork()
    assert (fork.entries, fork.num_freed, fork.is_ragged) == (table.entries, 2, True)
    fork.free_before(10)
    fork.append_tokens(9, allocator)
    assert fork.num_freed == 3 and fork.num_tokens == 20
    assert table.num_freed == 2 and table.slots(6).tolist() == [8, 9, 10, 11, 12]
    table.seal()
    table.append_tokens(6, allocator)
    ends = [(entry.logical_start, entry.logical_end) for entry in table.entries]
    assert ends == [(6, 10), (10, 11), (11, 15), (15, 17)]
    ends = [(entry.logical_start, entry.logical_end) for entry in fork.entries]
    assert ends == [(10, 14), (14, 18), (18, 20)]
    allocator.check([table, fork])


# Adopted pages.


def test_adopting_pages_shares_them(allocator):
    table = table_of(allocator, 10)
    other = PageTable(4)
    other.adopt([-1, *table.page_ids[1:]], 10, allocator)
    assert other.page_ids == [1, 2] and other.num_freed == 1
    assert other.append_tokens(1, allocator).copies == [(2, 3)]
    allocator.check([table, other])


@pytest.mark.parametrize(
    ("page_ids", "num_tokens", "match"),
    [
        ([0, 0], 8, "must be different pages; got one twice"),
        ([0, 1], 4, "page_ids must be 1 pages for 4 tokens; got 2"),
        ([0], 5, "page_ids must be 2 pages for 5 tokens; got 1"),
        ([0, 9], 8, "must be held by somebody"),
        ([0, -1], 8, r"must be in \[0, 16\)"),
    ],
)
def test_adopting_pages_that_do_not_fit_is_an_error(allocator, page_ids, num_tokens, match):
    table, other = table_of(allocator, 8), PageTable(4)
    before = snapshot(allocator, table, other)
    with pytest.raises(ValueError, match=match):
        other.adopt(page_ids, num_tokens, allocator)
    with pytest.raises(ValueError, match="table must be empty; got 8 tokens"):
        table.adopt([0], 4, allocator)
    assert snapshot(allocator, table, other) == before


# Running out of pages, and going on.


@pytest.mark.parametrize("kind", [PageAllocator, FIFOPageAllocator, BuddyPageAllocator])
@pytest.mark.parametrize("spare", range(6))
def test_a_batch_that_runs_out_of_pages_goes_on_when_there_are_some(kind, spare):
    allocator = kind(16, 4)
    pool = RecordingPool()
    allocator.attach(pool)
    plain, shared, sealed = (table_of(allocator, n) for n in (4, 6, 3))
    fork = shared.fork()
    sealed.seal()
    tables, counts = [plain, shared, fork, sealed], [5, 1, 3, 2]  # 2 + a copy + 1 + 1 pages
    stray = allocator.allocate_pages(allocator.num_free - spare)
    before = snapshot(allocator, *tables)
    if spare < 5:
        with pytest.raises(OutOfPages, match=f"5 pages to give, 1 of them for copies; got {spare}"):
            append_batch(tables, counts, allocator)
        assert snapshot(allocator, *tables) == before and pool.copies == []
    allocator.free_pages(stray)
    appended = append_batch(tables, counts, allocator)
    assert [table.num_tokens for table in tables] == [9, 7, 9, 5]
    ends = [table.slots(table.num_tokens - n).tolist() for table, n in zip(tables, counts)]
    assert appended.slots.tolist() == sum(ends, [])
    assert pool.copies == [appended.copies] and len(appended.copies) == 1
    allocator.check(tables)


# Sealed pages.


def test_a_sealed_tail_page_takes_no_more_tokens(allocator):
    table = table_of(allocator, 3)
    table.seal()
    assert table.append_tokens(6, allocator).slots.tolist() == [4, 5, 6, 7, 8, 9]
    assert [(e.logical_start, e.logical_end) for e in table.entries] == [(0, 3), (3, 7), (7, 9)]
    assert table.is_ragged and not table.is_sealed
    assert [table.logical_to_physical(p) for p in (2, 3, 6, 7)] == [(0, 2), (1, 0), (1, 3), (2, 0)]
    assert table.slots().tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert table.append_tokens(3, allocator).slots.tolist() == [10, 11, 12]
    allocator.check([table])


@pytest.mark.parametrize("num_tokens", [0, 4])
def test_sealing_a_page_without_room_makes_no_difference(allocator, num_tokens):
    table = table_of(allocator, num_tokens)
    table.seal()
    table.append_tokens(2, allocator)
    assert not table.is_ragged and table.num_tokens == num_tokens + 2


def test_truncating_a_ragged_table_before_its_gap_makes_it_uniform(allocator):
    table = table_of(allocator, 3)
    table.seal()
    table.append_tokens(5, allocator)
    table.truncate(5)
    assert table.is_ragged and table.entries[-1] == PageTableEntry(3, 5, 1, False)
    table.truncate(3)
    assert not table.is_ragged
    assert table.append_tokens(1, allocator).slots.tolist() == [3]
    allocator.check([table])


# Behind a sliding window.


def test_free_before_gives_back_pages_wholly_behind_the_window(allocator):
    table = table_of(allocator, 11)
    assert table.free_before(7) == 1
    assert table.free_before(7) == 0
    assert allocator.ref_count(0) == 0 and table.num_pages == 2 and table.num_freed == 1
    assert [(e.logical_start, e.logical_end, e.physical_page_id) for e in table.entries] == [
        (4, 8, 1),
        (8, 11, 2),
    ]
    assert table.logical_to_physical(4) == (1, 0)
    with pytest.raises(
        ValueError, match="logical_pos must be at least 4, because the pages before were given back"
    ):
        table.logical_to_physical(3)
    with pytest.raises(ValueError, match="logical_pos must be at least 4"):
        table.slots(2, 6)
    assert table.append_tokens(2, allocator).slots.tolist() == [11, 0]
    allocator.check([table])


def test_free_before_keeps_a_tail_page_with_room(allocator):
    table = table_of(allocator, 6)
    assert table.free_before(6) == 1 and table.page_ids == [1]
    table.append_tokens(2, allocator)
    assert table.free_before(8) == 1 and table.page_ids == []
    assert table.append_tokens(1, allocator).slots.shape == (1,)
    assert table.logical_to_physical(8) == (table.page_ids[0], 0)
    allocator.check([table])


def test_free_before_a_position_past_the_end_is_an_error(allocator):
    table = table_of(allocator, 6)
    with pytest.raises(ValueError, match=r"^\[free_before\] position must be at most 6"):
        table.free_before(7)


def test_truncate_before_a_page_that_was_given_back_is_an_error(allocator):
    table = table_of(allocator, 11)
    table.free_before(8)
    before = snapshot(allocator, table)
    with pytest.raises(ValueError, match="length must be 0 or at least 8"):
        table.truncate(7)
    assert snapshot(allocator, table) == before
    table.truncate(8)
    assert table.append_tokens(1, allocator) and table.logical_to_physical(8)[1] == 0
    table.truncate(0)
    assert table.num_freed == 0 and allocator.num_used == 0


def test_a_ragged_table_gives_back_pages_and_grows_on(allocator):
    table = table_of(allocator, 3)
    table.seal()
    table.append_tokens(6, allocator)  # entries [0, 3) [3, 7) [7, 9)
    assert table.free_before(6) == 1 and table.free_before(7) == 1
    table.truncate(7)
    assert table.page_ids == []
    table.append_tokens(5, allocator)
    assert [(e.logical_start, e.logical_end) for e in table.entries] == [(7, 11), (11, 12)]
    allocator.check([table])


def test_truncating_to_a_part_filled_page_that_was_given_back_starts_a_new_page(allocator):
    table = table_of(allocator, 7)
    table.seal()
    table.append_tokens(2, allocator)  # entries [0, 4) [4, 7) [7, 9)
    table.free_before(7)
    table.truncate(7)
    assert table.append_tokens(1, allocator).slots % 4 == 0
    assert table.logical_to_physical(7) == (table.page_ids[0], 0)
    allocator.check([table])


def test_a_fork_of_a_windowed_table_shares_the_pages_that_are_left(allocator):
    table = table_of(allocator, 11)
    table.free_before(8)
    fork = table.fork()
    assert fork.entries == table.entries and fork.num_freed == 2
    allocator.check([table, fork])


# Sharing a prefix.


def test_the_picture_of_three_requests_on_four_pages():
    for allocator in (PageAllocator(8, 4), FIFOPageAllocator(8, 4)):
        a, b, c = PageTable(4), PageTable(4), PageTable(4)
        a.append_tokens(3, allocator)  # The quick brown
        share_prefix(a, b, 3, partial="seal")
        a.append_tokens(3, allocator)  # fox jumps over
        b.append_tokens(3, allocator)  # cat runs fast
        c.append_tokens(2, allocator)  # Hello world
        assert [t.page_ids for t in (a, b, c)] == [[0, 1], [0, 2], [3]]
        assert [(e.logical_start, e.logical_end) for e in b.entries] == [(0, 3), (3, 6)]
        assert [allocator.ref_count(page_id) for page_id in range(5)] == [2, 1, 1, 1, 0]
        allocator.check([a, b, c])


def test_sharing_whole_pages_copies_nothing_later(allocator):
    source, target = table_of(allocator, 10), PageTable(4)
    share_prefix(source, target, 8)
    assert target.page_ids == source.page_ids[:2]
    assert target.append_tokens(3, allocator).copies == []
    assert source.append_tokens(2, allocator).copies == []
    allocator.check([source, target])


@pytest.mark.parametrize("partial", ["copy", "seal"])
def test_sharing_part_of_a_page_keeps_the_source_as_it_was(allocator, partial):
    source, target = table_of(allocator, 10), PageTable(4)
    slots = source.slots().tolist()
    share_prefix(source, target, 6, partial=partial)
    plan = target.append_tokens(1, allocator)
    assert source.slots().tolist() == slots and not source.is_ragged
    assert plan.copies == ([(1, 3)] if partial == "copy" else [])
    assert target.logical_to_physical(5) == ((3, 1) if partial == "copy" else (1, 1))
    assert target.logical_to_physical(6) == ((3, 2) if partial == "copy" else (3, 0))
    allocator.check([source, target])


def test_sharing_a_ragged_prefix_keeps_its_gaps(allocator):
    source, target = table_of(allocator, 3), PageTable(4)
    source.seal()
    source.append_tokens(6, allocator)
    share_prefix(source, target, 8)
    assert [(e.logical_start, e.logical_end) for e in target.entries] == [(0, 3), (3, 7), (7, 8)]
    other = PageTable(4)
    share_prefix(source, other, 2)
    assert not other.is_ragged and other.num_tokens == 2
    allocator.check([source, target, other])


def test_sharing_nothing_leaves_the_target_empty(allocator):
    target = PageTable(4)
    share_prefix(table_of(allocator, 5), target, 0)
    assert target.num_tokens == 0 and target.allocator is None


def test_share_prefix_refuses_what_it_cannot_do(allocator):
    source, target = table_of(allocator, 6), PageTable(4)
    windowed = table_of(allocator, 9)
    windowed.free_before(4)
    foreign = table_of(PageAllocator(4, 4), 4)
    foreign.truncate(0)
    before = snapshot(allocator, source, target, windowed)
    for arguments, must in [
        ((source, target, 7), "prefix_length must be at most 6"),
        ((source, target, -1), "prefix_length must be a whole number"),
        ((source, target, 3, "move"), 'partial must be "copy" or "seal"'),
        ((source, source, 3), "target_table must be empty and not the source"),
        ((source, windowed, 3), "target_table must be empty"),
        ((source, PageTable(8), 3), "target_table.page_size must be 4"),
        ((source, foreign, 3), "target_table must belong to no allocator"),
        ((windowed, target, 6), "source_table must hold its whole prefix"),
    ]:
        with pytest.raises(ValueError, match=must):
            share_prefix(*arguments)
    assert snapshot(allocator, source, target, windowed) == before


def test_a_table_can_begin_behind_a_window(allocator):
    table = PageTable(4)
    table.skip(12, allocator)
    assert table.num_tokens == 12 and table.num_freed == 3 and table.num_pages == 0
    assert table.append_tokens(5, allocator).slots.tolist() == [0, 1, 2, 3, 4]
    assert [entry.logical_start for entry in table.entries] == [12, 16]
    with pytest.raises(ValueError, match="logical_pos must be at least 12"):
        table.logical_to_physical(11)
    allocator.check([table])
    for tokens, used, must in [(4, table, "table must be empty"), (5, PageTable(4), "a multiple")]:
        with pytest.raises(ValueError, match=must):
            used.skip(tokens, allocator)
