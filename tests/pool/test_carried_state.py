"""What a pool carries from step to step: versions, counts of tokens, pages after OutOfPages."""

import mlx.core as mx
import numpy as np
import pytest
from paged_mlx import (
    CorruptPage,
    OutOfPages,
    PageAllocator,
    PagePool,
    PageTable,
    copy_on_write,
    paged_attention,
)

PAGE, DIM, LAYERS = 4, 8, 2


def tokens(count, seed=0):
    x = np.random.default_rng(seed).standard_normal((2, count, 1, DIM)).astype(np.float32)
    return mx.array(x[0]), mx.array(x[1])


def make(num_pages, **options):
    allocator = PageAllocator(num_pages, PAGE)
    pool = PagePool(LAYERS, num_pages, PAGE, 1, DIM, mx.float32, allocator=allocator, **options)
    return allocator, pool


def append(table, allocator, pool, count, seed):
    """Append tokens and write them; their K is ``seed`` everywhere."""
    appended = table.append_tokens(count, allocator)
    rows = mx.full((count, 1, DIM), float(seed))
    for layer in range(LAYERS):
        pool.write(layer, rows + layer, -rows - layer, appended.slots)


def content(table, pool, layer=0):
    """K of the table's tokens, one number each; V and the other layer must agree."""
    found = []
    for entry in table.entries:
        length = entry.logical_end - entry.logical_start
        k, v = (np.array(x)[entry.physical_page_id, 0, :length, 3] for x in pool.state[layer])
        assert np.array_equal(k, -v)
        found += (k - layer).tolist()
    return found


# Counts


def test_tokens_stored_is_the_last_token_of_the_last_write_to_each_page():
    pool = PagePool(1, 4, PAGE, 1, DIM, mx.float32)
    for slots, right in [
        ([0, 1], [2, 0, 0, 0]),
        ([2, 4], [3, 1, 0, 0]),
        ([1, -1], [2, 1, 0, 0]),
        ([-1, -1], [2, 1, 0, 0]),
        ([11, 8, 9], [2, 1, 4, 0]),
    ]:
        pool.write(0, *tokens(len(slots)), slots)
        assert pool.tokens_stored.tolist() == right


def test_tokens_stored_follows_copies_growth_and_shrinking():
    pool = PagePool(1, 4, PAGE, 1, DIM, mx.float32)
    pool.write(0, *tokens(3), [0, 1, 6])
    pool.copy([(0, 3), (1, 2)])
    assert pool.tokens_stored.tolist() == [2, 3, 3, 2]
    pool.write(0, *tokens(1), [3])
    pool.grow(6)
    assert pool.tokens_stored.tolist() == [4, 3, 3, 2, 0, 0]
    pool.write(0, *tokens(1), [20])
    pool.shrink(3)
    assert pool.tokens_stored.tolist() == [4, 3, 3]
    pool.grow(6)
    assert pool.tokens_stored.tolist() == [4, 3, 3, 0, 0, 0]


def test_tokens_stored_counts_layer_0_alone_and_every_write_of_many():
    pool = PagePool(2, 4, PAGE, 1, DIM, mx.float32)
    pool.write(1, *tokens(1), [5])
    assert pool.tokens_stored.tolist() == [0, 0, 0, 0]
    for step in range(600):
        pool.write(0, *tokens(1), [step % 16])
    assert pool.tokens_stored.tolist() == [4, 4, 4, 4]  # step 599 writes slot 7, the last of page 1


def test_freed_pages_that_are_wiped_store_nothing():
    allocator, pool = make(4, wipe_freed=0.0)
    table = PageTable(PAGE)
    append(table, allocator, pool, 6, 7)
    table.release()
    assert pool.tokens_stored.tolist() == [0, 0, 0, 0]
    assert all(not np.array(pages).any() for arrays in pool.state for pages in arrays)


# Versions


def test_a_write_in_one_layer_leaves_the_others_and_v_gets_v():
    pool = PagePool(3, 2, PAGE, 1, DIM, mx.float32)
    k, v = tokens(1)
    pool.write(1, k, v, [5])
    for layer in range(3):
        for pages, row in zip(pool.state[layer], (k, v)):
            pages = np.array(pages)
            right = np.zeros_like(pages)
            if layer == 1:
                right[1, 0, 1] = np.array(row)[0, 0]
            assert np.array_equal(pages, right)


def test_reads_before_a_write_see_what_was_there_before():
    _, pool = make(2)
    pool.write(0, *tokens(8, 1), np.arange(8))
    before = np.array(pool[0].gather([[0, 1]], [8])[0])
    lazy = pool[0].gather([[0, 1]], [8])
    pool.write(0, *tokens(8, 2), np.arange(8))
    after = pool[0].gather([[0, 1]], [8])
    assert np.array_equal(np.array(after[0])[0, 0], np.array(tokens(8, 2)[0])[:, 0])
    assert np.array_equal(np.array(lazy[0]), before)


