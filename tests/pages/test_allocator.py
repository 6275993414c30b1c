"""Which pages are free, who holds the others, and what happens when none is left."""

import gc
import tracemalloc

import pytest
from page_helpers import FailingPool, RecordingPool, snapshot, table_of
from paged_mlx.errors import DoubleFree, OutOfPages, PageError, UnknownPage, UseAfterFree
from paged_mlx.pages.observers import Evictor
from paged_mlx.pages.policies import (
    BuddyPageAllocator,
    FIFOPageAllocator,
    LRUPageAllocator,
    PageAllocator,
)
from paged_mlx.pages.table import PageTable

ALLOCATORS = [PageAllocator, FIFOPageAllocator, LRUPageAllocator, BuddyPageAllocator]
every_allocator = pytest.mark.parametrize("kind", ALLOCATORS)


@every_allocator
def test_page_allocation_of_a_fresh_pool_is_in_id_order(kind):
    allocator = kind(4, 4)
    assert [allocator.allocate_page() for _ in range(5)] == [0, 1, 2, 3, None]


@every_allocator
def test_page_allocation_of_many_gives_different_pages_held_once(kind):
    allocator = kind(11, 4)
    page_ids = allocator.allocate_pages(11)
    assert sorted(page_ids) == list(range(11))
    assert {allocator.ref_count(page_id) for page_id in page_ids} == {1}
    assert (allocator.num_free, allocator.num_used) == (0, 11)
    allocator.check()


@every_allocator
def test_page_allocation_is_all_or_nothing(kind):
    allocator = kind(6, 4)
    allocator.allocate_pages(2)
    before = snapshot(allocator)
    assert allocator.allocate_pages(5) is None
    assert snapshot(allocator) == before
    assert allocator.allocate_pages(0) == []
    assert len(allocator.allocate_pages(4)) == 4


@every_allocator
def test_page_allocation_returns_a_page_once_its_last_holder_frees_it(kind):
    allocator = kind(1, 4)
    page_id = allocator.allocate_page()
    allocator.share_page(page_id)
    allocator.free_page(page_id)
    assert allocator.allocate_page() is None and allocator.ref_count(page_id) == 1
    allocator.free_page(page_id)
    assert allocator.ref_count(page_id) == 0 and allocator.allocate_page() == page_id


@every_allocator
@pytest.mark.parametrize("count", [-1, 1.5, "2", None])
def test_page_allocation_of_an_impossible_count_is_an_error(kind, count):
    allocator = kind(4, 4)
    with pytest.raises(
        ValueError, match=r"^\[allocate_pages\] num_pages must be a whole number of at least 0"
    ):
        allocator.allocate_pages(count)
    assert allocator.num_free == 4


@every_allocator
def test_reference_counts_of_many_pages_are_those_of_each(kind):
    allocator = kind(4, 4)
    page_ids = allocator.allocate_pages(3)
    allocator.share_page(page_ids[1])
    assert [allocator.counts[page_id] for page_id in page_ids] == [1, 2, 1]
    with pytest.raises(TypeError):
        allocator.counts[0] = 3  # a view to read


def test_plain_allocator_reuses_the_page_freed_last():
    allocator = PageAllocator(4, 4)
    allocator.allocate_pages(4)
    for page_id in (2, 0, 3):
        allocator.free_page(page_id)
    assert allocator.allocate_pages(3) == [3, 0, 2]


def test_fifo_allocator_reuses_pages_in_the_order_they_were_freed():
    allocator = FIFOPageAllocator(4, 4)
    allocator.allocate_pages(3)
    for page_id in (2, 0):
        allocator.free_page(page_id)
    assert allocator.allocate_pages(3) == [3, 2, 0]


@every_allocator
def test_freeing_a_free_page_is_a_double_free(kind):
    allocator = kind(4, 4)
    page_id = allocator.allocate_page()
    allocator.free_page(page_id)
    before = snapshot(allocator)
    for free in (lambda: allocator.free_page(page_id), lambda: allocator.free_pages([page_id])):
        with pytest.raises(
            DoubleFree, match=r"^\[free_pages?\] page_id must be held .*; got 0, which is free"
        ):
            free()
    with pytest.raises(DoubleFree):
        allocator.free_page(3)  # never allocated
    assert snapshot(allocator) == before
    allocator.check()


