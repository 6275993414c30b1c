"""NaN and infinities: -inf means that a row saw nothing, and nothing else does."""

import mlx.core as mx
import numpy as np
import pytest
from metal_on_host import metal_on_host
from paged_mlx import fast
from paged_mlx._native import BUILT
from paged_mlx.reference import oracle

NAN, INF = np.nan, np.inf
LOWEST = float(np.finfo(np.float32).min)
PAGE, DIM = 16, 64
#: Query heads, tokens and the Metal kernel of each kind of item.
BODIES = {
    "vector": (1, 1, "attend_vector"),
    "tile": (6, 1, "attend_tile"),
    "wide": (2, 20, "attend_tile"),
}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def step(body, context_len=90):
    """q, k, v and a table of one sequence."""
    heads, tokens, _ = BODIES[body]
    num_pages = -(-context_len // PAGE)
    k, v = (normal(num_pages, 1, PAGE, DIM, seed=seed) for seed in (1, 2))
    return normal(tokens, heads, DIM), k, v, [list(range(num_pages))], [context_len]


def on_both(q, k, v, tables, lens, body, **options):
    """``(out, lse)`` of the CPU backend and of the Metal text; both are those of the oracle.

    Without a native module: of MLX's own operations.
    """
    plan_options = {n: options.pop(n) for n in ("fixed_partition",) if n in options}
    arrays = {n: mx.array(x) if isinstance(x, np.ndarray) else x for n, x in options.items()}

    def attend():
        plan = fast.plan(
            tables, lens, num_q_heads=q.shape[1], num_kv_heads=1, page_size=PAGE, head_dim=DIM,
            cu_seqlens_q=[0, len(q)], dtype=mx.float32, **plan_options,
        )  # fmt: skip
        pages = mx.array(k), mx.array(v)
        out = fast.paged_attention(mx.array(q), *pages, plan=plan, return_lse=True, **arrays)
        return [np.array(x) for x in out]

    results = [attend()]
    if BUILT:
        with metal_on_host() as launches:
            results.append(attend())
        assert launches.findings == [] and launches.kernels[BODIES[body][2]] == 1
    exact = oracle.paged_attention(
        q, k, v, tables, lens, cu_seqlens_q=[0, len(q)], **options
    )  # fmt: skip
    for found in results:
        np.testing.assert_allclose(found[0], exact[0], atol=2e-5, rtol=1e-5)
        np.testing.assert_allclose(found[1], exact[1], atol=1e-4, rtol=1e-6)
    return results[0]


@pytest.mark.parametrize("fixed_partition", [None, 32])
@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("body", BODIES)
def test_a_sink_that_is_not_finite_makes_its_head_nan_and_no_other(body, bad, fixed_partition):
    q, k, v, tables, lens = step(body)
    q = np.concatenate([q, q], axis=1)
    sinks = np.zeros(q.shape[1], np.float32)
    sinks[0] = bad
    options = {} if fixed_partition is None else dict(fixed_partition=fixed_partition)
    out, lse = on_both(q, k, v, tables, lens, body, sinks=sinks, **options)
    assert np.isnan(out[:, 0]).all() and np.isnan(lse[:, 0]).all()
    assert np.isfinite(out[:, 1:]).all() and np.isfinite(lse[:, 1:]).all()


@pytest.mark.parametrize("fixed_partition", [None, 32])
@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("body", BODIES)
def test_a_mask_that_is_not_finite_makes_its_rows_nan(body, bad, fixed_partition):
    q, k, v, tables, lens = step(body)
    mask = np.zeros((len(q), lens[0]), np.float32)
    mask[-1, 3] = bad
    options = {} if fixed_partition is None else dict(fixed_partition=fixed_partition)
    out, lse = on_both(q, k, v, tables, lens, body, mask=mask, **options)
    assert np.isnan(out[-1]).all() and np.isnan(lse[-1]).all()
    assert np.isfinite(out[:-1]).all() and np.isfinite(lse[:-1]).all()


@pytest.mark.parametrize("bad", [NAN, INF, -INF, 3e38])
@pytest.mark.parametrize("kind", ["boolean", "additive"])
@pytest.mark.parametrize("body", BODIES)
def test_what_a_mask_hides_leaves_every_bit_alone(body, kind, bad):
    q, k, v, tables, lens = step(body)
    shown = normal(len(q), lens[0], seed=5) > -0.5
    shown[:, [2, 40]] = False
    shown[0, 70] = False
    mask = shown if kind == "boolean" else np.where(shown, np.float32(0.5), np.float32(-INF))
    before = on_both(q, k, v, tables, lens, body, mask=mask)
    for position in (2, 40) if len(q) > 1 else (2, 40, 70):
        k[position // PAGE, 0, position % PAGE] = bad
        v[position // PAGE, 0, position % PAGE] = bad
    after = on_both(q, k, v, tables, lens, body, mask=mask)
    assert all(np.array_equal(a, b) for a, b in zip(before, after))


@pytest.mark.parametrize("fixed_partition", [None, 32])
@pytest.mark.parametrize("bias", [-1e30, -3e38, LOWEST])
@pytest.mark.parametrize("body", BODIES)
def test_a_mask_as_low_as_a_float_can_be_is_no_hidden_key(body, bias, fixed_partition):
    q, k, v, tables, lens = step(body)
    mask = np.full((len(q), lens[0]), bias, np.float32)
    options = {} if fixed_partition is None else dict(fixed_partition=fixed_partition)
    sinks = np.full(q.shape[1], LOWEST, np.float32)
    out, lse = on_both(q, k, v, tables, lens, body, mask=mask, sinks=sinks, **options)
    assert (lse == np.float32(bias)).all()  # log of the number of keys is nothing beside it


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("route", ["cpu", "metal"])
def test_only_minus_infinity_is_a_part_that_saw_nothing(route, dtype):
    """Two parts of six rows: lse NaN, infinite, far below the other's, and empty with NaN values."""
    lses = np.array([[NAN, 0], [INF, 0], [0, NAN], [-1e30, 0], [-INF, 2], [-INF, -INF]])
    outs = np.arange(12, dtype=np.float32).reshape(2, 6, 1, 1)
    outs[0, 4:], outs[1, 5] = NAN, NAN

    def merge():
        parts = [mx.array(o).astype(dtype) for o in outs]
        lse = [mx.array(x[:, None].astype(np.float32)) for x in lses.T.copy()]
        return [np.array(x.astype(mx.float32)).ravel() for x in fast.merge_states(parts, lse)]

    if route == "cpu":
        out, lse = merge()
    else:
        with metal_on_host() as launches:
            out, lse = merge()
        assert launches.findings == [] and launches.kernels["merge_states"] == 1
    np.testing.assert_array_equal(out, [NAN, NAN, NAN, 9, 10, 0])
    np.testing.assert_array_equal(lse, [NAN, NAN, NAN, 0, 2, -INF])


@pytest.mark.parametrize("route", ["cpu", "metal"])
def test_a_nan_in_a_shared_prefix_is_in_its_column_of_every_sequence(route):
    """A value of the shared page is NaN: its column of both sequences, no other."""
    k, v = normal(3, 1, PAGE, DIM, seed=1), normal(3, 1, PAGE, DIM, seed=2)
    v[0, 0, 2, 1] = NAN
    q, tables, lens = normal(2, 1, DIM), [[0, 1], [0, 2]], [PAGE + 3, PAGE + 5]
    exact, exact_lse = oracle.paged_attention(q, k, v, tables, lens)

    def attend():
        arrays = (mx.array(x) for x in (q, k, v))
        return [np.array(x) for x in fast.paged_attention(*arrays, tables, lens, return_lse=True)]

    if route == "cpu":
        out, lse = attend()
    else:
        with metal_on_host() as launches:
            out, lse = attend()
        assert launches.findings == []
    np.testing.assert_allclose(out, exact, atol=1e-5)
    np.testing.assert_allclose(lse, exact_lse, atol=1e-5)
    assert np.isnan(out[:, 0, 1]).all() and np.isfinite(np.delete(out, 1, axis=2)).all()
