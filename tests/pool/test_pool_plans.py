"""The plans that a pool makes and remembers are those of the tables as they are."""

import mlx.core as mx
import numpy as np
import pytest
from paged_mlx import PageAllocator, PagePool, PageTable, fast, paged_attention
from paged_mlx.pages.block_table import pack

PAGE, DIM, HEADS = 4, 8, 2


def make(num_pages=16, lengths=(9, 6)):
    allocator = PageAllocator(num_pages, PAGE)
    pool = PagePool(1, num_pages, PAGE, 1, DIM, mx.float32, allocator=allocator)
    tables = [PageTable(PAGE) for _ in lengths]
    for seed, (table, length) in enumerate(zip(tables, lengths)):
        append(pool, table, length, seed)
    return allocator, pool, tables


def append(pool, table, count, seed):
    x = np.random.default_rng(seed).standard_normal((2, count, 1, DIM)).astype(np.float32)
    slots = table.append_tokens(count, pool.allocator).slots
    pool.write(0, mx.array(x[0]), mx.array(x[1]), slots)


def q_of(tokens):
    x = np.random.default_rng(9).standard_normal((tokens, HEADS, DIM)).astype(np.float32)
    return mx.array(x)


def assert_plans_are_fresh(pool, tables, query_lens=None, **options):
    """What the pool attends by its own plan is what raw pages and tables give."""
    packed = pack(tables, query_lens)
    made = pool.plan(tables, num_q_heads=HEADS, query_lens=query_lens, **options)
    q = q_of(len(tables) if query_lens is None else sum(query_lens))
    found = np.array(pool[0].attend(q, made))
    right = fast.paged_attention(
        q, *pool[0].arrays, packed.block_tables, packed.context_lens,
        cu_seqlens_q=packed.cu_seqlens_q, page_starts=packed.page_starts,
        page_lens=packed.page_lens, **options,
    )  # fmt: skip
    np.testing.assert_allclose(found, np.array(right), atol=1e-5)


def test_each_window_and_causality_has_a_plan_of_its_own():
    _, pool, tables = make()
    for _ in range(2):
        for options in ({}, {"sliding_window": 2}, {"sliding_window": 5}, {"causal": False}):
            assert_plans_are_fresh(pool, tables, [4, 3], **options)


def test_a_plan_is_that_of_the_query_lengths_asked_for():
    _, pool, tables = make()
    for query_lens in ([4, 3], [1, 1], None, [3, 4], [4, 3]):
        assert_plans_are_fresh(pool, tables, query_lens)


def test_a_plan_follows_its_tables():
    """Appends inside and across pages, cuts, other rows, other orders, forks that are written to."""
    _, pool, tables = make()
    for window in (None, 3):
        for count in (1, 1, 1, 1, 5):
            append(pool, tables[0], count, 20 + count)
            assert_plans_are_fresh(pool, tables, sliding_window=window)
        tables[0].truncate(7)
        assert_plans_are_fresh(pool, tables, sliding_window=window)
        assert_plans_are_fresh(pool, tables[::-1], sliding_window=window)
        assert_plans_are_fresh(pool, tables[:1], sliding_window=window)
        fork = tables[0].fork()
        assert_plans_are_fresh(pool, [fork, *tables], sliding_window=window)
        append(pool, fork, 1, 31)
        assert_plans_are_fresh(pool, [fork, *tables], sliding_window=window)
        fork.release()


def test_a_plan_follows_sealed_tables():
    _, pool, tables = make()
    tables[0].seal()
    append(pool, tables[0], 3, 40)
    assert tables[0].is_ragged
    for window in (None, 4):
        assert_plans_are_fresh(pool, tables, sliding_window=window)
        append(pool, tables[0], 1, 41)
        assert_plans_are_fresh(pool, tables, sliding_window=window)


def test_layers_share_the_plan_of_a_step():
    _, pool, tables = make()
    first = pool.plan(tables, num_q_heads=HEADS)
    assert pool.plan(tables, num_q_heads=HEADS) is first
    append(pool, tables[0], 1, 50)
    second = pool.plan(tables, num_q_heads=HEADS)
    assert second is not first and pool.plan(tables, num_q_heads=HEADS) is second


def test_a_plan_of_another_pool_or_window_is_refused():
    _, pool, tables = make()
    _, other, others = make()
    with pytest.raises(ValueError, match="allocator"):
        other.plan(tables, num_q_heads=HEADS)
    with pytest.raises(ValueError, match="page_size"):
        PagePool(1, 16, 8, 1, DIM, mx.float32).plan(tables, num_q_heads=HEADS)
    plan = pool.plan(tables, num_q_heads=HEADS, sliding_window=3)
    for options in ({"sliding_window": 4}, {"causal": False}):
        with pytest.raises(ValueError, match="must be what the plan was made for"):
            fast.paged_attention(q_of(2), *pool[0].arrays, plan=plan, **options)
        with pytest.raises(ValueError, match="must be what the plan was made for"):
            paged_attention(q_of(2), tables, pool[0], plan=plan, **options)