@every_allocator
def test_sharing_a_free_page_is_a_use_after_free(kind):
    allocator = kind(4, 4)
    held = allocator.allocate_page()
    before = snapshot(allocator)
    for call in (
        lambda: allocator.share_page(3),
        lambda: allocator.share_pages([held, 3]),
        lambda: allocator.copy_pages([(held, 3)]),
        lambda: allocator.hold(3, allocator),
    ):
        with pytest.raises(UseAfterFree, match="must .*; got 3"):
            call()
    assert snapshot(allocator) == before


@every_allocator
@pytest.mark.parametrize("foreign", [-1, 4, 2**40, "2", None, 1.5])
def test_foreign_page_ids_are_typed_errors_and_change_nothing(kind, foreign):
    allocator = kind(4, 4)
    allocator.allocate_pages(4)
    before = snapshot(allocator)
    for call in (
        allocator.ref_count,
        allocator.share_page,
        allocator.free_page,
        lambda page_id: allocator.share_pages([0, page_id]),
        lambda page_id: allocator.free_pages([0, page_id]),
        lambda page_id: allocator.copy_pages([(0, page_id)]),
    ):
        with pytest.raises(UnknownPage, match=r"must be in \[0, 4\), the pages of this pool; got"):
            call(foreign)
    assert snapshot(allocator) == before


def test_a_page_given_twice_to_a_bulk_call_is_an_error():
    allocator = PageAllocator(4, 4)
    allocator.allocate_pages(2)
    before = snapshot(allocator)
    for call in (allocator.share_pages, allocator.free_pages):
        with pytest.raises(PageError, match="must be different pages"):
            call([1, 1])
    assert snapshot(allocator) == before


@pytest.mark.parametrize(
    "arguments", [(0, 4), (4, 0), (-1, 4), (4, 1.5), ("4", 4), (2**31, 1), (2**20, 2**12)]
)
@every_allocator
def test_impossible_sizes_are_refused(kind, arguments):
    with pytest.raises(ValueError, match=rf"^\[{kind.__name__}\] .* must be .*; got"):
        kind(*arguments)


@every_allocator
def test_sizes_are_refused_before_anything_so_large_is_allocated(kind):
    allocator = kind(4, 2**20)
    tracemalloc.start()
    for call in (
        lambda: kind(2**31 - 1, 2),
        lambda: kind(2**20, 2**12),
        lambda: kind(2**10, 2, max_pages=2**30),
        lambda: allocator.grow(2**11),
    ):
        with pytest.raises(ValueError, match="must be at most 2147483647"):
            call()
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    assert allocator.total_pages == 4


@every_allocator
def test_free_page_says_whether_the_page_became_free(kind):
    allocator = kind(4, 4)
    page_id = allocator.allocate_page()
    allocator.share_page(page_id)
    assert allocator.free_page(page_id) is False and allocator.num_free == 3
    assert allocator.free_page(page_id) is True and allocator.num_free == 4


@every_allocator
def test_an_allocator_says_its_state(kind):
    allocator = kind(64, 16)
    allocator.allocate_pages(5)
    notes = ", 0 cached" if kind is LRUPageAllocator else ""
    assert repr(allocator) == f"{kind.__name__}(64 pages of 16, 5 used{notes})"
    assert repr(allocator.evictors) == f"Evictors({int(bool(notes))} evictors, 0 pages)"


def test_check_sees_a_page_that_stands_twice_in_a_table():
    allocator = PageAllocator(4, 4)
    table = table_of(allocator, 8)
    table.map.ids[1] = 0
    allocator.free_page(1)
    allocator.share_page(0)  # so that the counts agree
    with pytest.raises(AssertionError, match="holds a page twice"):
        allocator.check([table])


def test_check_names_a_count_that_disagrees_with_its_holders():
    allocator = PageAllocator(4, 4)
    table = table_of(allocator, 5)
    allocator.check([table])
    allocator.share_page(1)
    with pytest.raises(AssertionError, match="page 1 has ref_count 2 and 1 holders"):
        allocator.check([table])


def test_check_sees_a_free_list_that_disagrees_with_the_counts():
    allocator = PageAllocator(4, 4)
    allocator._free.append(0)
    with pytest.raises(AssertionError, match="free list"):
        allocator.check()


# Pools.


