"""A step that is built while the one before it runs has the same graph: nothing is copied."""

import io
import re
import threading
from collections import Counter

import mlx.core as mx
import pytest
from metal_on_host import metal_on_host
from paged_mlx import PagePool, fast

LAYERS = 2


def nodes(*arrays) -> Counter:
    """Operations that evaluating the arrays would run, by name."""
    text = io.StringIO()
    mx.export_to_dot(text, *arrays)
    return Counter(re.findall(r'label ?= ?"([A-Za-z]+)"', text.getvalue()))


def step(pool: PagePool, position: int, k: mx.array) -> list[mx.array]:
    """One token's attention in every layer, and the pool's newest arrays."""
    plan = fast.plan(
        [[0]],
        [position + 1],
        num_q_heads=2,
        num_kv_heads=2,
        page_size=16,
        dtype=mx.float32,
    )
    outs = []
    for layer in range(LAYERS):
        pool.write(layer, k, k, [position])
        outs.append(pool[layer].attend(mx.zeros((1, 2, 64)), plan))
    return [*outs, *(array for layer in pool.state for array in layer)]


def slow() -> mx.array:
    big = mx.random.normal((1500, 1500))
    for _ in range(3):
        big = big @ big * 1e-3
    return mx.zeros((1, 2, 64)) + big[:1, :128].reshape(1, 2, 64) * 0


@pytest.mark.native
def test_a_layer_has_as_many_nodes_with_a_step_in_flight_as_without():
    pool = PagePool(LAYERS, 8, 16, 2, 64, mx.float32)
    k = mx.ones((1, 2, 64))
    mx.eval(k, pool.state)
    first = step(pool, 0, k)
    alone = nodes(*first)
    mx.eval(first)
    mx.async_eval(step(pool, 1, slow()))
    in_flight = step(pool, 2, k)
    assert nodes(*in_flight) == alone
    assert alone["PagedAttention"] == alone["WritePages"] == LAYERS
    assert alone["Contiguous"] == LAYERS * 3  # of q, and of the new k and v: none of pages
    mx.eval(in_flight)


def test_a_layer_has_as_many_dispatches_with_a_step_in_flight_as_without():
    finish = threading.Event()

    def held(dispatch):
        assert finish.wait(60)
        return dispatch

    with metal_on_host(instrument=False, change=held) as launches:
        pool = PagePool(LAYERS, 8, 16, 2, 64, mx.float32)
        k = mx.ones((1, 2, 64))
        mx.eval(k, pool.state)
        finish.set()
        mx.eval(step(pool, 0, k))
        alone = Counter(launches.kernels)
        finish.clear()
        first = step(pool, 1, k)
        mx.async_eval(first)
        in_flight = step(pool, 2, k)
        mx.async_eval(in_flight)
        assert launches.kernels == alone  # the second step is still in flight
        finish.set()
        mx.eval(first, in_flight)
    assert launches.findings == []
    assert alone == {"write_pages": LAYERS, "attend_vector": LAYERS}
    assert launches.kernels == {name: 3 * count for name, count in alone.items()}
