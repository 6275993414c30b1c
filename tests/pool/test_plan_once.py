"""A step is planned once, whoever asks, and never with what the tables said before."""

import contextlib
import random

import mlx.core as mx
import numpy as np
import paged_mlx
import pytest
from counted_calls import calls
from paged_mlx import (
    AttentionPlan,
    OutOfPages,
    PageAllocator,
    PagePool,
    PageTable,
    fast,
    pack,
    paged_attention,
)

PAGE, HEADS, DIM, LAYERS = 4, 2, 8, 3


@pytest.fixture
def pool():
    """A pool whose keys and values differ in every slot of every layer."""
    pool = PagePool(LAYERS, 32, PAGE, HEADS, DIM, mx.float32)
    rng = np.random.default_rng(0)
    for layer in range(LAYERS):
        k, v = (
            mx.array(rng.standard_normal((32 * PAGE, HEADS, DIM)).astype(np.float32))
            for _ in range(2)
        )
        pool.write(layer, k, v, range(32 * PAGE))
    mx.eval(pool.state)
    return pool


def table_of(pool, num_tokens):
    table = PageTable(PAGE)
    table.append_tokens(num_tokens, pool.allocator)
    return table


def queries(tokens, seed=0):
    rng = np.random.default_rng(seed)
    return mx.array(rng.standard_normal((tokens, 2 * HEADS, DIM)).astype(np.float32))


def planned_anew(q, tables, layer, query_lens=None, **options):
    """The same attention, with nothing remembered."""
    p = pack(tables, query_lens)
    return fast.paged_attention(
        q, *layer.arrays, p.block_tables, p.context_lens, cu_seqlens_q=p.cu_seqlens_q,
        page_starts=p.page_starts, page_lens=p.page_lens, **options,
    )  # fmt: skip


@pytest.mark.native
def test_attention_by_a_plan_takes_three_functions_to_the_native_module(pool):
    plan = pool.plan([table_of(pool, 9)], num_q_heads=2 * HEADS)
    q = queries(1)
    entered = calls(lambda: pool[1].attend(q, plan))
    assert len(entered) <= 3, entered


@pytest.mark.native
def test_attention_without_a_plan_takes_fifteen_calls_in_five_files(pool):
    tables, q = [table_of(pool, 9)], queries(1)
    first = calls(lambda: paged_attention(q, tables, pool[0]))
    again = calls(lambda: paged_attention(q, tables, pool[1]))
    assert len(first) <= 15 and len({file for file, _ in first}) <= 5, first
    assert len(again) < len(first), again


def test_all_layers_share_the_plan_that_the_first_one_made(pool, monkeypatch):
    tables, q = [table_of(pool, 9), table_of(pool, 3)], queries(2)
    expected = [planned_anew(q, tables, pool[layer]) for layer in range(LAYERS)]
    made = paged_attention(q, tables, pool[0])
    monkeypatch.setattr(paged_mlx.pool, "make_plan", None)  # no other can be made
    outs = [made, *(paged_attention(q, tables, pool[i]) for i in range(1, LAYERS))]
    assert all(mx.array_equal(a, b) for a, b in zip(outs, expected, strict=True))


def test_a_window_has_a_plan_of_its_own(pool):
    tables, q = [table_of(pool, 14)], queries(1)
    for layer in range(LAYERS):
        for window in (None, 5, 3):
            out = paged_attention(q, tables, pool[layer], sliding_window=window)
            expected = planned_anew(q, tables, pool[layer], sliding_window=window)
            assert mx.array_equal(out, expected)


@pytest.mark.native
def test_the_next_step_inside_the_pages_moves_the_plan_on(pool, monkeypatch):
    table = table_of(pool, 9)
    plan = pool.plan([table], num_q_heads=2 * HEADS)
    table.append_tokens(1, pool.allocator)
    monkeypatch.setattr(paged_mlx.attention_plan._ext, "NativePlan", None)  # none can be made
    following = pool.plan([table], num_q_heads=2 * HEADS)
    assert following is not plan and following.max_context_len == 10


CHANGES = {
    "append": lambda t, a, n: t.append_tokens(n, a),
    "truncate": lambda t, a, n: t.truncate(max(1, t.num_tokens - n)),
    "refill": lambda t, a, n: (t.release(), t.append_tokens(n, a)),
    "seal": lambda t, a, n: (t.seal(), t.append_tokens(1, a)),
}


def assert_attends_as_planned_anew(pool, tables, lens=None):
    q = queries(len(tables) if lens is None else sum(lens))
    for layer in range(LAYERS):
        out = paged_attention(q, tables, pool[layer], query_lens=lens)
        assert mx.allclose(out, planned_anew(q, tables, pool[layer], lens), atol=1e-6)