def test_copies_reach_every_attached_pool_in_one_operation():
    allocator = PageAllocator(4, 4)
    first, second = RecordingPool(), RecordingPool()
    for pool in (first, second, second):
        allocator.attach(pool)
    allocator.allocate_pages(4)
    allocator.copy_pages([(0, 2), (1, 3)])
    allocator.copy_pages([])
    assert first.copies == second.copies == [[(0, 2), (1, 3)]]
    allocator.detach(first)
    allocator.copy_pages([(0, 1)])
    assert len(first.copies) == 1 and len(second.copies) == 2


def test_attached_pools_are_referenced_weakly():
    allocator = PageAllocator(4, 4)
    pool = RecordingPool()
    allocator.attach(pool)
    del pool
    gc.collect()
    assert allocator.pools == []


def test_attach_refuses_a_pool_that_does_not_fit():
    allocator = PageAllocator(4, 4)
    pool = RecordingPool(num_pages=3)
    with pytest.raises(ValueError, match="pool.num_pages must be at least 4"):
        allocator.attach(pool)
    pool.num_pages, pool.page_size = 4, 8
    with pytest.raises(ValueError, match="pool.page_size must be 4"):
        allocator.attach(pool)
    assert allocator.pools == []


@pytest.mark.parametrize("pairs", [[(0, 2), (1, 2)], [(0, 1), (1, 2)], [(3, 3)]])
def test_copies_that_depend_on_their_order_are_refused(pairs):
    allocator = PageAllocator(4, 4)
    pool = RecordingPool()
    allocator.attach(pool)
    allocator.allocate_pages(4)
    with pytest.raises(
        PageError, match=r"^\[copy_pages\] pairs must name each target once, and no"
    ):
        allocator.copy_pages(pairs)
    assert pool.copies == []


# Growing and shrinking.


class GrowingPool(RecordingPool):
    def grow(self, num_pages):
        self.num_pages = num_pages

    shrink = grow


@every_allocator
def test_a_pool_grows_in_slabs_up_to_its_limit_on_demand(kind):
    allocator = kind(2, 4, max_pages=7, slab_pages=3)
    pool = GrowingPool(num_pages=2)
    allocator.attach(pool)
    assert len(allocator.allocate_pages(3)) == 3
    assert allocator.total_pages == pool.num_pages == 5
    assert allocator.allocate_pages(5) is None and allocator.total_pages == 5
    assert len(allocator.allocate_pages(4)) == 4
    assert allocator.total_pages == pool.num_pages == 7
    assert allocator.allocate_page() is None
    allocator.check()


@every_allocator
def test_a_pool_that_cannot_grow_leaves_the_allocator_as_it_was(kind):
    allocator = kind(2, 4, max_pages=4)
    pool = FailingPool(num_pages=2)
    allocator.attach(pool)
    table = table_of(allocator, 8)
    before = snapshot(allocator, table)
    with pytest.raises(MemoryError):
        table.append_tokens(1, allocator)
    assert snapshot(allocator, table) == before
    allocator.check([table])


def test_grown_pages_are_handed_out_in_id_order():
    allocator = PageAllocator(2, 4)
    allocator.allocate_pages(2)
    allocator.grow(3)
    assert allocator.allocate_pages(3) == [2, 3, 4]


def test_growth_past_a_pool_that_has_no_grow_is_refused():
    allocator = PageAllocator(2, 4)
    pool = RecordingPool(num_pages=2)
    allocator.attach(pool)
    with pytest.raises(ValueError, match="attached pools must be able to grow to 3 pages"):
        allocator.grow(1)
    assert allocator.total_pages == 2


@every_allocator
def test_shrinking_removes_free_pages_from_the_top_and_keeps_those_in_use(kind):
    allocator = kind(10, 4)
    pool = GrowingPool(num_pages=10)
    allocator.attach(pool)
    page_ids = allocator.allocate_pages(10)
    allocator.free_pages([page_id for page_id in page_ids if page_id != 3])
    assert allocator.shrink(2) == 2 and allocator.total_pages == pool.num_pages == 8
    assert allocator.shrink() == 4 and allocator.total_pages == 4
    assert allocator.shrink() == 0
    allocator.check()
    allocator.grow(2)
    assert sorted(allocator.allocate_pages(5)) == [0, 1, 2, 4, 5]
    allocator.check()


