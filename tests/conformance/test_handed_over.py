"""Arrays that change in place after they were handed over, before anything has run."""

import mlx.core as mx
import numpy as np
import pytest
from metal_on_host import metal_on_host
from paged_mlx import PageAllocator, PagePool, PageTable, fast, paged_attention

PAGE, DIM = 4, 64


def normal(*shape, seed=0):
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


Q = normal(2, 2, DIM)
K, V = normal(6, 1, PAGE, DIM, seed=1), normal(6, 1, PAGE, DIM, seed=2)
CALLS = {
    "paged_attention": lambda tables, lens, cu: fast.paged_attention(
        Q, K, V, tables, lens, cu_seqlens_q=cu
    ),
    "plan": lambda tables, lens, cu: fast.paged_attention(
        Q, K, V, plan=fast.plan(
            tables, lens, cu_seqlens_q=cu, num_q_heads=2, num_kv_heads=1, page_size=PAGE,
            head_dim=DIM, dtype=mx.float32,
        ),
    ),
    "gather_pages": lambda tables, lens, cu: fast.gather_pages(K, V, tables, lens)[0],
}  # fmt: skip


@pytest.mark.parametrize("route", ["cpu", "metal"])
@pytest.mark.parametrize("call", CALLS)
def test_tables_and_lengths_are_read_when_they_are_handed_over(call, route):
    values = [[0, 1, 2], [3, 4, 5]], [10, 7], [0, 1, 2]
    arrays = [np.array(x, np.int32) for x in values]
    right = np.array(CALLS[call](*values))
    with metal_on_host() if route == "metal" else mx.stream(mx.cpu):
        lazy = CALLS[call](*arrays)
        for array in arrays:
            array[:] = array[::-1].copy() // 2
        np.testing.assert_allclose(np.array(lazy), right, atol=1e-6)


def test_slots_are_read_when_they_are_handed_over():
    slots, tokens = (
        np.array([3, 9], np.int32),
        (normal(2, 1, DIM, seed=3), normal(2, 1, DIM, seed=4)),
    )
    right = np.array(fast.write_pages(*tokens, K, V, [3, 9])[0])
    pool = PagePool(1, 6, PAGE, 1, DIM, mx.float32)
    lazy, mapping = fast.write_pages(*tokens, K, V, slots)[0], pool.slots(slots)
    slots[:] = 0
    pool.write(0, *tokens, mapping)
    assert np.array_equal(np.array(lazy), right)
    written = np.array(pool.state[0][0])
    assert written[0, 0, 3].any() and written[2, 0, 1].any() and not written[0, 0, 0].any()
    assert pool.tokens_stored.tolist() == [4, 0, 2, 0, 0, 0]


def test_slots_of_a_write_are_counted_as_they_were():
    pool = PagePool(1, 6, PAGE, 1, DIM, mx.float32)
    slots = np.array([3, 9], np.int32)
    pool.write(0, normal(2, 1, DIM), normal(2, 1, DIM), slots)
    slots[:] = 20
    assert pool.tokens_stored.tolist() == [4, 0, 2, 0, 0, 0]


def test_pairs_are_read_when_they_are_handed_over():
    pairs = np.array([[0, 5], [1, 4]], np.int32)
    right = np.array(fast.copy_pages([K], [[0, 5], [1, 4]])[0])
    pool = PagePool(1, 6, PAGE, 1, DIM, mx.float32)
    pool.write(0, normal(24, 1, DIM), normal(24, 1, DIM), np.arange(24))
    before = np.array(pool.state[0][0])
    lazy = fast.copy_pages([K], pairs)[0]
    pool.copy(pairs)
    pairs[:] = [[2, 3], [3, 2]]
    assert np.array_equal(np.array(lazy), right)
    after = np.array(pool.state[0][0])
    assert np.array_equal(after, before[[0, 1, 2, 3, 1, 0]])


def test_the_plan_of_the_step_before_is_no_view_of_the_arrays_it_was_made_of():
    tables, lens = np.array([[0, 1, 2]], np.int32), np.array([9], np.int32)
    options = dict(num_q_heads=2, num_kv_heads=1, page_size=PAGE, head_dim=DIM, dtype=mx.float32)
    previous = fast.plan(tables, lens, **options)
    tables[:], lens[:] = [[3, 4, 5]], [10]
    following = fast.plan(tables, lens, previous=previous, **options)
    assert following.items[0]["pages"] == [3, 4, 5] and following.items[0]["keys"] == (0, 10)
    assert previous.items[0]["pages"] == [0, 1, 2] and previous.items[0]["keys"] == (0, 9)


def test_a_table_that_grows_after_the_call_changes_no_call_before():
    allocator = PageAllocator(6, PAGE)
    pool = PagePool(1, 6, PAGE, 1, DIM, mx.float32, allocator=allocator)
    table = PageTable(PAGE)
    slots = table.append_tokens(7, allocator).slots
    pool.write(0, normal(7, 1, DIM), normal(7, 1, DIM, seed=1), slots)
    right = np.array(paged_attention(Q[:1], [table], pool[0]))
    lazy = paged_attention(Q[:1], [table], pool[0])
    more = table.append_tokens(3, allocator).slots
    pool.write(0, normal(3, 1, DIM, seed=5), normal(3, 1, DIM, seed=6), more)
    assert np.array_equal(np.array(lazy), right)
    assert not np.array_equal(np.array(paged_attention(Q[:1], [table], pool[0])), right)
