"""Every kind of planted corruption of pages is detected and named."""

import itertools
import random

import numpy as np
import pytest
from page_helpers import table_of
from paged_mlx.pages.canary import Canary, CorruptPage
from paged_mlx.pages.policies import PageAllocator
from paged_mlx.pages.table import PageTable, append_batch, share_prefix
from paged_mlx.pages.token_hash import RollingHash
from paged_mlx.prefix.cache import PrefixCache


@pytest.fixture
def allocator():
    return PageAllocator(32, 4)


@pytest.fixture
def canary(allocator):
    return Canary(allocator)


def written(canary, tokens):
    """A table whose tokens are written."""
    return write(canary, PageTable(4), tokens)


def write(canary, table, tokens):
    """Append tokens to a table and note them."""
    slots = table.append_tokens(len(tokens), canary._allocator).slots
    canary.note([table], [tokens], slots)
    return table


def assert_corrupt(canary, table, kind, position, says=None):
    with pytest.raises(CorruptPage, match=says) as caught:
        canary.verify(table)
    assert (caught.value.kind, caught.value.position) == (kind, position)
    assert caught.value.page_id == table.entries[position // 4].physical_page_id


def test_what_was_written_is_verified(canary):
    table = written(canary, list(range(11)))
    canary.verify(table)
    write(canary, table, [7])
    canary.verify(table)


def test_tokens_hashed_one_by_one_have_the_hashes_of_tokens_hashed_at_once():
    one, many = RollingHash(itertools.count()), RollingHash(itertools.count())
    many.extend(range(40))
    for token in range(40):
        one.extend([token])
    assert one.hashes.tolist() == many.hashes.tolist()
    assert len(set(many.hashes.tolist())) == 40


def test_swapped_pages_are_other_positions(canary):
    table = written(canary, [1] * 12)
    table.map.ids[0], table.map.ids[1] = table.map.ids[1], table.map.ids[0]
    assert_corrupt(canary, table, "other position", 0, "holds token 1 at position 4")


def test_a_repeated_page_is_another_position(canary):
    table = written(canary, [1] * 12)
    table.map.ids[2] = table.map.ids[1]
    assert_corrupt(canary, table, "other position", 8)


def test_a_page_of_another_sequence_is_named(canary):
    table = written(canary, list(range(12)))
    other = written(canary, list(range(50, 62)))
    table.map.ids[1] = other.map.ids[1]
    says = "must hold token 4 at position 4 of sequence 0; it holds token 54 .* of sequence 1"
    assert_corrupt(canary, table, "other sequence", 4, says)


def test_the_same_token_at_the_same_position_after_another_beginning_is_seen(canary):
    table = written(canary, [1, 2, 3, 4, 5, 5, 5, 5])
    other = written(canary, [9, 2, 3, 4, 5, 5, 5, 5])
    table.map.ids[1] = other.map.ids[1]
    assert_corrupt(canary, table, "other beginning", 4)


def test_a_slot_never_written_is_seen(canary, allocator):
    table = written(canary, list(range(6)))
    table.append_tokens(1, allocator)
    table.token_hash.extend([6])
    assert_corrupt(canary, table, "never written", 6, "it holds nothing")


def test_a_token_that_was_skipped_is_seen(canary, allocator):
    table = written(canary, list(range(6)))
    table.append_tokens(2, allocator)
    canary.note([table], [[6, 7]], np.array([6, -1]))
    assert "7 slots noted" in repr(canary)
    assert_corrupt(canary, table, "never written", 7)


def test_another_token_of_the_same_sequence_is_seen(canary, allocator):
    table = written(canary, list(range(6)))
    table.truncate(5)
    table.append_tokens(1, allocator)
    table.token_hash.extend([99])  # accepted, but not written again
    assert_corrupt(canary, table, "other token", 5, "token 99 .*; it holds token 5")


def test_a_page_that_was_freed_under_its_table_is_seen(canary, allocator):
    table = written(canary, list(range(6)))
    allocator.free_page(table.map.ids[1])
    assert_corrupt(canary, table, "free page", 4)
    other = written(canary, list(range(4)))
    assert other.map.ids[0] == table.map.ids[1]
    assert_corrupt(canary, table, "other sequence", 4)


def test_a_copy_that_was_not_made_is_seen(canary, allocator):
    table = written(canary, list(range(6)))
    fork = table.fork()
    allocator.detach(canary)
    write(canary, fork, [60])
    assert_corrupt(canary, fork, "never written", 4)
    canary.verify(table)


def test_a_write_to_a_shared_page_is_seen_by_its_other_holder(canary, allocator):
    table = written(canary, list(range(6)))
    fork = table.fork()
    fork.token_hash.truncate(5)
    canary.note([fork], [[60]], table.slots(5, 6))  # in place: nobody copied
    assert_corrupt(canary, table, "other sequence", 5)
    canary.verify(fork)


def test_ragged_and_windowed_tables_are_verified(canary, allocator):
    table = written(canary, list(range(11)))
    table.free_before(5)
    canary.verify(table)
    table.seal()
    write(canary, table, [11, 12])
    canary.verify(table)
    table.map.ids[3] = table.map.ids[1]
    with pytest.raises(CorruptPage, match="other position: slot 0 of page 1 .* at position 11"):
        canary.verify(table)


def test_forks_and_shared_prefixes_carry_the_tokens_noted_and_grow_alone(canary, allocator):
    table, target = written(canary, list(range(6))), PageTable(4)
    fork = table.fork()
    share_prefix(table, target, 5)
    for one, token in ((fork, 60), (target, 50), (table, 70)):
        write(canary, one, [token])
    assert table.token_hash.tokens.tolist() == [0, 1, 2, 3, 4, 5, 70]
    assert fork.token_hash.tokens.tolist() == [0, 1, 2, 3, 4, 5, 60]
    assert target.token_hash.tokens.tolist() == [0, 1, 2, 3, 4, 50]
    fork.truncate(6)
    assert len(table.token_hash) == 7 and len(fork.token_hash) == 6
    assert len({one.token_hash.sequence for one in (table, fork, target)}) == 3
    for one in (table, fork, target):
        canary.verify(one)


def test_a_canary_says_its_state(canary):
    table = written(canary, list(range(6)))
    assert repr(canary) == "Canary(32 pages of 4, 0 layers, 6 slots noted)"
    assert repr(table.token_hash) == "RollingHash(sequence 0, 6 tokens)"


def test_notes_that_do_not_fit_are_errors_and_change_nothing(canary):
    table = written(canary, list(range(6)))
    table.append_tokens(2, canary._allocator)
    with pytest.raises(ValueError, match=r"^\[note\] slots must have one slot per token, 2; got"):
        canary.note([table], [[1, 2]], np.array([1]))
    with pytest.raises(ValueError, match=r"^\[note\] tokens must be those of 1 tables; got 2"):
        canary.note([table], [[1], [2]], np.array([1, 2]))
    assert len(table.token_hash) == 6
    table.truncate(6)
    table.token_hash.extend([1])
    with pytest.raises(ValueError, match=r"^\[verify\] table must have the 7 tokens noted for it"):
        canary.verify(table)


def test_a_canary_follows_a_pool_that_grows():
    allocator = PageAllocator(1, 4, max_pages=4)
    canary = Canary(allocator)
    table = written(canary, list(range(13)))
    assert canary.num_pages == 4
    canary.verify(table)


def test_the_page_manager_keeps_every_canary_alive():
    rng = random.Random(0)
    allocator = PageAllocator(48, 4)
    cache, canary = PrefixCache(allocator), Canary(allocator)
    live = [written(canary, [0] * 9)]
    for _ in range(600):
        table = rng.choice(live)
        action = rng.randrange(6)
        tokens = [rng.randrange(3) for _ in range(rng.randrange(1, 7))]
        if action == 0:
            live.append(table.fork())
        elif action == 1:
            table.truncate(rng.randrange(table.num_tokens + 1))
        elif action == 2:
            cache.insert(table.token_hash.tokens, table)
        elif action == 3:
            prompt, found = [*table.token_hash.tokens.tolist(), *tokens], PageTable(4)
            canary.begin(found, prompt[: cache.reuse(prompt, found)])
            live.append(found)
        elif allocator.num_available > 4 * len(live):
            chosen = [one for one in live if rng.random() < 0.5]
            slots = append_batch(chosen, [len(tokens)] * len(chosen), allocator).slots
            canary.note(chosen, [tokens] * len(chosen), slots)
        while len(live) > 6:
            live.pop(rng.randrange(len(live))).release()
        for one in live:
            canary.verify(one)
    assert table_of(allocator, 1).num_pages == 1