def test_a_plan_of_tables_of_another_allocator_is_refused():
    _, pool, tables = make()
    _, other, _ = make()
    plan = pool.plan(tables, num_q_heads=HEADS)
    with pytest.raises(ValueError, match=r"^\[attend\] plan must be of page tables of the"):
        other[0].attend(q_of(2), plan)
    beside = PagePool(1, 16, PAGE, 1, DIM, mx.float32, allocator=pool.allocator)
    assert beside[0].attend(q_of(2), plan).shape == (2, HEADS, DIM)


def test_a_plan_that_is_given_beside_tables_is_of_these_tables_as_they_are():
    _, pool, tables = make()
    _, _, others = make()
    plan, q = pool.plan(tables, num_q_heads=HEADS), q_of(2)
    assert paged_attention(q, tables, pool[0], plan=plan).shape == q.shape
    must = r"^\[paged_attention\] plan must be of these page_tables as they are"
    for wrong in (others, tables[::-1], [tables[0]] * 2):
        with pytest.raises(ValueError, match=must):
            paged_attention(q, wrong, pool[0], plan=plan)
    fork = tables[1].fork()  # holds what its source does
    assert paged_attention(q, [tables[0], fork], pool[0], plan=plan).shape == q.shape
    append(pool, tables[0], 1, 5)
    with pytest.raises(ValueError, match=must):
        paged_attention(q, tables, pool[0], plan=plan)
    with pytest.raises(ValueError, match=r"^\[paged_attention\] tables must be PageTables"):
        paged_attention(q, [None, None], pool[0], plan=plan)


def test_slots_for_a_larger_pool_are_refused_and_for_a_smaller_one_taken():
    _, large, _ = make(16)
    _, small, _ = make(8)
    tokens = mx.ones((1, 1, DIM)), mx.ones((1, 1, DIM))
    with pytest.raises(ValueError, match="at most 32 slots"):
        small.write(0, *tokens, large.slots([3]))
    large.write(0, *tokens, small.slots([31]))
    assert mx.all(large[0].arrays[0][7, 0, 3] == 1)


@pytest.mark.parametrize(
    "options",
    [
        dict(scale=0.3),
        dict(softcap=1.5),
        dict(sliding_window=2),
        dict(causal=False),
        dict(sinks=mx.array([1.0, 0.5])),
        dict(alibi_slopes=mx.array([0.5, 0.25])),
        dict(mask=mx.array(np.random.default_rng(1).random((5, 10)) > 0.4)),
    ],
    ids=lambda o: next(iter(o)),
)
def test_every_option_reaches_pools_and_page_blocks_alike(options):
    """By tables over a pool, over PageBlocks and as a block of positions: what raw pages give."""
    _, pool, tables = make(lengths=(9, 6))
    packed = pack(tables, [3, 2])
    q = q_of(5)
    right = fast.paged_attention(
        q, *pool[0].arrays, packed.block_tables, packed.context_lens,
        cu_seqlens_q=packed.cu_seqlens_q, return_lse=True, **options,
    )  # fmt: skip
    plain = fast.paged_attention(
        q,
        *pool[0].arrays,
        packed.block_tables,
        packed.context_lens,
        cu_seqlens_q=packed.cu_seqlens_q,
    )
    assert not np.allclose(np.array(right[0]), np.array(plain), atol=1e-3)
    blocks = {page: pool[0][page] for table in tables for page in table.page_ids}
    for pages in (pool[0], blocks):
        found = paged_attention(q, tables, pages, query_lens=[3, 2], return_lse=True, **options)
        for a, b in zip(found, right):
            np.testing.assert_allclose(np.array(a), np.array(b), atol=1e-5)
    if "mask" not in options:
        block = paged_attention(q[:2].swapaxes(0, 1)[None], tables[1:], pool[0], **options)
        alone = paged_attention(q[:2], tables[1:], pool[0], query_lens=[2], **options)
        np.testing.assert_allclose(np.array(block[0].swapaxes(0, 1)), np.array(alone), atol=1e-5)


def test_a_plan_that_names_a_page_behind_the_pool_is_refused():
    _, pool, _ = make()
    options = dict(num_q_heads=HEADS, num_kv_heads=1, page_size=PAGE, head_dim=DIM)
    for last, fits in ((15, True), (16, False)):
        plan = fast.plan([[0, last]], [7], dtype=mx.float32, **options)
        if fits:
            mx.eval(fast.paged_attention(q_of(1), *pool[0].arrays, plan=plan))
            continue
        for attend in (
            lambda p: fast.paged_attention(q_of(1), *pool[0].arrays, plan=p),
            lambda p: pool[0].attend(q_of(1), p),
        ):
            with pytest.raises(ValueError, match=r"page ids in \[0, 16\)"):
                attend(plan)
