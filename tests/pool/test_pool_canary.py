"""A pool with a canary: attention refuses pages that do not hold what their tables say."""

import random
from functools import partial
from itertools import chain

import mlx.core as mx
import numpy as np
import pytest
from paged_mlx import (
    CorruptPage,
    PageAllocator,
    PagePool,
    PageTable,
    PrefixCache,
    append_batch,
    copy_on_write,
    paged_attention,
    share_prefix,
)

HEADS, DIM, PAGE, LAYERS = 2, 8, 4, 3


@pytest.fixture
def allocator():
    return PageAllocator(32, PAGE)


@pytest.fixture
def pool(allocator):
    return PagePool(LAYERS, 32, PAGE, HEADS, DIM, mx.float32, allocator=allocator, canary=True)


def write(pool, slots, layers=range(LAYERS)):
    rows = mx.zeros((len(slots), HEADS, DIM))
    for layer in layers:
        pool.write(layer, rows, rows, slots)


def append(pool, table, tokens, layers=range(LAYERS)):
    plan = table.append_tokens(len(tokens), pool.allocator)
    pool.canary.note([table], [tokens], plan.slots)
    write(pool, plan.slots, layers)


def sequence(pool, tokens):
    table = PageTable(PAGE)
    append(pool, table, tokens)
    return table


def attend(pool, *tables, layer=0):
    return paged_attention(mx.zeros((len(tables), HEADS, DIM)), list(tables), pool[layer])


def assert_corrupt(pool, table, kind, position, layer=0):
    with pytest.raises(CorruptPage) as caught:
        attend(pool, table, layer=layer)
    assert (caught.value.kind, caught.value.position) == (kind, position)
    assert str(caught.value).startswith(f"{kind}: ")


def test_attention_over_pages_that_hold_their_tokens_passes(pool):
    first, second = sequence(pool, list(range(11))), sequence(pool, [5] * 6)
    for layer in range(LAYERS):
        assert attend(pool, first, second, layer=layer).shape == (2, HEADS, DIM)
    append(pool, first, [1, 2])
    pool.check([first, second])


def test_a_pool_without_a_canary_records_nothing(allocator):
    pool = PagePool(1, 32, PAGE, HEADS, DIM, mx.float32, allocator=allocator)
    table = PageTable(PAGE)
    pool.write(0, mx.zeros((3, HEADS, DIM)), mx.zeros((3, HEADS, DIM)),
               table.append_tokens(3, allocator).slots)  # fmt: skip
    attend(pool, table)
    assert pool.canary is None and table.token_hash is None and allocator.pools == [pool]


def test_use_after_free_is_named(pool, allocator):
    table = sequence(pool, list(range(8)))
    attend(pool, table)
    allocator.free_page(table.page_ids[1])
    assert_corrupt(pool, table, "free page", 4)


def test_a_freed_page_that_was_handed_out_again_is_named_before_and_after_it_is_written(
    pool, allocator
):
    table = sequence(pool, list(range(8)))
    allocator.free_page(table.page_ids[1])
    thief = PageTable(PAGE)
    plan = thief.append_tokens(4, allocator)
    assert thief.page_ids == table.page_ids[1:]
    assert_corrupt(pool, table, "never written", 4)
    pool.canary.note([thief], [[90, 91, 92, 93]], plan.slots)
    write(pool, plan.slots)
    assert_corrupt(pool, table, "other sequence", 4)
    attend(pool, thief)


def test_a_reference_that_was_lost_is_named(pool, allocator):
    table = sequence(pool, list(range(8)))
    allocator._refs[table.page_ids[1]] = 0  # freed, and nobody told
    assert_corrupt(pool, table, "free page", 4)


