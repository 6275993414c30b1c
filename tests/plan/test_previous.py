"""A plan made from the one before is the plan made afresh: steps back and sideways."""

import itertools

import mlx.core as mx
import numpy as np
import pytest
from paged_mlx import fast

PAGE, DIM = 16, 8
WINDOWS = [None, 1, 8, 16, 17]


def normal(*shape, seed=0):
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


K, V = normal(8, 1, PAGE, DIM, seed=1), normal(8, 1, PAGE, DIM, seed=2)


def plan(tables, lens, query_lens=None, **options):
    cu = None if query_lens is None else np.concatenate([[0], np.cumsum(query_lens)])
    return fast.plan(
        tables, lens, num_q_heads=2, num_kv_heads=1, page_size=PAGE, dtype=mx.float32,
        head_dim=DIM, cu_seqlens_q=cu, **options,
    )  # fmt: skip


def in_order(made):
    """The items by what they attend: a plan that is advanced keeps the order of the one before."""
    return sorted((i["tokens"], i["keys"], i["pages"], i["kind"]) for i in made.items)


def assert_as_fresh(before, after, **options):
    """The step ``after``, planned from the step ``before``, is the step planned afresh."""
    previous = plan(*before, **options)
    following, fresh = plan(*after, previous=previous, **options), plan(*after, **options)
    q = normal(fresh.num_tokens, 2, DIM, seed=3)
    found, right = (
        [np.array(x) for x in fast.paged_attention(q, K, V, plan=p, return_lse=True)]
        for p in (following, fresh)
    )
    np.testing.assert_array_equal(found[0], right[0])
    np.testing.assert_array_equal(found[1], right[1])
    assert in_order(following) == in_order(fresh)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("length", [2, 16, 17, 31, 32, 33, 40, 48])
def test_a_step_to_any_length_nearby(length, window):
    for step in (-17, -16, -8, -2, -1, 0, 1, 2, 8, 16):
        if 1 <= length + step <= 3 * PAGE:
            tables = [[0, 1, 2]]
            assert_as_fresh((tables, [length]), (tables, [length + step]), sliding_window=window)


@pytest.mark.parametrize("window", WINDOWS)
def test_steps_of_a_batch_that_go_apart(window):
    tables = [[0, 1, 2], [3, 4, -1], [5, 6, 7]]
    for steps in itertools.product((-1, 0, 1), repeat=3):
        lens = np.array([40, 20, 33])
        assert_as_fresh((tables, lens), (tables, lens + steps), sliding_window=window)


@pytest.mark.parametrize(
    "after",
    [[[1, 0, 2]], [[0, 1, 3]], [[0, 1]], [[0, 1, 2, 3]], [[0, 1, 2, -1]], [[3, 4, 5]], [[2, 2, 2]]],
    ids=str,
)
def test_a_step_to_other_tables(after):
    for length in (33, 32):
        if -(-length // PAGE) <= len(after[0]):
            assert_as_fresh(([[0, 1, 2]], [40]), (after, [length]))


def test_a_step_to_a_batch_of_another_size():
    one, two = ([[0, 1, 2]], [40]), ([[0, 1, 2], [3, 4, 5]], [40, 41])
    assert_as_fresh(one, two)
    assert_as_fresh(two, one)
    assert_as_fresh(two, ([[3, 4, 5], [0, 1, 2]], [40, 41]))


def test_a_step_to_other_query_lengths():
    tables = [[0, 1, 2], [3, 4, 5]]
    for before, after in itertools.permutations([(1, 1), (1, 3), (3, 1), (2, 2), (20, 1)], 2):
        assert_as_fresh((tables, [40, 33], before), (tables, [41, 33], after))


def test_a_step_to_and_from_an_empty_sequence():
    tables = [[0, 1, 2], [3, 4, 5]]
    for before, after in itertools.permutations([[40, 33], [40, 0], [0, 33]], 2):
        assert_as_fresh((tables, before), (tables, after))


@pytest.mark.parametrize(
    "options", [dict(fixed_partition=16), dict(causal=False), dict(share_prefixes=False)]
)
def test_a_step_keeps_the_options(options):
    tables = [[0, 1, 2], [0, 1, 3]]
    for step in (-1, 0, 1):
        assert_as_fresh((tables, [40, 41]), (tables, [40 + step, 41 + step]), **options)


@pytest.mark.parametrize(
    "one, other",
    [
        (dict(), dict(sliding_window=8)),
        (dict(sliding_window=8), dict(sliding_window=9)),
        (dict(causal=True), dict(causal=False)),
        (dict(), dict(fixed_partition=16)),
        (dict(share_prefixes=True), dict(share_prefixes=False)),
    ],
)
def test_a_plan_of_other_options_is_not_the_step_before(one, other):
    step = ([[0, 1, 2], [0, 1, 3]], [40, 41], (3, 3))
    for before, after in ((one, other), (other, one)):
        following = plan(*step, previous=plan(*step, **before), **after)
        assert in_order(following) == in_order(plan(*step, **after))
        assert following.causal == after.get("causal", True)
        assert following.sliding_window == after.get("sliding_window")


def test_steps_there_and_back_again_leave_nothing_behind():
    """Thirty random steps, each planned from the one before."""
    dice, tables = np.random.default_rng(0), np.array([[0, 1, 2], [3, 4, 5]])
    lens = np.array([20, 30])
    for window in (None, 8):
        previous = plan(tables, lens, sliding_window=window)
        for _ in range(30):
            lens = np.clip(lens + dice.integers(-3, 4, 2), 1, 3 * PAGE)
            if dice.random() < 0.2:
                tables = tables[:, dice.permutation(3)]
            previous = plan(tables, lens, sliding_window=window, previous=previous)
            assert in_order(previous) == in_order(plan(tables, lens, sliding_window=window))


def test_the_step_before_stays_what_it_was():
    tables = [[0, 1, 2], [3, 4, 5]]
    before = plan(tables, [40, 33])
    words = np.array(before.array)
    following = plan(tables, [41, 34], previous=before)
    assert [i["keys"] for i in following.items] != [i["keys"] for i in before.items]
    assert np.array_equal(np.array(before.array), words)


def test_a_step_that_cannot_be_is_refused_after_one_that_can():
    tables = [[0, 1, 2], [3, 4, 5]]
    before = plan(tables, [48, 33])
    for lens in ([49, 33], [48, -1]):
        with pytest.raises(ValueError, match="context_lens"):
            plan(tables, lens, previous=before)
    with pytest.raises(ValueError, match="batch"):
        plan(tables, [48], previous=before)
    with pytest.raises(ValueError, match="batch"):
        plan(tables, [48])
