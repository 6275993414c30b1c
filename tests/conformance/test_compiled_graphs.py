"""Two operations of one compiled graph that differ in one parameter stay two.

MLX joins operations that are alike only where their results stay inside the graph, so these are
put together there.
"""

import mlx.core as mx
import numpy as np
import pytest
from paged_mlx import PagePool, fast

PAGE, DIM, HEADS = 4, 8, 2
TABLES, LENS = [[0, 1, 2], [3, 1, 4]], [10, 7]


def normal(*shape, seed=0, dtype=mx.float32):
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return mx.array(x).astype(dtype)


def planned(tables=TABLES, lens=LENS, **options):
    return fast.plan(
        tables, lens, num_q_heads=HEADS, num_kv_heads=1, page_size=PAGE, dtype=mx.float32,
        head_dim=DIM, **options,
    )  # fmt: skip


Q = normal(2, HEADS, DIM)
K, V = normal(6, 1, PAGE, DIM, seed=1), normal(6, 1, PAGE, DIM, seed=2)
MASK = mx.array(np.random.default_rng(3).random((2, 12)) > 0.3)
PLANS = {
    "plain": planned(),
    "window": planned(sliding_window=3),
    "whole": planned(causal=False),
    "tables": planned([[2, 1, 0], [4, 3, 1]]),
    "lens": planned(lens=[9, 7]),
    "partitions": planned(fixed_partition=4),
}


def assert_both_in_one_graph(function, *arguments):
    """The compiled function gives what the function gives, and its two results differ."""

    def together(*arrays):
        return mx.concatenate([result.flatten() for result in function(*arrays)])

    plain = [np.array(x) for x in function(*arguments)]
    assert not np.array_equal(plain[0], plain[1])
    compiled = np.array(mx.compile(together)(*arguments))
    np.testing.assert_allclose(compiled, np.concatenate([x.ravel() for x in plain]), atol=1e-6)


@pytest.mark.parametrize(
    "one, other",
    [
        (dict(scale=1.0), dict(scale=0.1)),
        (dict(), dict(scale=1.0)),
        (dict(scale=1.0), dict(scale=1.0, softcap=2.0)),
        (dict(softcap=2.0), dict(softcap=3.0)),
        (dict(), dict(alibi_slopes=mx.array([0.5, 0.25]))),
        (dict(alibi_slopes=mx.array([0.5, 0.25])), dict(alibi_slopes=mx.array([0.25, 0.5]))),
        (dict(), dict(sinks=mx.array([1.0, 2.0]))),
        (dict(sinks=mx.array([1.0, 2.0])), dict(alibi_slopes=mx.array([1.0, 2.0]))),
        (dict(), dict(mask=MASK)),
        (dict(mask=MASK), dict(mask=~MASK)),
        (dict(mask=MASK), dict(mask=MASK.astype(mx.float32))),
        (dict(mask=MASK), dict(mask=mx.stack([MASK, ~MASK]))),
    ],
)
def test_attentions_that_differ_in_an_option_stay_two(one, other):
    def both(q, k, v, plan):
        return [fast.paged_attention(q, k, v, plan=plan, **options) for options in (one, other)]

    assert_both_in_one_graph(both, Q, K, V, PLANS["plain"].array)


@pytest.mark.parametrize(
    "one, other", [("plain", "window"), ("window", "whole"), ("plain", "tables"), ("lens", "plain")]
)
def test_attentions_that_differ_in_the_plan_stay_two(one, other):
    def both(q, k, v, *plans):
        return [fast.paged_attention(q, k, v, plan=plan) for plan in plans]

    assert_both_in_one_graph(both, Q, K, V, PLANS[one].array, PLANS[other].array)


def test_attentions_that_differ_in_k_or_v_stay_two():
    def both(q, k, v, plan):
        return [fast.paged_attention(q, *pages, plan=plan) for pages in ((k, v), (v, k), (k, k))]

    assert_both_in_one_graph(both, Q, K, V, PLANS["plain"].array)


def test_lse_and_out_of_one_attention_stay_apart():
    def both(q, k, v, plan):
        out, lse = fast.paged_attention(q, k, v, plan=plan, return_lse=True)
        return [out.sum(axis=2), lse]

    assert_both_in_one_graph(both, Q, K, V, PLANS["partitions"].array)


