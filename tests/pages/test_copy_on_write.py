"""Copy-on-write: only the page that is written is copied, once, and never by its last holder."""

import pytest
from page_helpers import FailingPool, RecordingPool, snapshot, table_of
from paged_mlx.errors import OutOfPages
from paged_mlx.pages.policies import LRUPageAllocator, PageAllocator
from paged_mlx.pages.table import PageTable, copy_on_write


@pytest.fixture
def allocator():
    return PageAllocator(16, 4)


@pytest.fixture
def pool(allocator):
    pool = RecordingPool()
    allocator.attach(pool)
    return pool


def test_copy_on_write_copies_the_shared_page_of_a_position(allocator, pool):
    table = table_of(allocator, 10)
    fork = table.fork()
    assert copy_on_write(fork, 5, allocator) is True
    assert pool.copies == [[(1, 3)]]
    assert table.page_ids == [0, 1, 2] and fork.page_ids == [0, 3, 2]
    assert [allocator.ref_count(page_id) for page_id in range(4)] == [2, 1, 2, 1]
    assert [entry.is_cow for entry in fork.entries] == [True, False, True]
    allocator.check([table, fork])


def test_copy_on_write_by_the_last_holder_copies_nothing(allocator, pool):
    table = table_of(allocator, 10)
    fork = table.fork()
    table.release()
    assert copy_on_write(fork, 5, allocator) is False
    assert pool.copies == [] and fork.page_ids == [0, 1, 2]


def test_copy_on_write_happens_once_for_a_page(allocator, pool):
    table = table_of(allocator, 10)
    fork = table.fork()
    assert [copy_on_write(t, 5, allocator) for t in (fork, fork, table)] == [True, False, False]
    assert len(pool.copies) == 1


def test_copy_on_write_of_forks_of_forks_copies_for_all_but_the_last(allocator, pool):
    table = table_of(allocator, 6)
    tables = [table]
    for _ in range(4):
        tables.append(tables[-1].fork())
    assert allocator.num_used == 2
    for t in tables:
        t.append_tokens(1, allocator)
    assert len(pool.copies) == 4 and allocator.num_used == 1 + 5
    assert all(t.page_ids[0] == 0 for t in tables)
    assert len({t.page_ids[1] for t in tables}) == 5
    allocator.check(tables)


def test_copy_on_write_append_copies_a_shared_tail_page(allocator, pool):
    table = table_of(allocator, 6)
    fork = table.fork()
    plan = fork.append_tokens(1, allocator)
    assert plan.copies == [(1, 2)] and pool.copies == [[(1, 2)]]
    assert plan.slots.tolist() == [2 * 4 + 2]
    assert table.append_tokens(1, allocator).slots.tolist() == [1 * 4 + 2]
    assert len(pool.copies) == 1


def test_copy_on_write_does_not_touch_a_full_shared_tail_page(allocator, pool):
    table = table_of(allocator, 8)
    fork = table.fork()
    assert fork.append_tokens(2, allocator).copies == [] and pool.copies == []
    assert fork.page_ids == [0, 1, 2]


def test_copy_on_write_without_a_free_page_changes_nothing(pool):
    allocator = PageAllocator(2, 4)
    table = table_of(allocator, 8)
    fork = table.fork()
    before = snapshot(allocator, table, fork)
    with pytest.raises(OutOfPages, match=r"^\[copy_on_write\] the pool must have a free page"):
        copy_on_write(fork, 0, allocator)
    assert snapshot(allocator, table, fork) == before


def test_copy_on_write_whose_copy_fails_changes_nothing(allocator):
    failing = FailingPool()
    allocator.attach(failing)
    table = table_of(allocator, 8)
    fork = table.fork()
    before = snapshot(allocator, table, fork)
    with pytest.raises(MemoryError):
        copy_on_write(fork, 0, allocator)
    assert snapshot(allocator, table, fork) == before


def test_copy_on_write_refuses_foreign_allocators_and_positions(allocator):
    table = table_of(allocator, 6)
    with pytest.raises(ValueError, match="allocator must be the one"):
        copy_on_write(table, 0, PageAllocator(4, 4))
    with pytest.raises(ValueError, match=r"^\[copy_on_write\] logical_pos must be in \[0, 6\)"):
        copy_on_write(table, 6, allocator)
    with pytest.raises(ValueError, match="logical_pos"):
        copy_on_write(PageTable(4), 0, allocator)


def test_copy_on_write_protects_a_page_that_a_cache_holds(pool):
    allocator = LRUPageAllocator(4, 4)
    table = table_of(allocator, 4)
    allocator.cache_page(0)
    table.truncate(2)
    plan = table.append_tokens(1, allocator)
    assert plan.copies == [(0, 1)] and table.page_ids == [1]
    assert allocator.ref_count(0) == 1 and allocator.cached_pages == [0]
    allocator.check([table])
