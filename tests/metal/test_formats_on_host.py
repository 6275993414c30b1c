"""A pool of quantised pages, Python -> C++ -> launch code -> kernel text, beside the CPU backend."""

import mlx.core as mx
import numpy as np
import pytest
from metal_on_host import metal_on_host
from paged_mlx import PagePool, PageTable

pytestmark = pytest.mark.native

HEADS, DIM, PAGE, LAYERS = 2, 64, 16, 2
STEPS = (37, 1, 9, 1, 18)  # tokens of each; pages are filled by one step, and over several
FORMATS = [("q8", "q8"), ("q8", "q4"), (None, "q4"), ("q4", None), ("q4", "q4")]


def normal(shape, seed):
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return mx.array(x).astype(mx.float16)


def run_steps(formats, q_heads):
    """Write and attend step by step, fork, attend to both, gather. Everything in one graph."""
    pool = PagePool(
        LAYERS, 16, PAGE, HEADS, DIM, mx.float16, k_format=formats[0], v_format=formats[1]
    )
    table, outs = PageTable(PAGE), []

    def step(table, tokens, seed):
        slots = table.append_tokens(tokens, pool.allocator).slots
        plan = pool.plan([table], num_q_heads=q_heads, query_lens=[tokens])
        for layer in range(LAYERS):
            k, v = (normal((tokens, HEADS, DIM), seed + layer + i) for i in (0, 50))
            pool[layer].write(k, v, slots)
            q = normal((tokens, q_heads, DIM), seed + layer + 100)
            outs.append(pool[layer].attend(q, plan))

    for number, tokens in enumerate(STEPS):
        step(table, tokens, 1000 * number)
    fork = table.fork()
    step(fork, 1, 7)
    step(table, 1, 9)
    length = sum(STEPS) + 1
    for layer in range(LAYERS):
        ids = [entry.physical_page_id for entry in fork.entries]
        outs += pool[layer].gather([ids], [length])
    mx.eval(outs, pool.state)
    return [np.array(out.astype(mx.float32)) for out in outs]


@pytest.mark.parametrize("q_heads", [2, 8])
@pytest.mark.parametrize("formats", FORMATS, ids=str)
def test_steps_on_quantised_pages_are_those_of_the_cpu_backend(formats, q_heads):
    expected = run_steps(formats, q_heads)
    with metal_on_host() as launches:
        found = run_steps(formats, q_heads)
    assert launches.findings == []
    kernels = {"quantise_pages", "dequantise_pages", "copy_pages", "attend_tile"}
    kernels |= {"attend_vector"} if q_heads == 2 else set()
    kernels |= {"seal_keys"} if formats[0] == "q4" else set()
    assert kernels <= set(launches.kernels)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-3, rtol=2e-3)
