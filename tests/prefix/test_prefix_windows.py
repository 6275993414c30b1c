"""Cached prefixes behind a window, pages that sequences ended in, and values kept beside pages."""

import itertools

import pytest
from page_helpers import run, snapshot, table_of
from paged_mlx.pages.page_map import NO_PAGE
from paged_mlx.pages.policies import PageAllocator
from paged_mlx.pages.table import PageTable
from paged_mlx.prefix.cache import PrefixCache
from paged_mlx.prefix.hash import ExtraKey, page_hashes

# Pages of 4 tokens, and a window of 6: the token at position n sees [n - 5, n].


@pytest.fixture
def allocator():
    return PageAllocator(32, 4)


@pytest.fixture
def cache(allocator):
    return PrefixCache(allocator, window=6, max_events=1000)


def windowed(cache, allocator, tokens, chunk=8):
    """Compute a sequence in chunks, giving back what lies behind the window after each."""
    table = PageTable(4)
    known = cache.reuse(tokens, table)
    for end in [*range(known + chunk, len(tokens), chunk), len(tokens)]:
        table.append_tokens(end - table.num_tokens, allocator)
        cache.insert(tokens[:end], table)
        table.free_before(max(0, end - 5))
    return table, known


def test_a_hit_needs_only_the_pages_of_its_window(allocator, cache):
    table = table_of(allocator, 20)
    table.free_before(12)
    assert cache.insert(range(20), table) == 2
    match = cache.match([*range(20), 99])
    assert match.num_tokens == 20
    assert match.page_ids == [NO_PAGE] * 3 + table.page_ids
    hit = PageTable(4)
    assert cache.reuse([*range(20), 99], hit) == 20
    assert hit.num_freed == 3 and hit.page_ids == table.page_ids
    assert [entry.logical_start for entry in hit.entries] == [12, 16]
    assert hit.append_tokens(1, allocator).copies == []
    allocator.check([table, hit], [cache])


def test_a_hit_whose_window_is_not_held_goes_back_to_where_one_is(allocator, cache):
    early, late = table_of(allocator, 12), table_of(allocator, 24)
    late.free_before(16)
    cache.insert(range(12), early)
    assert cache.insert(range(24), late) == 2
    # Held are pages 0 to 2 and 4 and 5. Position 24 needs [19, 24), 20 would need [15, 20).
    assert cache.match(range(25)).num_tokens == 24
    assert cache.match(range(24)).num_tokens == 23
    assert cache.match(range(21)).num_tokens == 12
    # 17, inside a held page, would need page 3 as well.
    assert cache.match([*range(17), 99]).num_tokens == 12
    allocator.check([early, late], [cache])


def test_a_page_that_differs_is_shared_up_to_there_if_its_window_is_held(allocator, cache):
    table = table_of(allocator, 16)
    cache.insert(range(16), table)
    hit = PageTable(4)
    assert cache.reuse([*range(14), 99, 98], hit) == 14
    assert hit.num_freed == 2 and hit.page_ids == table.page_ids[2:]
    plan = hit.append_tokens(2, allocator)
    assert [source for source, _ in plan.copies] == [table.page_ids[3]]
    allocator.check([table, hit], [cache])


def test_a_window_of_one_token_needs_no_page(allocator):
    cache = PrefixCache(allocator, window=1)
    table = table_of(allocator, 8)
    table.free_before(4)
    cache.insert(range(8), table)
    hit = PageTable(4)
    assert cache.reuse([*range(8), 9], hit) == 8
    assert hit.page_ids == [] and hit.num_tokens == 8
    assert hit.append_tokens(1, allocator).slots.tolist() == [0]  # page 0 was given back
    allocator.check([table, hit], [cache])


def test_pages_behind_the_window_are_given_up_one_by_one(allocator, cache):
    table = table_of(allocator, 24)
    cache.insert(range(24), table)
    table.free_before(16)
    assert cache.num_evictable == 4 and cache.num_pages == 6
    cache.take_events()
    assert cache.evict(3) == 3
    # Pages that later ones follow leave gaps, and the later ones are still found.
    assert [event.page_hash for event in cache.take_events()] == page_hashes(range(24), 4)[3:0:-1]
    assert cache.match(range(25)).num_tokens == 24
    assert cache.match(range(13)).num_tokens == 4
    table.release()
    allocator.check([], [cache])
    assert cache.evict(9) == 3 and not cache._tree.by_hash
    assert allocator.num_used == 0


