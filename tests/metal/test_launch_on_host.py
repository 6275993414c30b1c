"""Python -> C++ -> launch code -> kernel text: every operation, on this machine's CPU."""

import mlx.core as mx
import numpy as np
import pytest
from metal_on_host import metal_on_host
from paged_mlx import PagePool, fast

DTYPES = [mx.float32, mx.float16, mx.bfloat16]
PAGES, HEADS, PAGE, DIM = 12, 2, 8, 64


def normal(shape, seed, dtype):
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32)).astype(
        dtype
    )


def pages(dtype, seed):
    x = normal((PAGES, HEADS, PAGE, DIM), seed, dtype)
    mx.eval(x)
    return x


def attention(dtype=mx.float16, q_heads=8, lens=(20, 37), query_lens=None, **options):
    query_lens = [1] * len(lens) if query_lens is None else query_lens
    q = normal((sum(query_lens), q_heads, DIM), 0, dtype)
    tables = np.random.default_rng(1).permutation(PAGES)[: 2 * 5].reshape(2, 5)[: len(lens)]
    cu = np.concatenate([[0], np.cumsum(query_lens)])
    out, lse = fast.paged_attention(
        q, pages(dtype, 2), pages(dtype, 3), tables, list(lens),
        cu_seqlens_q=cu, return_lse=True, **options,
    )  # fmt: skip
    mx.eval(out, lse)
    return np.array(out.astype(mx.float32)), np.array(lse)


def assert_same_as_cpu(launches_wanted, tolerance, **call):
    expected, expected_lse = attention(**call)
    with metal_on_host() as launches:
        out, lse = attention(**call)
    assert launches.kernels == launches_wanted
    assert launches.findings == []
    np.testing.assert_allclose(out, expected, atol=tolerance, rtol=tolerance)
    np.testing.assert_allclose(lse, expected_lse, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("dtype, tolerance", list(zip(DTYPES, [1e-5, 2e-3, 2e-2])))
@pytest.mark.parametrize(
    "kernel, call",
    [
        ("attend_vector", dict(q_heads=2)),
        ("attend_tile", dict(q_heads=8)),
        ("attend_tile", dict(q_heads=4, query_lens=[16, 30])),
    ],
)
def test_each_body_gives_the_attention_of_the_cpu_backend(kernel, call, dtype, tolerance):
    assert_same_as_cpu({kernel: 1}, tolerance, dtype=dtype, **call)


def test_a_mixed_step_takes_one_dispatch_for_each_kind_of_item():
    call = dict(q_heads=8, query_lens=[1, 30])
    assert_same_as_cpu({"attend_tile": 2}, 2e-3, **call)


def test_options_reach_the_kernel():
    options = dict(
        sliding_window=13,
        softcap=5.0,
        alibi_slopes=mx.array(np.linspace(0.1, 0.8, 8).astype(np.float32)),
        sinks=mx.array(np.linspace(-1, 1, 8).astype(np.float32)),
        mask=mx.array(np.random.default_rng(5).random((2, 40)) > 0.3),
    )
    assert_same_as_cpu({"attend_tile": 1}, 2e-3, **options)


def test_partials_are_merged():
    q_heads, dtype = 8, mx.float16
    k_pages, v_pages = pages(dtype, 2), pages(dtype, 3)
    plan = fast.plan(
        [list(range(PAGES))], [PAGES * PAGE], num_q_heads=q_heads, num_kv_heads=HEADS,
        page_size=PAGE, fixed_partition=32,
    )  # fmt: skip
    assert plan.num_partials == 3
    q = normal((1, q_heads, DIM), 0, dtype)
    expected = np.array(fast.paged_attention(q, k_pages, v_pages, plan=plan).astype(mx.float32))
    with metal_on_host() as launches:
        out = fast.paged_attention(q, k_pages, v_pages, plan=plan).astype(mx.float32)
        mx.eval(out)
    assert launches.kernels == {"attend_tile": 1, "merge": 1} and launches.findings == []
    np.testing.assert_allclose(np.array(out), expected, atol=2e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pages_are_moved_bit_for_bit(dtype):
    def move():
        k_pages, v_pages = pages(dtype, 2), pages(dtype, 3)
        k = normal((3, HEADS, DIM), 4, dtype)
        k_pages, v_pages = fast.write_pages(k, k, k_pages, v_pages, [5, -1, 90])
        k_pages, v_pages = fast.copy_pages([k_pages, v_pages], [(0, 3), (11, 4)])
        gathered = fast.gather_pages(k_pages, v_pages, [[3, 0], [4, -1]], [12, 5])
        mx.eval(k_pages, v_pages, gathered)
        return [np.array(x.astype(mx.float32)) for x in (k_pages, v_pages, *gathered)]

    expected = move()
    with metal_on_host() as launches:
        moved = move()
    wanted = {"write_pages": 2, "copy_pages": 2, "gather_pages": 1}
    assert {name: launches.kernels[name] for name in wanted} == wanted
    assert launches.findings == []
    assert all(np.array_equal(a, b) for a, b in zip(moved, expected))


def test_a_pool_writes_keys_and_values_in_one_dispatch_and_copies_all_layers_in_one():
    pool = PagePool(4, PAGES, PAGE, HEADS, DIM, mx.float16)
    k = normal((2, HEADS, DIM), 4, mx.float16)
    with metal_on_host() as launches:
        pool.write(0, k, k, [3, 17])
        pool.copy([(0, 5)])
        mx.eval(pool.state)
    assert launches.kernels == {"write_pages": 1, "copy_pages": 1} and launches.findings == []
    assert mx.array_equal(pool[0].arrays[0][5, :, 3], k[0])


def test_states_are_merged():
    outs = [normal((3, HEADS, DIM), i, mx.float32) for i in range(3)]
    lses = [normal((3, HEADS), 10 + i, mx.float32) for i in range(2)] + [
        mx.full((3, HEADS), -mx.inf)
    ]
    expected = [np.array(x) for x in fast.merge_states(outs, lses)]
    with metal_on_host() as launches:
        merged = fast.merge_states(outs, lses)
        mx.eval(merged)
    assert launches.kernels == {"merge_states": 1} and launches.findings == []
    for ours, theirs in zip(merged, expected):
        np.testing.assert_allclose(np.array(ours), theirs, atol=1e-6)
