"""The oracle, the yardstick and the cases of the conformance suite are themselves right."""

import math

import numpy as np
import pytest
import reference_backend
from paged_mlx.reference import dtypes, oracle
from paged_mlx.reference.case import Case
from paged_mlx.reference.yardstick import judge

CASES = [
    Case(),
    Case(dtype="bfloat16", num_q_heads=8, num_kv_heads=2, head_dim=40, v_head_dim=24),
    Case(dtype="float16", sequences=((3, 40), (1, 1), (2, 0), (0, 9), (1, 129))),
    Case(sequences=((1, 90), (5, 50), (1, 10)), sliding_window=17),
    Case(ragged=True, sequences=((3, 40), (1, 77)), prefixes=((0, 2, 21),)),
    Case(causal=False, sequences=((4, 40), (3, 3)), mask="boolean", mask_density=0.9),
    Case(sequences=((1, 500),), shift=-60.0),
    Case(dtype="float16", sequences=((1, 500),), shift=60.0),
    Case(spread=300.0, softcap=5.0),
    Case(sinks=float("-inf")),
    Case(sinks=60.0, page_size=1),
    Case(
        ragged=True,
        sliding_window=17,
        sequences=((1, 90), (5, 50), (1, 10)),
        prefixes=((0, 3, 33),),
        mask="additive_per_head",
        alibi=1.0,
        sinks="random",
        softcap=5.0,
        num_q_heads=6,
        num_kv_heads=2,
    ),
]


def one_head(scores, values, **options):
    """Attention of one query token whose scores are given."""
    keys = np.array(scores, float)[:, None, None]
    values = np.array(values, float)[:, None, None]
    out, lse = oracle.attention(np.ones((1, 1, 1)), keys, values, scale=1.0, **options)
    return float(out[0, 0, 0]), float(lse[0, 0])


def test_oracle_mixes_values_by_the_exponentials_of_the_scores():
    assert one_head([0.0, math.log(3)], [1.0, 5.0]) == (
        pytest.approx(4.0),
        pytest.approx(math.log(4)),
    )


def test_oracle_gives_the_value_itself_when_there_is_one_key():
    assert one_head([-524288.0], [7.25]) == (7.25, -524288.0)


def test_oracle_lets_a_sink_take_weight_and_give_no_value():
    out, lse = one_head([0.0], [8.0], sinks=np.array([math.log(3)]))
    assert (out, lse) == (pytest.approx(2.0), pytest.approx(math.log(4)))


def test_oracle_ignores_a_sink_of_minus_infinity():
    assert one_head([1.0, 2.0], [1.0, 5.0], sinks=np.array([-np.inf])) == one_head(
        [1.0, 2.0], [1.0, 5.0]
    )


def test_oracle_gives_zero_and_minus_infinity_to_a_row_that_sees_nothing():
    hidden = np.zeros((1, 2), bool)
    assert one_head([1.0, 2.0], [1.0, 5.0], mask=hidden) == (0.0, -np.inf)
    assert one_head([1.0, 2.0], [1.0, 5.0], mask=hidden, sinks=np.array([3.0])) == (0.0, -np.inf)
    assert one_head([], []) == (0.0, -np.inf)


def test_oracle_window_of_two_sees_the_own_key_and_the_one_before():
    out, _ = one_head([0.0, 0.0, 0.0], [100.0, 2.0, 4.0], sliding_window=2)
    assert out == pytest.approx(3.0)


def test_oracle_caps_before_alibi_and_adds_the_mask_last():
    cap, slope = 2.0, 0.5
    expected = cap * math.tanh(3 / cap) + slope * -1 + 0.25
    _, lse = one_head(
        [3.0, -np.inf],
        [1.0, 1.0],
        softcap=cap,
        alibi_slopes=np.array([slope]),
        mask=np.array([[0.25, -np.inf]]),
    )
    assert lse == pytest.approx(expected)


def test_oracle_is_causal_from_the_position_of_each_query():
    zeros, values = np.zeros((3, 1, 1)), np.array([3.0, 5.0, 10.0])[:, None, None]
    out, _ = oracle.attention(np.zeros((2, 1, 1)), zeros, values)
    assert out[:, 0, 0] == pytest.approx([4.0, 6.0])
    out, _ = oracle.attention(np.zeros((2, 1, 1)), zeros, values, causal=False)
    assert out[:, 0, 0] == pytest.approx([6.0, 6.0])


def test_oracle_query_heads_share_the_kv_head_of_their_group():
    values = np.array([[[1.0], [2.0]]])
    out, _ = oracle.attention(np.zeros((1, 4, 1)), np.zeros((1, 2, 1)), values)
    assert out[0, :, 0].tolist() == [1.0, 1.0, 2.0, 2.0]


def test_oracle_by_blocks_of_queries_equals_the_oracle_in_one_go(monkeypatch):
    case = Case(sequences=((9, 40),), mask="additive_per_head", sliding_window=7)
    whole = case.build().exact
    monkeypatch.setattr(oracle, "_BLOCK", 100)
    for part, full in zip(case.build().exact, whole, strict=True):
        np.testing.assert_allclose(part, full, rtol=1e-13)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_pages_hold_the_contexts_that_the_oracle_reads(case):
    problem = case.build()
    pages = [dtypes.decode(p, case.dtype) for p in (problem.k_pages, problem.v_pages)]
    through_pages = oracle.paged_attention(
        problem.queries, *pages, problem.block_tables, problem.context_lens, **problem.options
    )
    for paged, contiguous in zip(through_pages, problem.exact, strict=True):
        np.testing.assert_array_equal(paged, contiguous)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_independent_float32_attention_is_judged_right(case):
    problem = case.build()
    verdict = problem.judge(*reference_backend.attend(problem))
    assert verdict, verdict.reason


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_case_prints_itself_as_the_expression_that_makes_it(case):
    assert eval(repr(case)) == case


