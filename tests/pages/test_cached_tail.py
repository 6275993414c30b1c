"""A part-filled tail page that only a cache holds too: the cache lets go before a table fails."""

import pytest
from page_helpers import run
from paged_mlx.errors import OutOfPages
from paged_mlx.pages.policies import LRUPageAllocator, PageAllocator
from paged_mlx.pages.table import PageTable, append_batch, copy_on_write
from paged_mlx.prefix.cache import PrefixCache


def full_pool_with_a_cached_tail(kind=PageAllocator):
    """A table whose part-filled tail page is cached, and not one page to copy it to."""
    allocator = kind(2, 4)
    cache = PrefixCache(allocator)
    first, _ = run(cache, list(range(8)))
    first.release()
    table = PageTable(4)
    assert cache.reuse([0, 1, 2, 3, 4, 5, 9], table) == 6
    assert allocator.num_available == 0 and allocator.ref_count(table.page_ids[1]) == 2
    return allocator, cache, table


def test_an_append_takes_its_tail_page_from_the_cache_when_the_pool_is_full():
    allocator, cache, table = full_pool_with_a_cached_tail()
    plan = table.append_tokens(2, allocator)
    assert plan.copies == [] and plan.slots.tolist() == [6, 7]
    assert table.page_ids == [0, 1] and cache.page_ids == [0]
    allocator.check([table], [cache])


def test_a_cached_tail_that_another_table_holds_stays_cached_and_the_append_fails():
    allocator, cache, table = full_pool_with_a_cached_tail()
    fork = table.fork()
    with pytest.raises(OutOfPages):
        table.append_tokens(1, allocator)
    assert cache.num_pages == 2 and table.num_tokens == 6
    allocator.check([table, fork], [cache])


def test_a_batch_on_one_cached_tail_copies_for_all_but_the_last():
    allocator = PageAllocator(3, 4)
    cache = PrefixCache(allocator)
    first, _ = run(cache, list(range(8)))
    first.release()
    tables = [PageTable(4), PageTable(4)]
    for table in tables:
        cache.reuse([0, 1, 2, 3, 4, 5, 9], table)
    assert append_batch(tables, [1, 1], allocator).copies == [(1, 2)]
    assert [table.page_ids for table in tables] == [[0, 2], [0, 1]] and cache.page_ids == [0]
    allocator.check(tables, [cache])


def test_copy_on_write_takes_the_page_from_the_cache_when_the_pool_is_full():
    allocator, cache, table = full_pool_with_a_cached_tail()
    assert copy_on_write(table, 5, allocator) is False
    assert table.page_ids == [0, 1] and cache.page_ids == [0]
    allocator.check([table], [cache])


def test_a_page_cached_by_its_allocator_is_taken_when_the_pool_is_full():
    evicted = []
    allocator = LRUPageAllocator(1, 4, on_evict=evicted.append)
    table = PageTable(4)
    table.append_tokens(2, allocator)
    allocator.cache_page(0)
    assert table.append_tokens(1, allocator).copies == []
    assert evicted == [0] and allocator.cached_pages == []
    allocator.check([table])
