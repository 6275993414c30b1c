"""What a prefix cache tells an outside index, and counts."""

import pytest
from page_helpers import run, table_of
from paged_mlx.pages.policies import BuddyPageAllocator, PageAllocator
from paged_mlx.prefix.cache import PrefixCache
from paged_mlx.prefix.events import CacheCleared, PageRemoved, PagesStored
from paged_mlx.prefix.hash import page_hashes, root_hash


@pytest.fixture
def allocator():
    return PageAllocator(32, 4)


@pytest.fixture
def cache(allocator):
    return PrefixCache(allocator, max_events=1000)


def test_one_event_tells_what_one_insert_stored(allocator, cache):
    table = table_of(allocator, 12)
    cache.insert(range(8), table)
    cache.insert(range(12), table)
    hashes = page_hashes(range(12), 4)
    assert cache.take_events() == [
        PagesStored(1, root_hash(4), tuple(hashes[:2]), tuple(range(8)), 4, (b"", b"")),
        PagesStored(2, hashes[1], (hashes[2],), (8, 9, 10, 11), 4, (b"",)),
    ]
    assert cache.take_events() == []
    cache.insert(range(12), table)
    assert cache.take_events() == []
    table.release()
    cache.evict(1)
    assert cache.take_events() == [PageRemoved(3, hashes[2])]


def test_lost_events_leave_a_gap_in_the_numbers(allocator):
    cache = PrefixCache(allocator, max_events=2)
    for start in (0, 50, 100):
        cache.insert(range(start, start + 4), table_of(allocator, 4))
    assert [event.number for event in cache.take_events()] == [2, 3]


def test_an_index_that_follows_the_events_knows_what_is_cached():
    allocator = BuddyPageAllocator(8, 4)
    cache = PrefixCache(allocator, max_events=1000)
    index = set()
    for start in (0, 4, 0, 8, 12, 0):
        table, _ = run(cache, [*range(start), *range(start + 100, start + 109)])
        table.release()
        for event in cache.take_events():
            if isinstance(event, PagesStored):
                index.update(event.page_hashes)
                assert len(event.tokens) == 4 * len(event.page_hashes)
            else:
                index.discard(event.page_hash)
        assert index == set(cache._tree.by_hash)
        if start == 8:
            cache.reset()
            assert [type(event) for event in cache.take_events()] == [CacheCleared]
            index.clear()


def test_statistics_count_queries_hits_and_tokens_saved(allocator):
    now = [0.0]
    cache = PrefixCache(allocator, clock=lambda: now[0])
    stats = cache.stats
    assert stats.hit_rate is None and stats.recent_hit_rate is None and stats.mean_lifetime is None
    table, _ = run(cache, list(range(10)))
    assert (stats.queries, stats.query_tokens, stats.hits, stats.hit_rate) == (1, 10, 0, 0.0)
    again, saved = run(cache, [*range(6), 60, 61, 62, 63])
    assert saved == 6
    assert (stats.queries, stats.hits, stats.hit_tokens, stats.partial_hits) == (2, 1, 6, 1)
    assert stats.hit_rate == stats.recent_hit_rate == 6 / 20
    assert stats.stored == 3
    now[0] = 10.0
    table.release()
    now[0] = 14.0
    cache.evict(5)
    assert stats.evicted == 1 and stats.mean_lifetime == 14.0 and stats.mean_idle_time == 4.0
    again.release()


def test_the_recent_hit_rate_follows_the_latest_queries(allocator):
    cache = PrefixCache(allocator)
    for _ in range(1000):
        cache.stats.add_query(20, 9, 4)
    for _ in range(999):
        cache.stats.add_query(100, 25, 4)
    assert cache.stats.recent_hit_rate == (9 + 999 * 25) / (20 + 999 * 100)
