"""Cached prefixes: found by content, verified, reused to the token, given up in order."""

import pytest
from page_helpers import RecordingPool, run, snapshot, table_of
from paged_mlx.errors import OutOfPages, PageError
from paged_mlx.pages.policies import LRUPageAllocator, PageAllocator
from paged_mlx.pages.table import PageTable
from paged_mlx.prefix import eviction
from paged_mlx.prefix.cache import PrefixCache
from paged_mlx.prefix.events import CacheCleared
from paged_mlx.prefix.hash import ExtraKey, page_hashes


@pytest.fixture
def allocator():
    return PageAllocator(32, 4)


@pytest.fixture
def cache(allocator):
    return PrefixCache(allocator, max_events=1000)


def test_full_pages_are_cached_and_a_part_filled_page_is_not(allocator, cache):
    table = table_of(allocator, 10)
    assert cache.insert(range(10), table) == 2
    assert cache.page_ids == [0, 1]
    assert [allocator.ref_count(page_id) for page_id in range(3)] == [2, 2, 1]
    allocator.check([table], [cache])


def test_a_hit_shares_the_pages_of_the_prefix(allocator, cache):
    first, _ = run(cache, list(range(13)))
    second, saved = run(cache, [*range(12), 99, 98])
    assert saved == 12 and second.page_ids[:3] == first.page_ids[:3]
    assert allocator.ref_count(0) == 3 and allocator.num_used == 5
    allocator.check([first, second], [cache])


def test_a_hit_leaves_at_least_one_token_to_compute(allocator, cache):
    table, _ = run(cache, list(range(8)))
    assert cache.match(range(8)).num_tokens == 7
    assert cache.match(range(4)).num_tokens == 3
    assert cache.match([0]).num_tokens == cache.match([]).num_tokens == 0
    again, saved = run(cache, list(range(8)))
    assert saved == 7 and again.page_ids[0] == table.page_ids[0]
    assert again.page_ids[1] != table.page_ids[1]  # copied: its last slot is written again
    allocator.check([table, again], [cache])


def test_a_hit_reuses_tokens_inside_the_first_page_that_differs(allocator, cache):
    pool = RecordingPool()
    allocator.attach(pool)
    table, _ = run(cache, list(range(12)))
    other = PageTable(4)
    tokens = [0, 1, 2, 3, 4, 5, 77, 78]
    assert cache.reuse(tokens, other) == 6
    assert other.page_ids == table.page_ids[:2] and allocator.num_used == 3
    plan = other.append_tokens(2, allocator)
    assert pool.copies == [[(1, 3)]] and plan.slots.tolist() == [3 * 4 + 2, 3 * 4 + 3]
    cache.insert(tokens, other)
    allocator.check([table, other], [cache])


def test_the_closest_of_many_continuations_is_found(allocator, cache):
    for last in ([9, 1, 1, 1], [9, 2, 1, 1], [9, 2, 3, 1], [9, 2, 3, 5], [8, 2, 3, 4]):
        table = table_of(allocator, 8)
        cache.insert([0, 1, 2, 3, *last], table)
    for tokens, saved in [
        ([9, 2, 3, 4, 0], 7),
        ([9, 2, 0], 6),
        ([9, 0, 0], 5),
        ([7, 2, 3], 4),
        ([9, 1, 1, 1, 0], 8),
    ]:
        assert cache.match([0, 1, 2, 3, *tokens]).num_tokens == saved


def test_a_second_prompt_takes_pages_only_for_what_differs():
    allocator = PageAllocator(32, 16)
    cache = PrefixCache(allocator)
    first, second = PageTable(16), PageTable(16)
    first.append_tokens(55, allocator)
    assert first.page_ids == [0, 1, 2, 3] and cache.insert(range(55), first) == 3
    prompt = [*range(48), 100, 101]
    assert cache.reuse(prompt, second) == 48
    second.append_tokens(2, allocator)
    assert second.page_ids == [0, 1, 2, 4]
    assert [allocator.ref_count(page_id) for page_id in range(5)] == [3, 3, 3, 1, 1]
    assert (
        page_hashes(range(55), 16)[-1] in cache._tree.by_hash
        and len(page_hashes(range(55), 16)) == 3
    )