def test_gaps_are_filled_by_a_sequence_that_holds_their_pages(allocator, cache):
    late, whole = table_of(allocator, 24), table_of(allocator, 24)
    late.free_before(16)
    assert cache.insert(range(24), late) == 2
    cache.take_events()
    assert cache.insert(range(24), whole) == 4
    (stored,) = cache.take_events()
    assert list(stored.page_hashes) == page_hashes(range(24), 4)[:4]
    assert cache.match(range(18)).num_tokens == 17
    allocator.check([late, whole], [cache])


def test_a_page_that_has_filled_up_takes_its_own_place_behind_gaps(allocator, cache):
    table = table_of(allocator, 15)
    table.free_before(12)
    assert cache.insert(range(14), table, tail=True) == 1
    assert cache.insert(range(15), table, tail=True) == 1
    assert cache.page_ids == table.page_ids[-1:]
    allocator.check([table], [cache])
    table.release()
    assert cache.evict(1) == 1 and not cache._tree.by_hash


def test_runs_of_pages_with_gaps_between_are_events_of_their_own(allocator, cache):
    middle, whole = table_of(allocator, 12), table_of(allocator, 20)
    middle.free_before(4)
    cache.insert(range(12), middle)
    cache.take_events()
    assert cache.insert(range(20), whole) == 3
    names = page_hashes(range(20), 4)
    first, last = cache.take_events()
    assert first.page_hashes == (names[0],) and first.tokens == (0, 1, 2, 3)
    assert last.page_hashes == tuple(names[3:]) and last.parent_hash == names[2]


def test_a_limited_cache_stores_after_making_room_even_if_gaps_leave_with_it(allocator):
    cache = PrefixCache(allocator, window=6, max_pages=2)
    old = table_of(allocator, 16)
    old.free_before(8)
    cache.insert(range(16), old)
    old.release()
    # The same beginning: its places are gaps, and leave with the pages that follow them.
    new = table_of(allocator, 20)
    new.free_before(12)
    assert cache.insert([*range(8), *range(50, 62)], new) == 2
    assert cache.match([*range(8), *range(50, 63)]).num_tokens == 20
    assert cache.num_pages == 2
    allocator.check([new], [cache])


def test_a_long_sequence_lives_in_a_small_pool(allocator):
    allocator = PageAllocator(8, 4)
    cache = PrefixCache(allocator, window=6)
    table, known = windowed(cache, allocator, list(range(400)))
    assert known == 0 and table.num_tokens == 400 and cache.stats.evicted > 80
    again, known = windowed(cache, allocator, [*range(400), 9])
    assert known == 400
    allocator.check([table, again], [cache])


