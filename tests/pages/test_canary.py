"""Every kind of planted corruption of pages is detected and named."""

import random

import numpy as np
import pytest
from page_helpers import table_of
from paged_mlx.pages.append import append_batch
from paged_mlx.pages.canary import Canary, CorruptPage
from paged_mlx.pages.policies import PageAllocator
from paged_mlx.pages.table import PageTable
from paged_mlx.prefix.cache import PrefixCache


@pytest.fixture
def allocator():
    return PageAllocator(32, 4)


@pytest.fixture
def canary(allocator):
    return Canary(allocator)


def written(canary, tokens):
    """A table whose tokens are written, and its trail."""
    table, trail = PageTable(4), canary.trail()
    plan = table.append_tokens(len(tokens), canary._allocator)
    canary.wrote(trail, tokens, plan.slots)
    return table, trail


def assert_corrupt(canary, table, trail, kind, position, says=None):
    with pytest.raises(CorruptPage, match=says) as caught:
        canary.verify(table, trail)
    assert (caught.value.kind, caught.value.position) == (kind, position)
    assert caught.value.page_id == table.entries[position // 4].physical_page_id


def test_what_was_written_is_verified(canary):
    table, trail = written(canary, list(range(11)))
    canary.verify(table, trail)
    canary.wrote(trail, [7], table.append_tokens(1, canary._allocator).slots)
    canary.verify(table, trail)


def test_tokens_written_one_by_one_leave_the_trail_of_tokens_written_at_once(canary):
    one, many = canary.trail(), canary.trail(range(40))
    for token in range(40):
        one.extend([token])
    assert one.marks.tolist() == many.marks.tolist()
    assert len(set(many.marks.tolist())) == 40


def test_swapped_pages_are_other_positions(canary):
    table, trail = written(canary, [1] * 12)
    table._pages[0], table._pages[1] = table._pages[1], table._pages[0]
    assert_corrupt(canary, table, trail, "other position", 0, "holds token 1 at position 4")


def test_a_repeated_page_is_another_position(canary):
    table, trail = written(canary, [1] * 12)
    table._pages[2] = table._pages[1]
    assert_corrupt(canary, table, trail, "other position", 8)


def test_a_page_of_another_sequence_is_named(canary):
    table, trail = written(canary, list(range(12)))
    other, _ = written(canary, list(range(50, 62)))
    table._pages[1] = other._pages[1]
    says = "must hold token 4 at position 4 of sequence 0; it holds token 54 .* of sequence 1"
    assert_corrupt(canary, table, trail, "other sequence", 4, says)


def test_the_same_token_at_the_same_position_after_another_beginning_is_seen(canary):
    table, trail = written(canary, [1, 2, 3, 4, 5, 5, 5, 5])
    other, _ = written(canary, [9, 2, 3, 4, 5, 5, 5, 5])
    table._pages[1] = other._pages[1]
    assert_corrupt(canary, table, trail, "other beginning", 4)


def test_a_slot_never_written_is_seen(canary, allocator):
    table, trail = written(canary, list(range(6)))
    table.append_tokens(1, allocator)
    trail.extend([6])
    assert_corrupt(canary, table, trail, "never written", 6, "it holds nothing")


def test_a_token_that_was_skipped_is_seen(canary, allocator):
    table, trail = written(canary, list(range(6)))
    table.append_tokens(2, allocator)
    canary.wrote(trail, [6, 7], np.array([6, -1]))
    assert_corrupt(canary, table, trail, "never written", 7)


def test_another_token_of_the_same_sequence_is_seen(canary, allocator):
    table, trail = written(canary, list(range(6)))
    table.truncate(5)
    trail.truncate(5)
    table.append_tokens(1, allocator)
    trail.extend([99])  # accepted, but not written again
    assert_corrupt(canary, table, trail, "other token", 5, "token 99 .*; it holds token 5")


def test_a_page_that_was_freed_under_its_table_is_seen(canary, allocator):
    table, trail = written(canary, list(range(6)))
    allocator.free_page(table._pages[1])
    assert_corrupt(canary, table, trail, "free page", 4)
    other, _ = written(canary, list(range(4)))
    assert other._pages[0] == table._pages[1]
    assert_corrupt(canary, table, trail, "other sequence", 4)


def test_a_copy_that_was_not_made_is_seen(canary, allocator):
    table, trail = written(canary, list(range(6)))
    fork, forked = table.fork(), canary.fork(trail)
    allocator.detach(canary)
    canary.wrote(forked, [60], fork.append_tokens(1, allocator).slots)
    assert_corrupt(canary, fork, forked, "never written", 4)
    canary.verify(table, trail)


def test_a_write_to_a_shared_page_is_seen_by_its_other_holder(canary, allocator):
    table, trail = written(canary, list(range(6)))
    fork, forked = table.fork(), canary.fork(trail)
    forked.truncate(5)
    canary.wrote(forked, [60], table.slots(5, 6))  # in place: nobody copied
    assert_corrupt(canary, table, trail, "other sequence", 5)
    assert fork.num_tokens == len(forked)


def test_ragged_and_windowed_tables_are_verified(canary, allocator):
    table, trail = written(canary, list(range(11)))
    table.free_before(5)
    canary.verify(table, trail)
    table.seal()
    canary.wrote(trail, [11, 12], table.append_tokens(2, allocator).slots)
    canary.verify(table, trail)
    table._pages[3] = table._pages[1]
    with pytest.raises(CorruptPage, match="other position: slot 0 of page 1 .* at position 11"):
        canary.verify(table, trail)


def test_a_trail_of_another_length_is_an_error(canary):
    table, trail = written(canary, list(range(6)))
    trail.truncate(5)
    with pytest.raises(ValueError, match=r"^\[verify\] trail must have 6 tokens, .*; got 5"):
        canary.verify(table, trail)
    with pytest.raises(ValueError, match=r"^\[wrote\] slots must have one slot per token, 2; got"):
        canary.wrote(trail, [1, 2], np.array([1]))
    assert len(trail) == 5


def test_a_canary_follows_a_pool_that_grows():
    allocator = PageAllocator(1, 4, max_pages=4)
    canary = Canary(allocator)
    table, trail = written(canary, list(range(13)))
    assert canary.num_pages == 4
    canary.verify(table, trail)


def test_the_page_manager_keeps_every_canary_alive():
    rng = random.Random(0)
    allocator = PageAllocator(48, 4)
    cache, canary = PrefixCache(allocator), Canary(allocator)
    live = [written(canary, [0] * 9)]
    for _ in range(600):
        table, trail = rng.choice(live)
        action = rng.randrange(6)
        tokens = [rng.randrange(3) for _ in range(rng.randrange(1, 7))]
        if action == 0:
            live.append((table.fork(), canary.fork(trail)))
        elif action == 1:
            length = rng.randrange(len(trail) + 1)
            table.truncate(length)
            trail.truncate(length)
        elif action == 2:
            cache.insert(trail.tokens, table)
        elif action == 3:
            prompt, found = [*trail.tokens.tolist(), *tokens], PageTable(4)
            saved = cache.reuse(prompt, found)
            live.append((found, canary.trail(prompt[:saved])))
        elif allocator.num_available > 4 * len(live):
            chosen = [pair for pair in live if rng.random() < 0.5]
            plan = append_batch([t for t, _ in chosen], [len(tokens)] * len(chosen), allocator)
            for row, (_, marked) in enumerate(chosen):
                slots = plan.slots[row * len(tokens) : (row + 1) * len(tokens)]
                canary.wrote(marked, tokens, slots)
        while len(live) > 6:
            live.pop(rng.randrange(len(live)))[0].release()
        for pair in live:
            canary.verify(*pair)
    assert table_of(allocator, 1).num_pages == 1
