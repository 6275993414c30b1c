"""Memory of quantised pools: the format's bytes, the open pages, and scratch that no context lengthens."""

from itertools import product

import mlx.core as mx
import pytest
from paged_mlx import PagePool, PageTable
from paged_mlx._native import BUILT

PAIRS = [pair for pair in product((None, "q8", "q4"), repeat=2) if pair != (None, None)]
LAYERS, SIZE, HEADS, DIM, CHUNK = 2, 64, 2, 128, 128
BYTES = {None: 256, "q8": 136, "q4": 72}  # of K, or V, of a token and KV head


def page_nbytes(pair) -> int:
    return LAYERS * HEADS * SIZE * sum(BYTES[name] for name in pair)


def beyond_the_pool(pair, context: int) -> int:
    """Most bytes that a prompt of ``context`` tokens and some steps of decoding take beside the pool."""
    pool = PagePool(
        LAYERS, context // SIZE + 2, SIZE, HEADS, DIM, mx.float16, k_format=pair[0],
        v_format=pair[1], stream=mx.cpu,
    )  # fmt: skip
    assert pool.page_nbytes == page_nbytes(pair)
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
    open_page = LAYERS * HEADS * SIZE * 2 * BYTES[None] if pair[0] == "q4" else 0
    assert pool.nbytes == pool.num_pages * page_nbytes(pair) + open_page
    return mx.get_peak_memory() - before


@pytest.mark.skipif(not BUILT, reason="MLX's own operations copy pages as they write")
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_peak_memory_is_the_formats_bytes_and_scratch_that_does_not_grow(pair):
    with mx.stream(mx.cpu):
        short, long = (beyond_the_pool(pair, context) for context in (512, 4096))
    assert long <= short + 64 * 1024
    assert long < 4096 // SIZE * page_nbytes(pair) / 2  # no copy of the pool's pages