def test_a_hit_whose_append_fails_leaves_the_cache_as_it_was():
    allocator = PageAllocator(4, 4)
    cache = PrefixCache(allocator)
    table, _ = run(cache, list(range(16)))
    table.release()
    hit = PageTable(4)
    assert cache.reuse([*range(8), *range(50, 70)], hit) == 8
    before = snapshot(allocator, hit)
    with pytest.raises(OutOfPages):
        hit.append_tokens(20, allocator)
    assert snapshot(allocator, hit) == before
    assert cache.num_pages == 4 and cache.stats.evicted == 0
    allocator.check([hit], [cache])


def test_an_evicted_page_is_not_found_again_when_it_is_reused():
    allocator = PageAllocator(2, 4)
    cache = PrefixCache(allocator)
    table, _ = run(cache, list(range(8)))
    table.release()
    other = table_of(allocator, 1)  # takes the page of the tail
    assert cache.match(range(9)).num_tokens == 4
    assert other.page_ids == [1] and cache.page_ids == [0]


def test_a_sequence_that_begins_differently_misses(cache):
    run(cache, list(range(12)))
    assert cache.match([5, *range(1, 12)]).num_tokens == 0
    assert cache.match([4, 5, 6, 7, 8]).num_tokens == 0  # the same tokens at another position


def test_pages_are_evicted_tail_first_and_the_oldest_sequence_first(allocator, cache):
    old, _ = run(cache, list(range(8)))
    new, _ = run(cache, list(range(50, 58)))
    order = [*old.page_ids[::-1], *new.page_ids[::-1]]
    hashes = [*page_hashes(range(8), 4)[::-1], *page_hashes(range(50, 58), 4)[::-1]]
    old.release()
    new.release()
    assert cache.num_evictable == 4 and allocator.num_used == 4
    cache.take_events()
    for page_id, name in zip(order, hashes):
        assert cache.evict(1) == 1 and page_id not in cache.page_ids
        assert [event.page_hash for event in cache.take_events()] == [name]
        allocator.check([], [cache])
    assert cache.evict(1) == 0 and allocator.num_used == 0


def test_an_empty_pool_takes_back_cached_pages_and_never_one_in_use(cache):
    allocator = PageAllocator(6, 4)
    cache = PrefixCache(allocator)
    kept, _ = run(cache, list(range(8)))
    idle, _ = run(cache, list(range(50, 58)))
    idle.release()
    table = table_of(allocator, 12)
    assert cache.stats.evicted == 1 and cache.num_pages == 3
    assert cache.match(range(50, 58)).num_tokens == 4
    assert allocator.allocate_pages(2) is None  # one page is evictable, and stays
    assert cache.num_evictable == 1
    assert len(allocator.allocate_pages(1)) == 1
    assert set(cache.page_ids) == set(kept.page_ids)
    assert cache.num_evictable == 0 and allocator.allocate_page() is None
    assert table.num_pages == 3


def test_a_hit_page_is_not_evicted_for_the_append_that_follows():
    allocator = PageAllocator(4, 4)
    cache = PrefixCache(allocator)
    table, _ = run(cache, list(range(16)))
    table.release()
    again, saved = run(cache, [*range(8), 70, 71, 72, 73, 74])
    assert saved == 8 and again.num_pages == 4
    assert cache.match(range(12)).num_tokens == 8
    allocator.check([again], [cache])


def test_reusing_a_prefix_makes_it_young_again(allocator, cache):
    for start in (0, 50):
        table, _ = run(cache, list(range(start, start + 8)))
        table.release()
    table, saved = run(cache, list(range(8)))
    table.release()
    assert saved == 7
    cache.evict(2)
    assert cache.match(range(9)).num_tokens == 8 and cache.match(range(50, 59)).num_tokens == 0