# Least recently used.


def test_lru_allocator_evicts_cached_pages_oldest_first():
    evicted = []
    allocator = LRUPageAllocator(3, 4, on_evict=evicted.append)
    page_ids = allocator.allocate_pages(3)
    for page_id in page_ids:
        allocator.cache_page(page_id)
    for page_id in (1, 2, 0):
        allocator.free_page(page_id)
    assert (allocator.num_free, allocator.num_evictable, allocator.num_available) == (0, 3, 3)
    assert allocator.allocate_pages(2) == [2, 1] and evicted == [1, 2]
    assert allocator.cached_pages == [0]
    allocator.check()


def test_lru_allocator_never_evicts_a_page_that_a_table_holds():
    allocator = LRUPageAllocator(2, 4)
    table = table_of(allocator, 8)
    for page_id in table.page_ids:
        allocator.cache_page(page_id)
    assert allocator.allocate_page() is None
    assert allocator.cached_pages == [0, 1]
    allocator.check([table])


def test_using_a_cached_page_again_makes_it_the_youngest():
    allocator = LRUPageAllocator(2, 4)
    for page_id in allocator.allocate_pages(2):
        allocator.cache_page(page_id)
        allocator.free_page(page_id)
    allocator.share_page(0)
    assert allocator.num_evictable == 1
    allocator.free_page(0)
    assert allocator.allocate_page() == 1


def test_an_allocation_that_eviction_cannot_satisfy_evicts_nothing():
    allocator = LRUPageAllocator(3, 4)
    page_ids = allocator.allocate_pages(3)
    allocator.cache_page(page_ids[0])
    allocator.free_page(page_ids[0])
    before = snapshot(allocator)
    assert allocator.allocate_pages(2) is None
    assert snapshot(allocator) == before and allocator.cached_pages == [page_ids[0]]


def test_caching_a_page_twice_or_forgetting_one_never_cached_is_an_error():
    allocator = LRUPageAllocator(2, 4)
    page_id = allocator.allocate_page()
    allocator.cache_page(page_id)
    before = snapshot(allocator)
    with pytest.raises(PageError, match="held by one evictor"):
        allocator.cache_page(page_id)
    with pytest.raises(PageError, match="must be cached"):
        allocator.uncache_page(1)
    assert snapshot(allocator) == before
    allocator.uncache_page(page_id)
    allocator.free_page(page_id)
    assert allocator.num_free == 2


class WipingPool(RecordingPool):
    """Tells when pages are wiped."""

    wants_freed = True

    def __init__(self, told):
        super().__init__()
        self.told = told

    def freed(self, page_ids):
        self.told.extend(("wiped", page_id) for page_id in page_ids)


def idle_pages(count, **options):
    """An LRU allocator whose pages are all cached and idle."""
    allocator = LRUPageAllocator(count, 4, **options)
    for page_id in allocator.allocate_pages(count):
        allocator.cache_page(page_id)
        allocator.free_page(page_id)
    return allocator


def test_on_evict_runs_before_any_page_is_wiped():
    told = []
    allocator = idle_pages(3, on_evict=lambda page_id: told.append(("evicted", page_id)))
    pool = WipingPool(told)
    allocator.attach(pool)
    allocator.allocate_pages(2)
    assert told == [("evicted", 0), ("evicted", 1), ("wiped", 0), ("wiped", 1)]
    allocator.forget([2])
    assert told[4:] == [("evicted", 2), ("wiped", 2)]


def test_freed_pages_are_told_to_the_pools_that_ask_alone():
    asks, silent = WipingPool([]), WipingPool([])
    silent.wants_freed = False
    allocator = PageAllocator(2, 4)
    for pool in (silent, asks):
        allocator.attach(pool)
    allocator.free_page(allocator.allocate_page())
    assert asks.told == [("wiped", 0)] and silent.told == []


