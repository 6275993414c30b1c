"""The Metal kernels over quantised pages, executed on the host.

The oracle attends over what the codes stand for. Slots outside a plan's items are forbidden, and
what no sequence holds is poison; a finding of any kind fails.
"""

import itertools

import metal_host
import numpy as np
import pytest
from metal_kernels import attend, format_cases, metal_plan
from metal_kernels.attention import K_BIASES, K_PAGES, K_SCALES, V_BIASES, V_PAGES, V_SCALES
from paged_mlx.reference.arrays import assemble, draw_contexts, draw_queries
from paged_mlx.reference.case import Case

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(metal_host.unsupported() is not None, reason=str(metal_host.unsupported())),
]

PAIRS = [pair for pair in itertools.product((None, "q8", "q4"), repeat=2) if pair != (None, None)]
# Rows per KV head that lead to each body, over several pages, the last part-filled.
BODIES = {
    "vector": Case(num_q_heads=2, num_kv_heads=2, sequences=((1, 70), (1, 1), (1, 200))),
    "tile": Case(num_q_heads=6, num_kv_heads=2, sequences=((1, 70), (2, 90), (1, 200))),
    "prefill": Case(num_q_heads=4, num_kv_heads=1, sequences=((12, 70), (30, 150), (9, 9))),
}
EVERYTHING = dict(sliding_window=50, softcap=4.0, alibi=1.0, sinks="random")


def check(case: Case, pair: tuple, **options):
    """Attend the case in formats; demand the right result and no finding."""
    problem = case.replace(k_format=pair[0], v_format=pair[1]).build()
    attended = attend(problem, **options)
    assert attended.errors == []
    verdict = problem.judge(attended.out, attended.lse)
    assert verdict, verdict.reason
    return attended


DTYPES = ["float16", *(pytest.param(d, marks=pytest.mark.long) for d in ("float32", "bfloat16"))]
USUAL = [("q8", "q8"), ("q8", "q4"), ("q4", "q4")]
long = pytest.mark.long
# Pairs that people take, and the others in the long tests.
PAIRS_IN_TURN = [pair if pair in USUAL else pytest.param(pair, marks=long) for pair in PAIRS]


@pytest.mark.parametrize("pair", PAIRS_IN_TURN, ids=str)
@pytest.mark.parametrize("body", BODIES)
def test_each_body_is_right_in_each_pair_of_formats(body, pair):
    attended = check(BODIES[body].replace(dtype="float16"), pair)
    items = attended.plan.items
    assert {item["open"] for item in items} == ({True, False} if pair[0] == "q4" else {False})
    assert pair[1] != "q4" or all(item["partial"] is not None for item in items)
    text = {launched.library for launched in attended.launches if "attend" in launched.kernel}
    assert any("_K_FORMAT_" in name for name in text)
    assert any("_K_FORMAT_" not in name for name in text) == (pair[0] == "q4")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("pair", [("q8", "q4"), pytest.param(("q4", "q8"), marks=long)], ids=str)
@pytest.mark.parametrize("body", ["vector", "tile"])
def test_formats_are_right_in_other_dtypes(body, pair, dtype):
    check(BODIES[body].replace(dtype=dtype), pair)


@pytest.mark.parametrize("mask", [pytest.param(None, marks=long), "boolean_per_head", "additive"])
@pytest.mark.parametrize("pair", [pytest.param(("q8", "q8"), marks=long), ("q4", "q4")], ids=str)
@pytest.mark.parametrize("body", ["vector", "tile"])
def test_options_combine_with_formats(body, pair, mask):
    check(BODIES[body].replace(dtype="float16", mask=mask, **EVERYTHING), pair)


@pytest.mark.parametrize("pair", [("q8", "q4"), ("q4", "q8")], ids=str)
@pytest.mark.parametrize("body", ["vector", "tile"])
def test_ragged_pages_of_odd_sizes_are_read_where_they_are_filled(body, pair):
    check(BODIES[body].replace(dtype="float16", ragged=True), pair)
    check(BODIES[body].replace(dtype="float16", ragged=True, page_size=11), pair)


@pytest.mark.parametrize(
    "head_dim", [96, *(pytest.param(d, marks=long) for d in (32, 128, 192, 256, 512))]
)
@pytest.mark.parametrize("pair", [("q8", "q8"), ("q4", "q4")], ids=str)
@pytest.mark.parametrize("q_heads", [1, 8])
def test_formats_take_every_head_dim_that_they_can(q_heads, pair, head_dim):
    if head_dim == 96 and pair[1] == "q4":
        pair = (pair[0], "q8")
    case = Case(num_q_heads=q_heads, head_dim=head_dim, page_size=32, sequences=((1, 150),))
    check(case.replace(dtype="float16"), pair)


@pytest.mark.parametrize("head_dim", [72, *(pytest.param(d, marks=long) for d in (8, 80))])
@pytest.mark.parametrize("q_heads", [1, 8])
def test_channels_of_any_head_dim_have_scales(q_heads, head_dim):
    case = Case(num_q_heads=q_heads, head_dim=head_dim, v_head_dim=64, sequences=((1, 90),))
    check(case.replace(dtype="float16"), ("q4", "q4"))


