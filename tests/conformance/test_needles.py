"""A needle in every page: each fault that a paged attention can have is seen by its group."""

from functools import partial

import numpy as np
import pytest
from paged_mlx.testing import Backend, Case, first_failure, grid, needle, small
from paged_mlx.testing.pairwise import pairwise
from planted import walk
from planted.faults import FAULTS

REFERENCE = Backend("reference", walk.attend)


def checks_of(group):
    return [check for check in grid.quick() if check.group == group]


class DropColumn(walk.Fault):
    """One column of one sequence's table is not read."""

    def __init__(self, sequence, column):
        self.sequence, self.column = sequence, column

    def walk(self, walk, problem):
        if walk.sequence == self.sequence:
            walk.counts[:, walk.entry == self.column] = 0


class RepeatColumn(DropColumn):
    """One column of one sequence's table is read twice."""

    def walk(self, walk, problem):
        if walk.sequence == self.sequence:
            walk.counts[:, walk.entry == self.column] *= 2


def is_seen(problems, fault):
    return any(not problem.judge(*walk.attend(problem, fault)) for problem in problems)


@pytest.mark.parametrize("fault, group", FAULTS, ids=lambda value: getattr(value, "name", None))
def test_planted_fault_is_seen_by_its_group(fault, group):
    faulty = Backend(fault.name, partial(walk.attend, fault=fault))
    assert first_failure(checks_of(group), faulty) is not None


@pytest.mark.parametrize("fault, group", FAULTS, ids=lambda value: getattr(value, "name", None))
def test_planted_fault_is_seen_by_the_suite_for_slow_backends(fault, group):
    faulty = Backend(fault.name, partial(walk.attend, fault=fault))
    assert first_failure(small.checks(), faulty) is not None


def test_the_walk_without_a_fault_passes_the_suite_for_slow_backends():
    failure = first_failure(small.checks(), REFERENCE)
    assert failure is None, failure


@pytest.mark.parametrize("group", ["needles", "poison", "numbers", "grid", "invariance"])
def test_the_walk_without_a_fault_passes_every_group(group):
    failure = first_failure(checks_of(group), REFERENCE)
    assert failure is None, failure


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("fault", [DropColumn, RepeatColumn])
@pytest.mark.parametrize(
    "changes",
    [
        {"sequences": ((1, 700),)},
        {"sequences": ((5, 300), (1, 90)), "num_q_heads": 8, "num_kv_heads": 2},
        {"sequences": ((1, 200), (1, 190)), "prefixes": ((0, 2, 100),)},
        {"sequences": ((1, 200), (3, 90)), "ragged": True},
    ],
    ids=str,
)
def test_every_single_page_is_missed_when_dropped_and_noticed_when_repeated(dtype, fault, changes):
    case = Case(dtype=dtype, values="needles", **changes)
    problems = needle.build(case)
    for s, (_, context_len) in enumerate(case.sequences):
        columns = np.unique(walk.start(problems[0], s).entry)
        assert len(columns) >= context_len // case.page_size
        unseen = [c for c in columns if not is_seen(problems, fault(s, c))]
        assert not unseen


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_single_pages_of_a_32k_context_are_missed(dtype):
    case = Case(dtype=dtype, values="needles", sequences=((1, 32768),), num_q_heads=8, page_size=32)
    problems = needle.build(case)
    for column in np.random.default_rng(0).integers(0, 1024, 3):
        assert is_seen(problems, DropColumn(0, column))


def test_every_page_has_its_needle_in_exactly_one_row():
    case = Case(values="needles", sequences=((1, 400),), num_q_heads=4)
    problems = needle.build(case)
    finders = np.zeros(400 // 16, int)
    for problem in problems:
        score = problem.queries[0] @ problem.keys[0][:, 0].T * case.softmax_scale
        found = (score > needle.GAIN / 2).reshape(4, -1, 16)
        finders += found[:, :, :].any(axis=2).sum(axis=0)
    # The first and last pages also hold the edges of the context, for one more row.
    assert finders[1:-1].tolist() == [1] * 23
    assert set(finders[[0, -1]].tolist()) <= {1, 2}


def test_keys_beyond_the_window_and_the_causal_limit_carry_the_code_they_must_not_give():
    case = Case(values="needles", sequences=((4, 100),), sliding_window=20, num_q_heads=1)
    (problem,) = needle.build(case)
    score = problem.queries[:, 0] @ problem.keys[0][:, 0].T * case.softmax_scale
    for token, position in enumerate(range(96, 100)):
        first = position - 20 + 1
        assert score[token, [first, position]] == pytest.approx(needle.GAIN, rel=0.1)
        assert score[token, first - 1] == pytest.approx(needle.GAIN, rel=0.1)
        if position + 1 < 100:
            assert score[token, position + 1] == pytest.approx(needle.GAIN, rel=0.1)


def test_pairwise_meets_every_pair_of_values():
    axes = {"a": (1, 2, 3), "b": "xyz", "c": (True, False), "d": tuple(range(5))}
    rows = pairwise(axes)
    for one in axes:
        for other in axes:
            if one != other:
                met = {(row[one], row[other]) for row in rows}
                assert met == {(x, y) for x in axes[one] for y in axes[other]}
    assert len(rows) <= 20 < 3 * 3 * 2 * 5


def test_the_quick_grid_holds_every_dtype_head_count_head_dim_and_page_size():
    cases = [check.case for check in checks_of("grid")]
    assert {(c.num_q_heads, c.num_kv_heads) for c in cases} >= set(grid.HEADS)
    assert {c.head_dim for c in cases} == set(grid.HEAD_DIMS)
    assert {c.page_size for c in cases} == set(grid.PAGE_SIZES)
    assert {c.dtype for c in cases} == {"float32", "float16", "bfloat16"}
    assert max(query_len for c in cases for query_len, _ in c.sequences) == 2048


def test_more_than_sixty_faults_are_planted_and_each_has_its_name():
    pairs = [(fault.name, group) for fault, group in FAULTS]
    assert len({name for name, _ in pairs}) > 60
    assert len(set(pairs)) == len(pairs)
