"""The Metal attention kernels, executed on the host, against the float64 oracle.

Every slot outside a plan's items is poisoned and forbidden; a finding of any kind fails.
"""

import metal_host
import numpy as np
import pytest
from metal_kernels import attend
from paged_mlx.reference import dtypes
from paged_mlx.reference.case import Case

pytestmark = pytest.mark.skipif(
    metal_host.unsupported() is not None, reason=str(metal_host.unsupported())
)

# Rows per KV head that lead to each body: few, those of a head group, many.
BODIES = {
    "vector": Case(num_q_heads=2, num_kv_heads=2, sequences=((1, 70), (1, 1), (1, 200))),
    "tile": Case(num_q_heads=6, num_kv_heads=2, sequences=((1, 70), (2, 90), (1, 200))),
    "prefill": Case(num_q_heads=4, num_kv_heads=1, sequences=((12, 70), (30, 150), (9, 9))),
}
KERNEL = {"vector": "attend_vector", "tile": "attend_tile", "prefill": "attend_tile"}
EVERYTHING = dict(sliding_window=50, softcap=4.0, alibi=1.0, sinks="random")


def check(case: Case, kernels=None, **options):
    """Attend the case; demand the right result and no finding. Returns what was attended."""
    problem = case.build()
    attended = attend(problem, **options)
    assert attended.errors == []
    if kernels is not None:
        assert attended.kernels == kernels
    verdict = problem.judge(attended.out, attended.lse)
    assert verdict, verdict.reason
    return attended


@pytest.mark.parametrize("dtype", dtypes.NAMES)
@pytest.mark.parametrize("body", BODIES)
def test_each_body_is_right_in_each_dtype(body, dtype):
    check(BODIES[body].replace(dtype=dtype), [KERNEL[body]])


@pytest.mark.parametrize("mask", ["boolean_per_head", "additive"])
@pytest.mark.parametrize("body", BODIES)
def test_window_softcap_alibi_sinks_and_a_mask_combine(body, mask):
    check(BODIES[body].replace(dtype="float16", mask=mask, **EVERYTHING), [KERNEL[body]])


@pytest.mark.parametrize("body", BODIES)
def test_partitions_merge_to_the_same_result(body):
    case = BODIES[body].replace(dtype="float16", **EVERYTHING)
    attended = check(case, [KERNEL[body], "merge"], fixed_partition=32)
    assert attended.plan.num_partials > attended.plan.num_merges


@pytest.mark.parametrize("body", BODIES)
def test_ragged_pages_are_read_where_they_are_filled(body):
    check(BODIES[body].replace(dtype="float16", ragged=True), [KERNEL[body]])


@pytest.mark.parametrize("body", BODIES)
def test_page_sizes_and_dims_that_fit_nothing(body):
    check(BODIES[body].replace(page_size=5, head_dim=72, v_head_dim=88), [KERNEL[body]])


@pytest.mark.parametrize(
    "case, kernels",
    [
        (Case(head_dim=8, v_head_dim=8, sequences=((1, 70),)), ["attend_vector"]),
        (Case(head_dim=136, v_head_dim=24, num_q_heads=4, sequences=((1, 70),)), ["attend_tile"]),
        (Case(head_dim=16, v_head_dim=40, num_q_heads=9, sequences=((4, 70),)), ["attend_tile"]),
        (Case(head_dim=512, num_q_heads=1, sequences=((1, 70),)), ["attend_vector"]),
        (Case(head_dim=512, num_q_heads=12, sequences=((1, 70),)), ["attend_tile"]),
        (Case(head_dim=512, v_head_dim=64, dtype="float32", sequences=((1, 70),)), ["attend_tile"]),
    ],
    ids=lambda value: f"{value.head_dim}x{value.num_q_heads}" if isinstance(value, Case) else None,
)
def test_head_dims_at_the_ends_of_the_range(case, kernels):
    check(case.replace(dtype="float16") if case.v_head_dim != 64 else case, kernels)


def test_a_prefix_that_sequences_share_is_read_for_all_of_them():
    case = Case(
        dtype="float16", num_q_heads=4, sequences=((1, 600),) * 12, prefixes=((0, 12, 512),)
    )
    attended = check(case)
    assert max(len(item["tokens"]) for item in attended.plan.items) == 12
    assert {"attend_tile", "merge"} == set(attended.kernels)


def test_pages_of_one_token_are_read():
    check(BODIES["tile"].replace(page_size=1, dtype="float16"))


def test_rows_that_see_nothing_are_zero_and_have_no_lse():
    case = Case(num_q_heads=4, sequences=((1, 40), (1, 0)), sinks=3.0)
    attended = check(case, ["attend_tile"])
    assert not attended.out[1].any()
    assert np.isneginf(attended.lse[1]).all()


@pytest.mark.parametrize("body", BODIES)
def test_a_mask_that_hides_a_whole_row_leaves_nothing(body):
    case = BODIES[body].replace(mask="boolean_per_head", mask_density=1.0, sinks=1.0)
    attended = check(case, [KERNEL[body]])
    assert not attended.out.any() and np.isneginf(attended.lse).all()


@pytest.mark.parametrize("body", BODIES)
def test_scores_far_below_zero_are_not_lost(body):
    check(BODIES[body].replace(shift=-60.0), [KERNEL[body]])


def test_a_mask_of_the_lowest_number_hides_nothing():
    case = Case(num_q_heads=4, sequences=((1, 40),), mask="additive")
    problem = case.build()
    problem.mask[:] = np.finfo(np.float32).min
    attended = attend(problem)
    mean = problem.values[0].mean(axis=0)[0]
    np.testing.assert_allclose(attended.out[0, 0], mean, rtol=0, atol=1e-5)


@pytest.mark.parametrize("order", ["reverse", 7])
@pytest.mark.parametrize("body", BODIES)
def test_no_schedule_of_lanes_changes_a_bit(body, order):
    problem = BODIES[body].replace(dtype="float16").build()
    forward, other = attend(problem), attend(problem, host={"order": order})
    assert other.errors == []
    np.testing.assert_array_equal(forward.out, other.out)


def test_pools_beyond_two_to_the_31_elements_are_addressed():
    case = Case(dtype="float16", num_q_heads=4, head_dim=64, page_size=16, sequences=((1, 40),))
    problem = case.build()
    far = (1 << 31) // (16 * 64)  # the page that begins at element 2 ** 31
    pools = []
    for pages in (problem.k_pages, problem.v_pages):
        pool = np.zeros((far + len(pages), *pages.shape[1:]), pages.dtype)
        pool[far:] = pages
        pools.append(pool)
    table = np.where(problem.block_tables >= 0, problem.block_tables + far, -1)
    moved = problem.__class__(
        **{f: getattr(problem, f) for f in problem.__dataclass_fields__}
        | {"k_pages": pools[0], "v_pages": pools[1], "block_tables": table.astype(np.int32)}
    )
    attended = attend(moved, host={"instrument": False})
    verdict = problem.judge(attended.out, attended.lse)
    assert verdict, verdict.reason