@pytest.mark.parametrize("page_size", [64, *(pytest.param(p, marks=long) for p in (8, 32, 128))])
@pytest.mark.parametrize("q_heads", [1, 8])
def test_channel_scales_change_with_the_page(q_heads, page_size):
    case = Case(num_q_heads=q_heads, page_size=page_size, sequences=((1, 300),), dtype="float16")
    check(case, ("q4", None))
    check(case, ("q4", None), fixed_partition=64)


@pytest.mark.parametrize(
    "pair, rows", [(("q8", "q8"), 32), (("q4", "q4"), 16)], ids=str
)  # rows of the widest body: scales of channels take registers
def test_a_shared_prefix_of_formats_is_read_once(pair, rows):
    case = Case(num_q_heads=4, sequences=((1, 600),) * 12, prefixes=((0, 12, 512),))
    attended = check(case.replace(dtype="float16", page_size=64), pair)
    assert max(len(item["tokens"]) for item in attended.plan.items) == rows // 4


def test_a_plan_with_final_results_is_refused_where_v_is_rotated():
    problem = Case(num_q_heads=4, k_format="q8", v_format="q4").build()
    with pytest.raises(AssertionError, match="run_attend threw"):
        attend(problem, metal_plan(problem))


@pytest.mark.parametrize("side", ["k", "v"])
@pytest.mark.parametrize("body", ["vector", "tile"])
def test_a_token_that_is_not_finite_reaches_the_rows_that_see_it_alone(body, side):
    case = BODIES[body].replace(mask="boolean_per_head", seed=3, k_format="q8", v_format="q8")
    rng = np.random.default_rng(1)
    keys, values = draw_contexts(case, rng)
    (keys if side == "k" else values)[0][5, 0, 3] = np.inf
    problem = assemble(case, draw_queries(case, rng), keys, values)
    attended = attend(problem)
    assert attended.errors == []
    unseen = np.isnan(problem.exact[0])
    np.testing.assert_array_equal(np.isnan(attended.out), unseen)
    assert unseen.any() and not unseen.all()


# Bytes of a key and KV head at head_dim 128: codes, scales and biases; of K by channel for a page of 64.
BYTES = {
    "k": {None: 256, "q8": 128 + 8, "q4": 64 + 8},
    "v": {None: 256, "q8": 128 + 8, "q4": 64 + 8},
}


@pytest.mark.parametrize("pair", PAIRS_IN_TURN, ids=str)
@pytest.mark.parametrize("gqa_factor", [1, 8])
def test_decode_reads_the_bytes_of_the_format_once(gqa_factor, pair):
    case = Case(
        dtype="float16", num_q_heads=2 * gqa_factor, num_kv_heads=2, head_dim=128, page_size=64,
        sequences=((1, 256), (1, 448)),
    )  # fmt: skip
    attended = check(case, pair)
    items = attended.plan.items
    keys = {
        is_open: 2 * sum(i["keys"][1] - i["keys"][0] for i in items if i["open"] == is_open)
        for is_open in (False, True)
    }
    read = {False: dict(k=0, v=0), True: dict(k=0, v=0)}
    for launched in attended.launches:
        is_open = pair[0] == "q4" and "_K_FORMAT_" not in launched.library
        if launched.kernel.startswith("attend_"):
            buffers = launched.result.buffers
            for side, pages, scales in (
                ("k", K_PAGES, (K_SCALES, K_BIASES)),
                ("v", V_PAGES, (V_SCALES, V_BIASES)),
            ):
                # Lanes that load the same scale at once cost one load.
                beside = sum(buffers[i].unique_load_bytes for i in scales if i in buffers)
                read[is_open][side] += buffers[pages].load_bytes + beside
    for is_open, count in keys.items():
        names = (None, None) if is_open else pair
        assert read[is_open] == {side: count * BYTES[side][name] for side, name in zip("kv", names)}
    assert keys[True] > 0 or pair[0] != "q4"


@pytest.mark.parametrize("pair", [("q8", "q8"), ("q4", "q4")], ids=str)
@pytest.mark.parametrize("gqa_factor", [1, 8])
def test_scales_cost_fewer_loads_than_codes(gqa_factor, pair):
    """In loads of a simdgroup."""
    case = Case(
        dtype="float16", num_q_heads=gqa_factor, head_dim=128, page_size=64, sequences=((1, 512),)
    )
    attended = check(case, pair, workers=1)
    buffers = next(x for x in attended.launches if "_K_FORMAT_" in x.library).result.buffers
    codes = sum(buffers[i].merged_loads for i in (K_PAGES, V_PAGES))
    assert sum(buffers[i].merged_loads for i in (K_SCALES, K_BIASES, V_SCALES, V_BIASES)) < codes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "pair", [("q8", "q4"), (None, "q8"), ("q8", None), ("q4", "q4")],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize(
    "dims", [(128, 64), *(pytest.param(d, marks=long) for d in ((96, 256), (32, 192)))], ids=str
)
def test_write_quantises_bit_for_bit(dims, pair, dtype):
    assert format_cases.write(pair, dtype, dims) == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotated", [False, pytest.param(True, marks=long)])
@pytest.mark.parametrize("v_format", [pytest.param(None, marks=long), "q8", "q4"])
def test_seal_quantises_pages_by_channel_bit_for_bit(v_format, rotated, dtype):
    assert format_cases.seal(v_format, dtype, rotated) == []


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("pair", PAIRS_IN_TURN, ids=str)
def test_gather_reads_what_attention_reads(pair, ragged):
    assert format_cases.gather(pair, ragged) == []