def test_tokens_that_were_noted_and_given_up_are_waited_for_no_more(pool, allocator):
    table = PageTable(PAGE)
    plan = table.append_tokens(6, allocator)
    pool.canary.note([table], [list(range(6))], plan.slots)
    fork = table.fork()
    append(pool, fork, [6], layers=[1])
    for gone in (table, fork):
        gone.release()
    pool.check([])
    attend(pool, sequence(pool, [1, 2, 3]))


def test_a_write_to_a_free_page_is_refused_and_changes_nothing(pool, allocator):
    table = PageTable(PAGE)
    plan = table.append_tokens(4, allocator)
    pool.canary.note([table], [[1, 2, 3, 4]], plan.slots)
    table.release()
    state = list(chain(*pool.state))
    with pytest.raises(CorruptPage, match="free page: nobody holds page 0, which layer 1 writes"):
        write(pool, plan.slots, layers=[1])
    assert all(a is b for a, b in zip(state, chain(*pool.state), strict=True))


def test_a_write_that_fails_is_not_followed(pool, allocator):
    table = PageTable(PAGE)
    plan = table.append_tokens(4, allocator)
    pool.canary.note([table], [[1, 2, 3, 4]], plan.slots)
    with pytest.raises(ValueError, match="k must have shape"):
        pool.write(0, mx.zeros((4, HEADS, DIM + 8)), mx.zeros((4, HEADS, DIM)), plan.slots)
    assert_corrupt(pool, table, "missed layer", 0)


def test_swapped_pages_are_named_even_right_after_a_good_read(pool):
    table = sequence(pool, [7] * 12)
    attend(pool, table)
    table.map.ids[0], table.map.ids[1] = table.map.ids[1], table.map.ids[0]
    assert_corrupt(pool, table, "other position", 0)


def test_a_stale_slot_after_truncate_is_named(pool, allocator):
    table = sequence(pool, list(range(6)))
    attend(pool, table)
    table.truncate(5)
    attend(pool, table)
    plan = table.append_tokens(1, allocator)
    assert_corrupt(pool, table, "never written", 5)
    pool.canary.note([table], [[9]], np.full_like(plan.slots, -1))
    assert_corrupt(pool, table, "other token", 5)


def test_a_page_of_another_sequence_is_named(pool):
    table, other = sequence(pool, list(range(8))), sequence(pool, list(range(50, 58)))
    table.map.ids[1] = other.map.ids[1]
    assert_corrupt(pool, table, "other sequence", 4)


def test_a_page_after_another_beginning_is_named(pool):
    table, other = sequence(pool, [1, 2, 3, 4, 5]), sequence(pool, [9, 2, 3, 4, 5])
    table.map.ids[1] = other.map.ids[1]
    assert_corrupt(pool, table, "other beginning", 4)


def test_a_layer_that_missed_a_write_is_named_and_other_layers_pass(pool):
    table = sequence(pool, list(range(6)))
    append(pool, table, [6], layers=[0, 2])
    attend(pool, table, layer=0)
    assert_corrupt(pool, table, "missed layer", 6, layer=1)
    attend(pool, table, layer=2)


def test_a_token_that_a_write_skipped_is_named(pool, allocator):
    table = sequence(pool, list(range(6)))
    plan = table.append_tokens(2, allocator)
    pool.canary.note([table], [[6, 7]], plan.slots)
    write(pool, [6, -1])
    assert_corrupt(pool, table, "missed layer", 7)


def test_a_copy_that_was_not_made_is_named(pool, allocator):
    table = sequence(pool, list(range(6)))
    fork = table.fork()
    allocator.detach(pool.canary)
    append(pool, fork, [60])
    assert_corrupt(pool, fork, "never written", 4)
    attend(pool, table)


def test_a_write_to_a_shared_page_is_named_to_its_other_holder(pool, allocator):
    table = sequence(pool, list(range(6)))
    fork = table.fork()
    fork.truncate(5)
    allocator._refs[fork.page_ids[1]] = 1  # the count is wrong, so nobody copies
    append(pool, fork, [60])
    assert_corrupt(pool, table, "other sequence", 5)