def test_every_slot_outside_the_contexts_is_poison():
    case = Case(sequences=((1, 5), (1, 9)), page_size=4, poison="nan", num_kv_heads=2)
    problem = case.build()
    clean = ~np.isnan(problem.k_pages).any(axis=3)
    assert clean.sum() == 2 * (5 + 9)
    assert len(problem.k_pages) > 5


def test_pages_behind_the_window_are_poison_and_their_table_entries_garbage():
    case = Case(sequences=((1, 64),), page_size=8, sliding_window=10, poison="nan")
    problem = case.build()
    assert (~np.isnan(problem.k_pages[:, 0, :, 0])).sum() == 16
    tables = [case.replace(layout=i).build().block_tables[0, :6] for i in range(20)]
    assert {-1, 2**31 - 1} < set(np.concatenate(tables).tolist())


def test_sequences_with_a_common_prefix_hold_the_same_pages():
    case = Case(sequences=((1, 20), (1, 30), (1, 9)), page_size=4, prefixes=((0, 2, 11),))
    tables = case.build().block_tables
    assert tables[0, :2].tolist() == tables[1, :2].tolist()
    assert tables[0, 2] != tables[1, 2]
    assert len(set(tables[2, :3].tolist()) & set(tables[:2].ravel().tolist())) == 0


def test_prefixes_nest():
    case = Case(sequences=((1, 20),) * 4, page_size=4, prefixes=((0, 4, 4), (2, 4, 12)))
    tables = case.build().block_tables
    assert len(set(tables[:, 0].tolist())) == 1
    assert len(set(tables[:, 1].tolist())) == 3
    assert tables[2, :3].tolist() == tables[3, :3].tolist()


def test_a_ragged_prefix_shares_its_part_filled_page():
    case = Case(sequences=((1, 9), (1, 9)), page_size=4, ragged=True, prefixes=((0, 2, 3),))
    problem = case.build()
    shared = set(problem.block_tables[0].tolist()) & set(problem.block_tables[1].tolist()) - {-1}
    assert shared and problem.page_lens[1, 0] <= 3


def test_another_layout_moves_the_pages_and_changes_no_token():
    one, other = Case(layout=0).build(), Case(layout=1).build()
    assert one.block_tables[0, :3].tolist() != other.block_tables[0, :3].tolist()
    np.testing.assert_array_equal(one.keys[0], other.keys[0])


@pytest.mark.parametrize("dtype", dtypes.NAMES)
def test_rounding_is_to_nearest_and_idempotent(dtype):
    step = dtypes.EPSILON[dtype]
    values = np.array(
        [1 + 0.4 * step, 1 + 0.6 * step, np.inf, -0.0, dtypes.HUGE[dtype]], np.float32
    )
    rounded = dtypes.round_to(values, dtype)
    assert rounded.tolist() == [1.0, 1 + step, np.inf, 0.0, dtypes.HUGE[dtype]]
    assert np.isnan(dtypes.round_to(np.array([np.nan]), dtype))[0]
    np.testing.assert_array_equal(dtypes.round_to(rounded, dtype), rounded)


def test_bfloat16_rounds_as_ml_dtypes_does():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    values = np.random.default_rng(0).standard_normal(4096).astype(np.float32)
    expected = values.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(dtypes.encode(values, "bfloat16"), expected.view(np.uint16))


def test_judge_refuses_three_times_the_yardsticks_error():
    exact = np.random.default_rng(0).standard_normal((20, 64))
    own = dtypes.round_to(exact, "bfloat16").astype(np.float64)
    assert judge(own, exact, own, "bfloat16")
    worst = np.unravel_index(np.abs(own - exact).argmax(), exact.shape)
    wrong = own.copy()
    wrong[worst] = exact[worst] + 6 * (own - exact)[worst]
    assert not judge(wrong, exact, own, "bfloat16")


def test_judge_refuses_a_mean_error_of_twice_the_yardsticks():
    exact = np.random.default_rng(0).standard_normal((20, 64))
    own = dtypes.round_to(exact, "float16").astype(np.float64)
    verdict = judge(exact + 2 * (own - exact), exact, own, "float16")
    assert not verdict and "mean" in verdict.reason


def test_judge_refuses_what_is_not_finite_and_the_wrong_shape():
    exact = np.zeros((2, 3))
    assert not judge(np.full((2, 3), np.nan), exact, exact)
    assert not judge(np.full((2, 3), np.inf), exact, exact)
    assert not judge(np.zeros((2, 4)), exact, exact)


def test_judge_wants_minus_infinity_where_a_row_sees_nothing():
    problem = Case(sequences=((2, 0),)).build()
    out, lse = problem.exact
    assert problem.judge(out, lse)
    assert not problem.judge(out, np.zeros_like(lse))
    assert not problem.judge(out + 1e-3, lse)


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "int8"},
        {"page_size": 0},
        {"num_q_heads": 3, "num_kv_heads": 2},
        {"sequences": ((5, 4),)},
    ],
)
def test_a_case_that_makes_no_sense_says_so(changes):
    with pytest.raises(ValueError, match=r"^\[Case\] .*; got .*\.$"):
        Case(**changes)
