"""Rows that end, windows that begin and prefixes that are as long as a step of the kernels, and one more or less.

The Metal bodies step by 32 keys, or 16 for each simdgroup; those of the CPU by 16, 64 and 72.
"""

import mlx.core as mx
import numpy as np
import pytest
from metal_on_host import metal_on_host
from paged_mlx import fast
from paged_mlx._native import _ext
from paged_mlx.testing import Case, Check, backends, run

#: Steps of 16, 32, 64 and 72 keys, and twice as many.
STEPS = (16, 32, 48, 64, 72, 96, 128, 144)
LENGTHS = [1, 2, *(n + d for n in STEPS for d in (-1, 0, 1))]
#: What makes a body's items: heads, and query tokens of a sequence.
BODIES = {"vector": (1, 1, 1), "tile": (4, 2, 2), "wide": (4, 2, 9)}

KERNELS = {"vector": "attend_vector", "tile": "attend_tile", "wide": "attend_tile"}


def cases(body, steps):
    """One batch for each kind of edge: every length is a sequence of its own."""
    q_heads, kv_heads, tokens = BODIES[body]
    shape = dict(num_q_heads=q_heads, num_kv_heads=kv_heads, page_size=16)
    sequences = tuple((min(tokens, n), n) for n in LENGTHS)
    yield Case(**shape, sequences=sequences)
    yield Case(**shape | dict(page_size=24), sequences=sequences)
    for window in (n + d for n in steps for d in (-1, 0, 1)):
        yield Case(**shape, sequences=sequences[-9:], sliding_window=window)
    for prefix in steps:
        rows = tuple((min(tokens, n), prefix + n) for n in (1, 2, 15, 16, 17))
        yield Case(**shape, sequences=rows, prefixes=((0, 5, prefix),))


def assert_right(case):
    outcome = run(Check("", case, "poison"), backends.cpu())
    assert outcome.right, f"{case}: {outcome.reason}"


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("isa", _ext.isa_names())
def test_every_residue_of_a_step_on_the_cpu(isa, body):
    assert _ext.set_isa(isa)
    try:
        for case in cases(body, (16, 64)):
            assert_right(case)
    finally:
        _ext.set_isa("")


@pytest.mark.parametrize("body", BODIES)
def test_every_residue_of_a_step_in_the_kernels_text(body):
    with metal_on_host(instrument=False) as launches:
        for case in cases(body, (64,) if body == "wide" else (32,)):
            assert_right(case)
    assert launches.findings == [] and launches.kernels[KERNELS[body]] > 0


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dims", [(64, 256), (128, 136), (128, 64), (256, 8), (8, 256)], ids=str)
def test_partitions_merge_with_v_wider_and_narrower_than_k(dims, dtype):
    """Every column of every part reaches the output."""
    head_dim, v_head_dim = dims
    case = Case(
        dtype=dtype, num_q_heads=4, num_kv_heads=2, head_dim=head_dim, v_head_dim=v_head_dim,
        sequences=((1, 200), (3, 90), (9, 150)),
    )  # fmt: skip
    for ask in ("neighbours", "oracle"):
        outcome = run(Check("", case, ask), backends.cpu())
        assert outcome.right, outcome.reason
    merged = run(Check("", case.replace(sequences=((1, 130), (1, 9))), "merge"), backends.cpu())
    assert merged.right, merged.reason


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("dims", [(64, 256), (128, 64)], ids=str)
def test_partitions_merge_with_v_wider_and_narrower_than_k_in_the_kernels_text(dims, dtype):
    head_dim, v_head_dim = dims
    shape = dict(
        dtype=dtype, num_q_heads=4, num_kv_heads=1, head_dim=head_dim, v_head_dim=v_head_dim
    )
    with metal_on_host(instrument=False) as launches:
        for sequences, ask in ((((1, 150),), "neighbours"), (((1, 130), (1, 9)), "merge")):
            outcome = run(Check("", Case(**shape, sequences=sequences), ask), backends.cpu())
            assert outcome.right, outcome.reason
    assert launches.kernels["merge"] and launches.kernels["merge_states"]


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("isa", _ext.isa_names())
def test_stores_round_ties_to_even(isa, dtype):
    """Two keys of equal weight: the mean of neighbours lies between two numbers of the type."""
    assert _ext.set_isa(isa)
    try:
        for low, step in ((1.0, 2.0**-7), (-3.0, -(2.0**-6)), (2.0**-10, 2.0**-17)):
            step = step if dtype == mx.bfloat16 else step * 2.0**-3
            numbers = low + step * np.arange(17, dtype=np.float32)
            v = np.zeros((16, 1, 2, 64), np.float32)
            v[:, 0, 0], v[:, 0, 1] = numbers[:-1, None], numbers[1:, None]
            pages = mx.array(v).astype(dtype)
            q = mx.zeros((16, 4, 64), dtype)
            out = fast.paged_attention(q, pages, pages, [[i] for i in range(16)], [2] * 16)
            even = numbers[np.repeat(np.arange(0, 17, 2), 2)[1:-1]]
            assert np.array_equal(np.array(out.astype(mx.float32)[:, 0, 5]), even)
    finally:
        _ext.set_isa("")