def test_tokens_that_were_never_noted_are_an_error(pool, allocator):
    table = PageTable(PAGE)
    plan = table.append_tokens(3, allocator)
    write(pool, plan.slots)
    with pytest.raises(ValueError, match=r"^\[read\] table must have noted tokens"):
        attend(pool, table)
    with pytest.raises(ValueError, match=r"^\[note\] tokens must be the 3 of the table"):
        pool.canary.note([table], [[1, 2]], plan.slots)
    assert table.token_hash is None
    pool.canary.note([table], [[1, 2, 3]], plan.slots)
    write(pool, plan.slots)
    attend(pool, table)


def test_the_tokens_that_a_table_found_in_the_cache_are_verified(pool, allocator):
    cache = PrefixCache(allocator)
    table = sequence(pool, list(range(9)))
    cache.insert(range(9), table)
    table.release()
    found = PageTable(PAGE)
    saved = cache.reuse([0, 1, 2, 3, 4, 5, 99, 98], found)
    assert saved == 6
    pool.canary.begin(found, range(saved))
    append(pool, found, [99, 98])
    pool.check([found], [cache])
    wrong = PageTable(PAGE)
    cache.reuse([0, 1, 2, 3, 4], wrong)
    with pytest.raises(ValueError, match=r"^\[begin\] tokens must be all tokens of the table, 4"):
        pool.canary.begin(wrong, [0, 1, 2])
    pool.canary.begin(wrong, [0, 1, 2, 9])
    assert_corrupt(pool, wrong, "other sequence", 3)


def test_a_write_inside_a_compiled_function_is_refused(pool):
    @partial(mx.compile, inputs=pool.state, outputs=pool.state)
    def step(k, slots):
        pool.write(0, k, k, slots)
        return k

    with pytest.raises(ValueError, match="the pool must have no canary to be written inside"):
        step(mx.zeros((1, HEADS, DIM)), mx.array([0], mx.int32))


def test_check_reads_every_layer(pool):
    table = sequence(pool, list(range(6)))
    append(pool, table, [6], layers=[0, 1])
    with pytest.raises(CorruptPage, match="layer 2 has not written it"):
        pool.check([table])


def test_a_detached_pool_has_no_canary(pool, allocator):
    allocator.detach(pool)
    assert pool.canary is None and allocator.pools == []


def test_a_life_of_pages_keeps_the_canary_alive(pool, allocator):
    rng = random.Random(1)
    cache, live = PrefixCache(allocator), []
    for _ in range(400):
        action = rng.randrange(7)
        tokens = [rng.randrange(3) for _ in range(rng.randrange(1, 7))]
        if action == 0 or not live:
            if allocator.num_available >= 2:
                live.append(sequence(pool, tokens))
            continue
        table = rng.choice(live)
        if action == 1:
            live.append(table.fork())
        elif action == 2:
            table.truncate(rng.randrange(1, table.num_tokens + 1))
        elif action == 3:
            cache.insert(table.token_hash.tokens, table)
        elif action == 4:
            target = PageTable(PAGE)
            share_prefix(table, target, rng.randrange(1, table.num_tokens + 1),
                         partial=rng.choice(["copy", "seal"]))  # fmt: skip
            live.append(target)
        elif action == 5 and allocator.num_available:
            copy_on_write(table, rng.randrange(table.num_tokens), allocator)
        elif allocator.num_available > 3 * len(live):
            chosen = [table for table in live if rng.random() < 0.5]
            plan = append_batch(chosen, [len(tokens)] * len(chosen), allocator)
            if chosen:
                pool.canary.note(chosen, [tokens] * len(chosen), plan.slots)
                write(pool, plan.slots)
        while len(live) > 5:
            live.pop(rng.randrange(len(live))).release()
        pool.canary.read(rng.randrange(LAYERS), live)
    pool.check(live, [cache])