@pytest.mark.parametrize("one, other", [([0, 5], [5, 0]), ([0, 5], [0, -1])])
def test_writes_that_differ_in_their_slots_stay_two(one, other):
    def both(k, v, k_pages, v_pages, *slots):
        return [fast.write_pages(k, v, k_pages, v_pages, s)[0] for s in slots]

    tokens = normal(2, 1, DIM, seed=5), normal(2, 1, DIM, seed=6)
    assert_both_in_one_graph(both, *tokens, K, V, *(mx.array(s) for s in (one, other)))


def test_copies_that_differ_in_their_pairs_stay_two():
    def both(pages):
        return [fast.copy_pages([pages], pairs)[0] for pairs in ([(0, 5)], [(1, 5)])]

    assert_both_in_one_graph(both, K)


def test_gathers_that_differ_in_tables_or_lengths_stay_two():
    def both(k, v):
        calls = ((TABLES, LENS), ([[5, 4, 3], [2, 1, 0]], LENS), (TABLES, [10, 8]))
        return [fast.gather_pages(k, v, *call)[0] for call in calls]

    assert_both_in_one_graph(both, K, V)


def test_merges_that_differ_in_a_part_stay_two():
    def both(a, b, x, y):
        orders = (([a, b], [x, y]), ([a, b], [y, x]), ([a, a], [x, y]))
        return [fast.merge_states(*order)[0] for order in orders]

    assert_both_in_one_graph(
        both,
        normal(2, 1, DIM),
        normal(2, 1, DIM, seed=1),
        normal(2, 1, seed=2),
        normal(2, 1, seed=3),
    )


def filled_pool():
    pool = PagePool(2, 6, PAGE, 1, DIM, mx.float32)
    for layer in range(2):
        pool.write(layer, *(normal(24, 1, DIM, seed=4 * layer + i) for i in (1, 2)), np.arange(24))
    mx.eval(pool.state)
    return pool


@pytest.mark.parametrize(
    "one, other",
    [
        (dict(scale=1.0), dict(scale=0.1)),
        (dict(), dict(softcap=2.0)),
        (dict(), dict(sinks=mx.array([1.0, 2.0]))),
    ],
)
def test_attentions_of_a_pool_that_differ_in_an_option_stay_two(one, other):
    pool = filled_pool()

    def both(q, plan):
        return [pool[0].attend(q, plan, **options) for options in (one, other)]

    compiled = mx.compile(both, inputs=pool.state, outputs=pool.state)
    found = [np.array(x) for x in compiled(Q, PLANS["plain"].array)]
    right = [np.array(x) for x in both(Q, PLANS["plain"])]
    assert not np.array_equal(*right)
    for a, b in zip(found, right):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_layers_of_a_pool_in_one_graph_stay_two():
    pool = filled_pool()

    def both(q, plan):
        return [pool[layer].attend(q, plan) for layer in range(2)]

    compiled = mx.compile(both, inputs=pool.state, outputs=pool.state)
    found = [np.array(x) for x in compiled(Q, PLANS["plain"].array)]
    right = [np.array(x) for x in both(Q, PLANS["plain"])]
    assert not np.array_equal(*right)
    for a, b in zip(found, right):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_a_compiled_step_leaves_the_newest_versions_in_the_pool():
    """Three compiled steps write a token each; what is read between and after is all of them."""
    pool, reference = filled_pool(), filled_pool()
    tokens = [(normal(1, 1, DIM, seed=20 + i), normal(1, 1, DIM, seed=30 + i)) for i in range(3)]

    def step(k, v, slots, q, plan):
        for layer in range(2):
            pool.write(layer, k + layer, v, slots)
        return pool[1].attend(q, plan)

    compiled = mx.compile(step, inputs=pool.state, outputs=pool.state)
    for i, (k, v) in enumerate(tokens):
        slots = np.array([9 - 4 * i], np.int32)
        found = compiled(k, v, mx.array(slots), Q, PLANS["plain"].array)
        for layer in range(2):
            reference.write(layer, k + layer, v, slots)
        right = reference[1].attend(Q, PLANS["plain"])
        np.testing.assert_allclose(np.array(found), np.array(right), atol=1e-6)
    mx.eval(pool.state, reference.state)
    pool.check()
    for found, right in zip(pool.state, reference.state):
        assert all(mx.array_equal(a, b) for a, b in zip(found, right))