@pytest.mark.parametrize("max_pages", [3, 5])
@pytest.mark.parametrize("call", ["allocate", "append", "evict", "forget"])
def test_an_on_evict_that_raises_changes_nothing(call, max_pages):
    def refuse(page_id):
        if page_id == 1:
            raise RuntimeError("the page could not be saved")

    allocator = idle_pages(3, on_evict=refuse, max_pages=max_pages, slab_pages=1)
    told, table = [], PageTable(4)
    pool = WipingPool(told)
    pool.grow = lambda num_pages: None
    allocator.attach(pool)
    before = snapshot(allocator, table)
    wanted = max_pages - 1  # more than the pool may grow by
    with pytest.raises(RuntimeError, match="could not be saved"):
        if call == "allocate":
            allocator.allocate_pages(wanted)
        elif call == "append":
            table.append_tokens(4 * wanted, allocator)
        elif call == "evict":
            allocator.evict(2)
        else:
            allocator.forget([2, 1])
    assert snapshot(allocator, table) == before and told == []
    assert allocator.cached_pages == [0, 1, 2] and allocator.num_evictable == 3
    allocator.check([table])


# Buddy.


def test_buddy_allocator_gives_contiguous_aligned_runs():
    allocator = BuddyPageAllocator(16, 4)
    assert allocator.allocate_page() == 0
    assert allocator.allocate_run(4) == [4, 5, 6, 7]
    assert allocator.allocate_run(3) == [8, 9, 10]
    assert allocator.allocate_run(8) is None
    assert allocator.num_free == 8
    allocator.check()


def test_buddy_allocator_merges_freed_pages_into_runs():
    allocator = BuddyPageAllocator(16, 4)
    page_ids = allocator.allocate_pages(16)
    assert allocator.longest_run == 0
    allocator.free_pages(page_ids[::2])
    assert allocator.longest_run == 1 and allocator.fragmentation() == 1 - 1 / 8
    allocator.free_pages(page_ids[1::2])
    assert allocator.longest_run == 16 and allocator.fragmentation() == 0
    assert allocator.allocate_run(16) == list(range(16))


def test_buddy_runs_are_freed_page_by_page():
    allocator = BuddyPageAllocator(8, 4)
    run = allocator.allocate_run(8)
    allocator.share_page(run[3])
    allocator.free_pages(run)
    assert allocator.num_free == 7 and allocator.longest_run == 4
    allocator.free_page(run[3])
    assert allocator.longest_run == 8


@pytest.mark.parametrize("total_pages", [1, 3, 12, 100])
def test_buddy_allocator_takes_a_pool_of_any_size(total_pages):
    allocator = BuddyPageAllocator(total_pages, 4)
    assert allocator.fragmentation() == 0
    page_ids = [allocator.allocate_page() for _ in range(total_pages)]
    assert sorted(page_ids) == list(range(total_pages))
    allocator.free_pages(page_ids)
    allocator.check()
    assert allocator.fragmentation() == 0


@every_allocator
def test_fragmentation_is_the_share_of_the_longest_possible_run_that_is_lost(kind):
    allocator = kind(8, 4)
    page_ids = allocator.allocate_pages(8)
    assert allocator.fragmentation() == 0
    allocator.free_pages([page_id for page_id in page_ids if page_id in (0, 1, 6, 7)])
    assert allocator.fragmentation() == 0.5


# Evictors.


def test_evictors_are_asked_in_the_order_they_were_added():
    class Keeper(Evictor):
        def __init__(self, page_ids):
            self.page_ids = page_ids

        @property
        def num_evictable(self):
            return len(self.page_ids)

        def evict(self, num_pages):
            taken, self.page_ids = self.page_ids[:num_pages], self.page_ids[num_pages:]
            for page_id in taken:
                allocator.free_page(page_id)
            return len(taken)

    allocator = PageAllocator(5, 4)
    first, second = Keeper(allocator.allocate_pages(2)), Keeper(allocator.allocate_pages(3))
    allocator.evictors.add(first)
    allocator.evictors.add(second)
    table = PageTable(4)
    table.append_tokens(12, allocator)
    assert (len(first.page_ids), len(second.page_ids)) == (0, 2)
    with pytest.raises(OutOfPages, match="3 pages to give"):
        table.append_tokens(12, allocator)
    assert (len(first.page_ids), len(second.page_ids)) == (0, 2)
    allocator.evictors.remove(second)
    with pytest.raises(OutOfPages):
        table.append_tokens(1, allocator)
    with pytest.raises(ValueError, match="must be one that was added"):
        allocator.evictors.remove(second)
    with pytest.raises(ValueError, match=r"^\[hold\] evictor must be one that was added"):
        allocator.hold(allocator.allocate_page() or 0, second)