def test_eviction_policies_choose_different_pages(allocator):
    def survivor(policy):
        allocator = PageAllocator(32, 4)
        cache = PrefixCache(allocator, policy=policy)
        tables = []
        for start, priority in ((0, 5), (100, 1), (200, 3)):
            table = table_of(allocator, 4)
            cache.insert(range(start, start + 4), table, priority=priority)
            tables.append(table)
        for start in (0, 200, 200):
            hit = PageTable(4)
            assert cache.reuse(range(start, start + 5), hit) == 4
            hit.release()
        for table in (tables[2], tables[1], tables[0]):
            table.release()
        cache.evict(2)
        return [start for start in (0, 100, 200) if cache.match(range(start, start + 5)).num_tokens]

    assert survivor(eviction.least_recently_used) == [0]
    assert survivor(eviction.first_in_first_out) == [200]
    assert survivor(eviction.least_frequently_used) == [200]
    assert survivor(eviction.lowest_priority) == [0]


def test_an_idle_page_whose_continuation_is_in_use_can_be_evicted(allocator, cache):
    table, _ = run(cache, list(range(16)))
    table.free_before(8)
    assert cache.num_evictable == 2 and cache.num_pages == 4
    cache.take_events()
    assert cache.evict(1) == 1
    removed = [event.page_hash for event in cache.take_events()]
    assert removed == page_hashes(range(16), 4)[:0:-1]  # children before parents
    allocator.check([table], [cache])
    assert cache.evict(5) == 1 and cache.num_pages == 0
    allocator.check([table], [cache])


def test_pages_behind_a_window_are_cached_before_they_are_given_back(allocator, cache):
    tokens = list(range(16))
    table = table_of(allocator, 8)
    cache.insert(tokens[:8], table)
    table.append_tokens(8, allocator)
    table.free_before(6)
    assert cache.insert(tokens, table) == 2
    assert cache.match([*tokens, 0]).num_tokens == 16
    late = table_of(allocator, 12)
    late.free_before(4)
    assert cache.insert(range(60, 72), late) == 0
    allocator.check([table, late], [cache])


def test_the_same_content_in_another_page_is_left_to_its_table(allocator, cache):
    first, second = table_of(allocator, 8), table_of(allocator, 12)
    assert cache.insert(range(8), first) == 2
    assert cache.insert(range(12), second) == 1
    assert cache.match([*range(12), 0]).page_ids == [*first.page_ids, second.page_ids[2]]
    first.release()
    second.release()
    assert allocator.num_used == 3
    allocator.check([], [cache])


def test_a_sealed_page_ends_what_is_cached(allocator, cache):
    table = table_of(allocator, 7)
    table.seal()
    table.append_tokens(9, allocator)
    assert cache.insert(range(16), table) == 1
    allocator.check([table], [cache])


def test_insert_refuses_tokens_that_the_pages_do_not_hold(allocator, cache):
    table = table_of(allocator, 8)
    cache.insert(range(8), table)
    before = snapshot(allocator, table)
    with pytest.raises(
        ValueError,
        match="tokens must be those .*; got others for page 1, at position 4",
    ):
        cache.insert([0, 1, 2, 3, 9, 9, 9, 9], table)
    with pytest.raises(ValueError, match="table must hold all tokens, 9; got 8"):
        cache.insert(range(9), table)
    with pytest.raises(ValueError, match="allocator must be the one"):
        cache.insert(range(4), table_of(PageAllocator(4, 4), 4))
    with pytest.raises(ValueError, match="table must be empty; got 8"):
        cache.reuse(range(9), table)
    with pytest.raises(ValueError, match="allocator.page_size must be 8"):
        cache.reuse(range(9), PageTable(8))
    assert snapshot(allocator, table) == before and cache.num_pages == 2


def test_insert_refuses_a_page_that_an_allocator_caches_itself():
    allocator = LRUPageAllocator(8, 4)
    cache = PrefixCache(allocator)
    table = table_of(allocator, 8)
    allocator.cache_page(table.page_ids[1])
    with pytest.raises(PageError, match="must hold pages that nobody else caches; got page 1"):
        cache.insert(range(8), table)
    assert cache.num_pages == 0 and allocator.ref_count(0) == 1


