"""What do a copied page and a written token cost on the CPU, against memcpy?

Graph, Python and evaluation included; by CPU time. Pages rotate, so that nothing is warm.
"""

from itertools import chain, count

import mlx.core as mx
import numpy as np
from paged_mlx import PagePool
from paged_mlx.machine.bench.workload import DTYPES, Geometry

from benchmarks.harness import Candidate, Case, run
from benchmarks.limits import memcpy, memcpy_in_pieces, on_threads, smallest_operation

LAYERS, PAGES, SEQUENCES = 32, 512, 256


def new_pool(layers, dtype) -> PagePool:
    g = Geometry()
    pool = PagePool(layers, PAGES, g.page_size, g.num_kv_heads, g.head_dim, DTYPES[dtype])
    k = mx.random.normal((g.page_size, g.num_kv_heads, g.head_dim)).astype(DTYPES[dtype])
    for layer in range(layers):
        for page_id in range(PAGES):
            pool.write(layer, k, k, range(page_id * g.page_size, (page_id + 1) * g.page_size))
        mx.eval(pool.state)
    return pool


def copy_case(dtype) -> Case:
    pool = new_pool(LAYERS, dtype)
    turns = count()

    def copy():
        source = 2 * next(turns) % PAGES
        pool.copy([(source, source + 1)])
        mx.eval(pool.state)
        return source, source + 1

    def check(outputs):
        (source, target), *_ = outputs.values()
        for pages in chain(*pool.state):
            assert mx.array_equal(pages[source], pages[target]), "the page was not copied"

    nbytes = pool.page_nbytes
    candidates = [
        Candidate("copy", on_threads(1, copy), nbytes),
        memcpy(nbytes),
        memcpy_in_pieces(nbytes, 2 * LAYERS),
        smallest_operation(),
    ]
    return Case(
        f"copy-on-write of a page in {LAYERS} layers, {dtype}", candidates, check, 60, 2, "cpu"
    )


def write_case(dtype) -> Case:
    g = Geometry()
    pool = new_pool(8, dtype)
    tokens = mx.random.normal((SEQUENCES, g.num_kv_heads, g.head_dim)).astype(DTYPES[dtype])
    rng, turns = np.random.default_rng(0), count()
    steps = [
        rng.permutation(PAGES)[:SEQUENCES] * g.page_size + rng.integers(0, g.page_size, SEQUENCES)
        for _ in range(64)
    ]
    slots = [pool.slots(step.astype(np.int32)) for step in steps]

    def write():
        turn = next(turns)
        layer, step = turn % pool.num_layers, turn % len(steps)
        pool.write(layer, tokens, tokens, slots[step])
        mx.eval(pool[layer].arrays)
        return layer, steps[step]

    def check(outputs):
        (layer, step), *_ = outputs.values()
        page_ids, offsets = mx.array(step // g.page_size), mx.array(step % g.page_size)
        for pages in pool[layer].arrays:
            assert mx.array_equal(pages[page_ids, :, offsets], tokens), "a token was not written"

    nbytes = SEQUENCES * g.num_kv_heads * g.head_dim * 2 * DTYPES[dtype].size
    candidates = [
        Candidate("write", on_threads(1, write), nbytes),
        memcpy(nbytes),
        smallest_operation(),
    ]
    name = f"a token of each of {SEQUENCES} sequences, one layer, {dtype}"
    return Case(name, candidates, check, 60, 2, "cpu")


def cases():
    for dtype in ("float32", "float16"):
        yield copy_case(dtype)
        yield write_case(dtype)


def main():
    run("cpu_writes", cases())


if __name__ == "__main__":
    main()
