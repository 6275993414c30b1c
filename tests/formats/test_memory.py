"""Memory of quantised pools: the format's bytes, the open pages, and scratch that no context lengthens."""

import mlx.core as mx
import pytest
from paged_mlx import PagePool, PageTable
from paged_mlx._native import BUILT

PAIRS = [("q8", "q8"), ("q8", "q4"), ("q4", "q4")]
LAYERS, SIZE, HEADS, DIM, CHUNK = 2, 64, 2, 128, 128
BYTES = {("q8", "q8"): 272, ("q8", "q4"): 208, ("q4", "q4"): 144}


def beyond_the_pool(pair, context: int) -> int:
    """Most bytes that a prompt of ``context`` tokens and some steps of decoding take beside the pool."""
    pool = PagePool(
        LAYERS, context // SIZE + 2, SIZE, HEADS, DIM, mx.float16, k_format=pair[0],
        v_format=pair[1], stream=mx.cpu,
    )  # fmt: skip
    assert pool.page_nbytes == LAYERS * HEADS * SIZE * BYTES[pair]
    table = PageTable(SIZE)
    mx.synchronize()
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    for count in [CHUNK] * (context // CHUNK) + [1] * 8:
        slots = table.append_tokens(count, pool.allocator).slots
        plan = pool.plan([table], num_q_heads=4, query_lens=[count])
        k, v = (mx.ones((count, HEADS, DIM), mx.float16) for _ in range(2))
        q = mx.ones((count, 4, DIM), mx.float16)
        for layer in range(LAYERS):
            pool.write(layer, k, v, slots)
            out = pool[layer].attend(q, plan)
        mx.eval(out, pool.state)
    return mx.get_peak_memory() - before


@pytest.mark.skipif(not BUILT, reason="MLX's own operations copy pages as they write")
@pytest.mark.parametrize("pair", PAIRS, ids=lambda p: f"{p[0]}-{p[1]}")
def test_peak_memory_is_the_formats_bytes_and_scratch_that_does_not_grow(pair):
    with mx.stream(mx.cpu):
        short, long = (beyond_the_pool(pair, context) for context in (1024, 8192))
    assert long <= short + 64 * 1024
    assert long < 8192 * LAYERS * HEADS * BYTES[pair] / 2  # no copy of the pool's pages