@pytest.mark.parametrize("seed", range(20))
def test_no_change_of_a_table_meets_the_plan_of_before(pool, seed):
    choose = random.Random(seed)
    tables = [table_of(pool, choose.randint(1, 9)) for _ in range(3)]
    for _ in range(8):
        assert_attends_as_planned_anew(pool, tables)
        row = choose.randrange(3)
        if choose.random() < 0.2:
            tables[row].release()
            tables[row] = tables[(row + 1) % 3].fork()
        else:
            change = CHANGES[choose.choice(list(CHANGES))]
            with contextlib.suppress(OutOfPages):
                change(tables[row], pool.allocator, choose.randint(1, 3))
        assert_attends_as_planned_anew(pool, tables)
        assert_attends_as_planned_anew(pool, tables, [choose.randint(1, len(t)) for t in tables])


def test_a_given_plan_is_the_one_that_is_used(pool):
    tables, q = [table_of(pool, 9)], queries(1)
    plan = pool.plan(tables, num_q_heads=2 * HEADS, sliding_window=3)
    out = paged_attention(q, tables, pool[0], plan=plan)
    assert mx.array_equal(out, planned_anew(q, tables, pool[0], sliding_window=3))
    with pytest.raises(
        ValueError, match=r"sliding_window must be what the plan was made for \(3\)"
    ):
        paged_attention(q, tables, pool[0], plan=plan, sliding_window=4)
    with pytest.raises(ValueError, match="plan must be an AttentionPlan"):
        pool[0].attend(q, "plan")


@pytest.mark.native
def test_plans_follow_the_number_of_threads(pool):
    tables = [table_of(pool, 9)]
    plan, threads = pool.plan(tables, num_q_heads=2), paged_mlx.num_threads()
    paged_mlx.set_num_threads(threads + 1)
    try:
        assert pool.plan(tables, num_q_heads=2) is not plan
    finally:
        paged_mlx.set_num_threads(threads)
    assert pool.plan(tables, num_q_heads=2) is plan


@pytest.mark.parametrize("value", [True, 2.0, 0, -1, "2", 2**40])
@pytest.mark.parametrize("name", ["num_q_heads", "sliding_window", "workers", "fixed_partition"])
def test_counts_are_whole_numbers_even_if_an_equal_one_was_asked_for_before(pool, name, value):
    tables = [table_of(pool, 9)]
    for good in (1, 2):
        pool.plan(tables, **{"num_q_heads": 2, name: 2 * good})
    with pytest.raises(ValueError, match=rf"^\[plan\] {name} must be "):
        pool.plan(tables, **{"num_q_heads": 2, name: value})


# Whose pages


def test_a_pool_has_an_allocator_of_its_own_until_it_is_given_one():
    pool = PagePool(1, 8, PAGE, HEADS, DIM, mx.float32)
    own, given = pool.allocator, PageAllocator(8, PAGE)
    assert (own.total_pages, own.page_size, own.pools) == (8, PAGE, [pool])
    given.attach(pool)
    assert pool.allocator is given and own.pools == []
    given.detach(pool)
    table = table_of(pool, 3)
    with pytest.raises(ValueError, match=r"^\[attach\] pool must have no pages in use of its own"):
        given.attach(pool)
    assert pool.allocator is table.allocator


def test_a_fork_is_copied_in_a_pool_that_was_given_no_allocator():
    pool = PagePool(1, 8, PAGE, 1, DIM, mx.float32)
    table = PageTable(PAGE)
    ones = mx.ones((2, 1, DIM))
    pool.write(0, ones, ones, table.append_tokens(2, pool.allocator).slots)
    fork = table.fork()
    pool.write(0, 0 * ones[:1], 5 * ones[:1], fork.append_tokens(1, pool.allocator).slots)
    out = paged_attention(mx.zeros((1, 1, DIM)), [fork], pool[0])
    assert abs(out[0, 0, 0].item() - 7 / 3) < 1e-6  # the mean of 1, 1 and 5


@pytest.mark.parametrize("own", [True, False])
def test_tables_of_another_allocator_are_refused(own):
    other = PageAllocator(8, PAGE)
    pool = PagePool(
        1, 8, PAGE, HEADS, DIM, mx.float32, allocator=None if own else PageAllocator(8, PAGE)
    )
    table = PageTable(PAGE)
    table.append_tokens(3, other)
    for meet in (
        lambda: pool.plan([table], num_q_heads=2),
        lambda: paged_attention(mx.zeros((1, 2, DIM)), [table], pool[0]),
    ):
        with pytest.raises(
            ValueError, match="page_tables must hold pages of the allocator that the pool"
        ):
            meet()
    mixed = [table, table_of(pool, 2)]
    with pytest.raises(ValueError, match="tables must hold pages of one allocator"):
        pool.plan(mixed, num_q_heads=2)


def test_a_plan_says_what_it_is_of(pool):
    plan = pool.plan([table_of(pool, 9)], num_q_heads=2 * HEADS)
    assert isinstance(plan, AttentionPlan) and plan.geometry.head_dim == DIM
    assert plan.geometry.num_q_heads == 2 * HEADS and plan.options.causal