def test_a_copy_comes_before_later_writes_and_after_earlier_ones():
    _, pool = make(3)
    pool.write(0, *tokens(1, 1), [0])
    pool.copy([(0, 2)])
    pool.write(0, *tokens(1, 2), [0])
    k = np.array(pool.state[0][0])
    assert np.array_equal(k[2, 0, 0], np.array(tokens(1, 1)[0])[0, 0])
    assert np.array_equal(k[0, 0, 0], np.array(tokens(1, 2)[0])[0, 0])


def test_growth_keeps_pending_writes_and_every_layer():
    _, pool = make(2)
    for layer in range(LAYERS):
        pool.write(layer, *tokens(8, layer), np.arange(8))
    pool.grow(5)
    for layer in range(LAYERS):
        for pages, rows in zip(pool.state[layer], tokens(8, layer)):
            pages = np.array(pages)
            assert pages.shape[0] == 5 and not pages[2:].any()
            assert np.array_equal(pages[:2, 0].reshape(8, DIM), np.array(rows)[:, 0])


# OutOfPages, and going on


def test_an_append_that_runs_out_of_pages_changes_nothing_and_a_smaller_one_goes_on():
    allocator, pool = make(3)
    one, two = PageTable(PAGE), PageTable(PAGE)
    append(one, allocator, pool, 6, 1)
    append(two, allocator, pool, 2, 2)
    before = [(t.entries, t.num_tokens) for t in (one, two)]
    with pytest.raises(OutOfPages):
        two.append_tokens(3, allocator)
    with pytest.raises(OutOfPages):
        one.append_tokens(40, allocator)
    assert before == [(t.entries, t.num_tokens) for t in (one, two)]
    pool.check([one, two])
    append(two, allocator, pool, 2, 3)
    append(one, allocator, pool, 2, 4)
    assert content(one, pool) == [1] * 6 + [4] * 2 and content(two, pool, 1) == [2, 2, 3, 3]
    pool.check([one, two])


def test_a_copy_on_write_that_runs_out_of_pages_changes_nothing():
    allocator, pool = make(2)
    source = PageTable(PAGE)
    append(source, allocator, pool, 6, 1)
    fork = source.fork()
    with pytest.raises(OutOfPages):
        fork.append_tokens(1, allocator)
    assert content(source, pool) == content(fork, pool) == [1] * 6
    pool.check([source, fork])
    fork.truncate(4)
    source.append_tokens(1, allocator)
    pool.check([source, fork])
    with pytest.raises(OutOfPages):
        copy_on_write(fork, 1, allocator)
    pool.check([source, fork])
    assert content(fork, pool) == [1] * 4


def test_a_pool_that_may_not_grow_is_as_it_was():
    allocator, pool = make(2)
    table = PageTable(PAGE)
    append(table, allocator, pool, 6, 1)
    pool.memory_limit = mx.get_active_memory()
    with pytest.raises(OutOfPages, match="memory_limit"):
        pool.grow(100)
    assert pool.num_pages == 2 and len(pool.tokens_stored) == 2
    append(table, allocator, pool, 2, 2)
    assert content(table, pool) == [1] * 6 + [2] * 2
    pool.check([table])
    pool.memory_limit = 2**40
    pool.grow(4)
    assert content(table, pool, 1) == [1] * 6 + [2] * 2


def test_attention_by_tables_asks_the_canary_and_the_layer_that_was_not_written_is_refused():
    allocator, pool = make(4, canary=True)
    table = PageTable(PAGE)
    slots = table.append_tokens(3, allocator).slots
    pool.canary.note([table], [[7, 8, 9]], slots)
    pool.write(0, *tokens(3), slots)
    q = mx.zeros((1, 1, DIM))
    assert paged_attention(q, [table], pool[0]).shape == (1, 1, DIM)
    with pytest.raises(CorruptPage):
        paged_attention(q, [table], pool[1])
    pool.write(1, *tokens(3), slots)
    assert paged_attention(q, [table], pool[1]).shape == (1, 1, DIM)


def test_a_copy_reaches_every_layer_of_many():
    pool = PagePool(7, 3, PAGE, 1, DIM, mx.float32)
    for layer in range(7):
        pool.write(layer, *tokens(PAGE, layer), np.arange(PAGE))
    pool.copy([(0, 2)])
    for layer in range(7):
        for pages in pool.state[layer]:
            pages = np.array(pages)
            assert pages[0].any() and np.array_equal(pages[2], pages[0]) and not pages[1].any()


def test_a_gather_leaves_zeros_where_a_table_has_no_page():
    pool = PagePool(1, 3, PAGE, 1, DIM, mx.float32)
    pool.write(0, *tokens(3 * PAGE), np.arange(3 * PAGE))
    k, v = (np.array(x)[0, 0] for x in pool[0].gather([[-1, 2]], [2 * PAGE]))
    for gathered, pages in zip((k, v), pool.state[0]):
        assert not gathered[:PAGE].any()
        assert np.array_equal(gathered[PAGE:], np.array(pages)[2, 0])