def test_extra_keys_isolate_sequences_from_their_position_on(allocator, cache):
    tokens = list(range(12))
    table, _ = run(cache, tokens, [ExtraKey("adapter", "foo")])
    for keys in (
        (),
        [ExtraKey("adapter", "bar")],
        [ExtraKey("salt", "foo")],
        [ExtraKey("adapter", b"foo")],
    ):
        assert cache.match(tokens, keys).num_tokens == 0
    assert cache.match(tokens, [ExtraKey("adapter", "foo")]).num_tokens == 11
    image = [ExtraKey("adapter", "foo"), ExtraKey("image", b"\x01\x02", position=5)]
    assert cache.match(tokens, image).num_tokens == 4
    run(cache, tokens, image)
    other = [ExtraKey("image", b"\x01\x03", position=5), ExtraKey("adapter", "foo")]
    assert cache.match(tokens, image[::-1]).num_tokens == 11
    assert cache.match(tokens, other).num_tokens == 4
    assert table.num_tokens == 12
    cache.check()


def test_a_hash_collision_is_a_miss_and_never_a_wrong_page(allocator):
    cache = PrefixCache(
        allocator, hash_page=lambda parent, tokens, keys: bytes([len(parent) % 2, tokens[0] % 2])
    )
    first = table_of(allocator, 8)
    assert cache.insert([2, 0, 0, 0, 3, 0, 0, 0], first) == 2
    assert cache.match([4, 0, 0, 0, 9]).num_tokens == 0
    assert cache.match([2, 0, 0, 0, 5, 0, 0, 0, 9]).num_tokens == 4
    second = table_of(allocator, 8)
    assert cache.insert([4, 0, 0, 0, 3, 0, 0, 0], second) == 0
    assert cache.stats.collisions > 0
    assert cache.match([2, 0, 0, 0, 3, 0, 0, 0, 9]).page_ids == first.page_ids
    allocator.check([first, second], [cache])


# Reset, forget, limits.


def test_a_hash_collision_of_keys_alone_or_parents_alone_is_a_miss(allocator):
    cache = PrefixCache(allocator, hash_page=lambda parent, tokens, keys: tokens[:1])
    table = table_of(allocator, 8)
    cache.insert([5, 0, 0, 0, 6, 0, 0, 0], table, [ExtraKey("salt", "a")])
    assert cache.match([5, 0, 0, 0, 9], [ExtraKey("salt", "b")]).num_tokens == 0
    assert cache.match([6, 0, 0, 0, 9]).num_tokens == 0
    assert cache.match([5, 0, 0, 0, 9], [ExtraKey("salt", "a")]).num_tokens == 4


def test_reset_drops_every_page_and_leaves_tables_alone(allocator, cache):
    running, _ = run(cache, list(range(12)))
    idle, _ = run(cache, list(range(50, 62)))
    idle.release()
    cache.take_events()
    assert cache.reset() == 6
    assert cache.num_pages == 0 and allocator.num_used == 3
    assert cache.match(range(13)).num_tokens == 0
    assert [type(event) for event in cache.take_events()] == [CacheCleared]
    allocator.check([running], [cache])
    assert cache.insert(range(12), running) == 3


def test_forgotten_pages_and_all_that_continue_them_are_not_hit_again(allocator, cache):
    table, _ = run(cache, list(range(16)))
    assert cache.forget([table.page_ids[1], 31]) == 3
    assert cache.match(range(16)).num_tokens == 4
    assert table.num_pages == 4 and cache.stats.forgotten == 3
    allocator.check([table], [cache])


def test_a_cache_of_limited_size_makes_room_or_stores_less(allocator):
    cache = PrefixCache(allocator, max_pages=3)
    first, _ = run(cache, list(range(8)))
    second, _ = run(cache, list(range(50, 58)))
    assert cache.num_pages == 3 and cache.match(range(50, 59)).num_tokens == 4
    first.release()
    third, _ = run(cache, list(range(70, 78)))
    assert cache.num_pages == 3 and cache.match(range(70, 79)).num_tokens == 8
    assert cache.stats.evicted == 2
    allocator.check([second, third], [cache])


def test_making_room_never_evicts_what_the_new_pages_continue(allocator):
    cache = PrefixCache(allocator, max_pages=3)
    first = table_of(allocator, 8)
    cache.insert(range(8), first)
    first.release()
    twin = table_of(allocator, 20)  # holds the same beginning in pages of its own
    assert cache.insert(range(20), twin) == 1
    assert cache.match(range(20)).num_tokens == 12
    allocator.check([twin], [cache])