def test_every_hit_is_the_longest_whose_window_is_held(allocator):
    """All ways to hold 5 pages of 4 tokens, for several windows, against the definition."""
    tokens = list(range(22))
    for window, held in itertools.product([1, 3, 6, 9, 50], itertools.product([0, 1], repeat=5)):
        allocator = PageAllocator(32, 4)
        cache = PrefixCache(allocator, window=window)
        table = table_of(allocator, 20)
        cache.insert(tokens[:20], table)
        ids = table.page_ids
        table.release()
        for page_id, kept in zip(ids, held):
            if not kept:
                cache._let_go(cache._tree.by_page[page_id])
        cache.check()
        for wanted in range(1, 22):
            possible = [
                n
                for n in range(1, min(wanted, 20) + 1)
                if all(held[p // 4] for p in range(max(0, n - window + 1), n))
                # where no key is needed: only at the end of a page that is known
                and (window > 1 or n % 4 == 0 or held[n // 4])
                and any(held[(n - 1) // 4 :])
            ]
            found = cache.match([*tokens[:wanted], 99]).num_tokens
            assert found == max(possible, default=0), (window, held, wanted)


# Pages that sequences ended in.


def test_the_page_in_which_a_sequence_ended_is_cached_on_request(allocator):
    cache = PrefixCache(allocator, max_events=10)
    table = table_of(allocator, 10)
    assert cache.insert(range(10), table, tail=True) == 3
    table.release()
    (event,) = cache.take_events()
    assert event.tokens == tuple(range(10)) and len(event.page_hashes) == 3
    hit = PageTable(4)
    assert cache.reuse([*range(10), 77], hit) == 10
    assert len(hit.append_tokens(1, allocator).copies) == 1
    allocator.check([hit], [cache])
    assert cache.match([*range(9), 77]).num_tokens == 9


def test_part_of_a_page_is_not_cached_beside_one_that_begins_with_it(allocator):
    cache = PrefixCache(allocator)
    table, part = table_of(allocator, 12), table_of(allocator, 10)
    cache.insert(range(12), table)
    assert cache.insert(range(10), part, tail=True) == 0
    assert cache.insert([*range(8), 8, 50], part, tail=True) == 1
    allocator.check([table, part], [cache])


def test_a_page_that_was_outgrown_leaves_when_nobody_uses_it(allocator):
    cache = PrefixCache(allocator, max_events=10)
    first, second = table_of(allocator, 6), table_of(allocator, 7)
    cache.insert(range(6), first, tail=True)
    cache.insert(range(7), second, tail=True)
    assert cache.num_pages == 3  # the first table still reads its own
    first.release()
    second.release()
    whole = table_of(allocator, 8)
    cache.take_events()
    assert cache.insert(range(8), whole) == 1
    assert cache.num_pages == 2
    assert [len(event.page_hash) for event in cache.take_events()[:-1]] == [32, 32]
    assert cache.match(range(9)).num_tokens == 8
    whole.release()
    allocator.check([], [cache])


def test_a_page_that_was_cached_in_part_is_cached_whole_once_it_is_full(allocator):
    cache = PrefixCache(allocator)
    table = table_of(allocator, 8)
    assert cache.insert(range(6), table, tail=True) == 2
    assert cache.insert(range(8), table) == 1
    assert cache.num_pages == 2 and cache.match(range(9)).num_tokens == 8
    table.release()
    allocator.check([], [cache])


def test_a_table_that_goes_on_from_a_cached_tail_copies_it(allocator):
    cache = PrefixCache(allocator)
    table = table_of(allocator, 6)
    cache.insert(range(6), table, tail=True)
    plan = table.append_tokens(2, allocator)
    assert plan.copies == [(1, 2)]
    assert cache.insert([*range(6), 60, 70], table) == 1
    assert cache.match([*range(8), 9]).num_tokens == 6
    allocator.check([table], [cache])


# Values beside pages.


def test_values_are_found_by_the_tokens_they_were_kept_with(allocator):
    cache = PrefixCache(allocator)
    table = table_of(allocator, 12)
    cache.insert(range(12), table)
    assert cache.keep(range(8), "after 8") and cache.keep(range(10), "after 10")
    assert cache.keep([0, 1], "after 2") and cache.keep([0, 7], "elsewhere")
    assert cache.kept(range(12)) == [(2, "after 2"), (8, "after 8"), (10, "after 10")]
    assert cache.kept([*range(9), 99]) == [(2, "after 2"), (8, "after 8")]
    assert cache.kept(range(8)) == [(2, "after 2"), (8, "after 8")]
    assert cache.keep(range(8), "newer") and (8, "newer") in cache.kept(range(8))
    assert not cache.keep(range(16), "its last page is not cached")
    assert not cache.keep(range(16), "nor here", [ExtraKey("salt", "a")])


def test_values_leave_with_their_page(allocator):
    cache = PrefixCache(allocator, window=6)
    table = table_of(allocator, 12)
    cache.insert(range(12), table)
    cache.keep(range(5), "early")
    cache.keep(range(12), "late")
    table.free_before(8)
    cache.evict(2)
    assert cache.kept(range(12)) == [(12, "late")]
    assert not cache.keep(range(5), "beside a gap")
    cache.keep([0], "before any page")
    cache.reset()
    assert cache.kept(range(12)) == []
    allocator.check([table], [cache])


def test_values_of_other_keys_are_not_found(allocator):
    cache = PrefixCache(allocator)
    salt = [ExtraKey("salt", "a", position=4)]
    run(cache, list(range(8)))
    run(cache, list(range(8)), salt)
    cache.keep(range(6), "salted", salt)
    assert cache.kept(range(8)) == [] and cache.kept(range(8), salt) == [(6, "salted")]


def test_a_window_must_be_a_positive_number(allocator):
    before = snapshot(allocator)
    with pytest.raises(ValueError, match=r"\[PrefixCache\] window must be a whole number"):
        PrefixCache(allocator, window=0)
    assert snapshot(allocator) == before