def test_a_closed_cache_is_asked_for_no_more_pages(allocator, cache):
    table, _ = run(cache, list(range(8)))
    table.release()
    cache.close()
    assert allocator.num_evictable == 0 and allocator.num_used == 0


def test_a_page_written_again_after_it_was_cached_is_copied_first(allocator, cache):
    table, _ = run(cache, list(range(8)))
    table.truncate(6)
    plan = table.append_tokens(2, allocator)
    assert plan.copies == [(1, 2)]
    assert cache.match([*range(8), 0]).page_ids == [0, 1]
    cache.insert([*range(6), 90, 91], table)
    allocator.check([table], [cache])


def test_the_last_holder_never_copies_even_if_eviction_made_it_so():
    allocator = PageAllocator(3, 4)
    cache = PrefixCache(allocator)
    table, _ = run(cache, list(range(12)))
    table.free_before(8)
    table.truncate(10)
    plan = table.append_tokens(1, allocator)  # taking a page evicts what page 2 continues
    assert plan.copies == [] and table.page_ids == [2]
    allocator.check([table], [cache])


@pytest.mark.parametrize("broken", ["hash", "idle", "queue", "tree"])
def test_check_sees_a_cache_that_disagrees_with_itself(allocator, cache, broken):
    table, _ = run(cache, list(range(8)))
    table.release()
    cache.check()
    page = cache._tree.by_page[1]
    if broken == "hash":
        page.tokens = page.tokens[::-1]
    elif broken == "idle":
        allocator.share_page(1)
        page.idle = True
    elif broken == "queue":
        cache._queue.pop()
    else:
        page.parent.remove_child(page)
    with pytest.raises(AssertionError):
        allocator.check()


def test_a_page_keeps_its_hits_when_it_fills_up(allocator, cache):
    table = table_of(allocator, 4)
    cache.insert([1, 2], table, tail=True)
    assert run(cache, [1, 2, 9])[1] == 2
    cache.insert([1, 2, 3, 4], table)
    assert cache.match([1, 2, 3, 4, 5]).page_ids == table.page_ids
    assert cache._tree.by_page[table.page_ids[0]].hits == 1


def test_a_page_that_comes_back_has_the_priority_it_came_with(allocator):
    cache = PrefixCache(allocator, policy=eviction.lowest_priority)
    table = table_of(allocator, 4)
    for priority in (9, 1):
        cache.insert(range(4), table, priority=priority)
        cache.reset()
    cache.insert(range(4), table, priority=1)
    other = table_of(allocator, 4)
    cache.insert(range(100, 104), other, priority=5)
    other.release()  # the least recently used is the one to stay
    table.release()
    assert cache.evict(1) == 1
    assert cache.match(range(5)).num_tokens == 0 and cache.match(range(100, 105)).num_tokens == 4


def test_statistics_say_how_pages_left(allocator, cache):
    first, _ = run(cache, list(range(8)))
    second, _ = run(cache, list(range(50, 58)))
    first.release()
    cache.evict(1)
    cache.forget([second.page_ids[0]])  # and the page that continues it
    stats = cache.stats
    assert (stats.stored, stats.evicted, stats.forgotten) == (4, 1, 2)
    cache.reset()
    assert stats.forgotten == 3 and cache.num_pages == 0


def test_reuse_that_runs_out_of_pages_goes_on_when_there_are_some():
    allocator = PageAllocator(4, 4)
    cache = PrefixCache(allocator)
    first, _ = run(cache, list(range(8)))
    again = PageTable(4)
    assert cache.reuse([*range(6), 9, 9, 9, 9, 9, 9, 9], again) == 6
    before = snapshot(allocator, first, again)
    with pytest.raises(OutOfPages):
        again.append_tokens(7, allocator)
    assert snapshot(allocator, first, again) == before
    first.release()
    assert again.append_tokens(6, allocator).copies == [(1, 3)] and again.page_ids == [0, 3, 2]
    allocator.check([again], [cache])
