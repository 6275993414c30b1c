"""What do formats of pages cost and gain on the CPU, against dense pages, in one run?

Decode at 16k context by the CPU time of one thread, pages out of the caches, every output compared with attention over what its
pages read as; and a written token against a decode step at 1k context.
"""

from itertools import count

import mlx.core as mx
import numpy as np
from paged_mlx import fast
from paged_mlx._native import _ext
from paged_mlx.formats import quantise, rotation

from benchmarks.harness import Candidate, Case, run
from benchmarks.limits import on_threads

HEADS, GROUP, DIM, PAGE = 8, 4, 128, 64
FORMATS = {
    "bfloat16": (None, None),
    "q8": ("q8", "q8"),
    "q8/q4": ("q8", "q4"),
    "q4/q4": ("q4", "q4"),
}


def in_pool_memory(array: mx.array) -> mx.array:
    """The array where a pool would have it."""
    return _ext.pool_memory(array, list(array.shape), 0.0, array.dtype)


class Pages:
    """Pages of one format, as many layers as keep them out of the caches."""

    def __init__(self, name: str, context: int, layers: int):
        self.formats = FORMATS.get(name, (None, None))
        self.dtype = mx.float16 if name == "float16" else mx.bfloat16
        num_pages = context // PAGE
        mx.random.seed(0)
        shape = (num_pages, HEADS, PAGE, DIM)
        self.layers, self.reads_as = [], []
        for _ in range(layers):
            k, v = (mx.random.normal(shape).astype(self.dtype) for _ in range(2))
            arrays, dense = self._stored(k, v, num_pages)
            arrays = [in_pool_memory(a) for a in arrays]
            mx.eval(arrays, dense)
            self.layers.append(arrays)
            self.reads_as.append(dense if not self.reads_as else None)
        table = np.random.default_rng(0).permutation(num_pages).astype(np.int32)[None]
        q_heads = HEADS * GROUP
        self.q = mx.random.normal((1, q_heads, DIM)).astype(self.dtype)
        self.table, self.context = table, context
        self.plan = fast.plan(
            table, [context], num_q_heads=q_heads, num_kv_heads=HEADS, page_size=PAGE,
            dtype=self.dtype,
        )  # fmt: skip
        self.nbytes = sum(a.nbytes for a in self.layers[0])
        self.turns = count()

    def _stored(self, k, v, num_pages):
        """A layer's arrays, and K and V as they read, float32."""
        arrays, dense = [], []
        tokens = mx.full((num_pages,), PAGE)
        for x, name, is_key in ((k, self.formats[0], True), (v, self.formats[1], False)):
            if name is None:
                arrays.append(x)
                dense.append(x.astype(mx.float32))
            elif is_key and name == "q4":
                arrays += quantise.quantise_channels(x, tokens)
                dense.append(quantise.dequantise_channels(*arrays[-3:]))
            else:
                turns = not is_key and name == "q4"
                turned = rotation.rotate(x).astype(self.dtype) if turns else x
                arrays += quantise.quantise_tokens(turned, name)
                read = quantise.dequantise_tokens(*arrays[-3:], name)
                dense.append(rotation.rotate(read) if turns else read)
        if self.formats[0] == "q4":
            arrays += [mx.zeros((1, HEADS, PAGE, DIM), self.dtype) for _ in range(2)]
        return arrays, dense

    def attend(self):
        layer = next(self.turns) % len(self.layers)
        out, _, *self.layers[layer] = _ext.paged_attention(
            self.q, self.layers[layer], self.plan.array, DIM**-0.5, formats=self.formats
        )
        mx.eval(out)
        return out

    def expected(self):
        """Attention over what the first layer reads as."""
        dense = self.reads_as[0]
        return fast.paged_attention(self.q.astype(mx.float32), *dense, self.table, [self.context])

    def check(self):
        out, _, *_ = _ext.paged_attention(
            self.q, self.layers[0], self.plan.array, DIM**-0.5, formats=self.formats
        )
        error = mx.abs(out.astype(mx.float32) - self.expected()).max().item()
        size = mx.abs(self.expected()).max().item()
        assert error < 0.01 * size, f"{self.formats}: {error} of {size}"


def decode_case() -> Case:
    pages = {name: Pages(name, 16384, 3) for name in ("float16", *FORMATS)}

    def check(outputs):
        for layers in pages.values():
            layers.check()

    candidates = [
        Candidate(name, on_threads(1, layers.attend), layers.nbytes)
        for name, layers in pages.items()
    ]
    return Case(
        f"decode, 1 x 16384, {HEADS} KV heads of {DIM}, groups of {GROUP}, 1 thread, cpu",
        candidates, check, 20, 2, "cpu",
    )  # fmt: skip


def write_case() -> Case:
    """One token in one layer, all operations of MLX's graph included, and a decode step at 1k."""
    tokens = [mx.random.normal((1, HEADS, DIM)).astype(mx.bfloat16) for _ in range(2)]
    slots, turns = [mx.array([n], mx.int32) for n in range(PAGE)], count()
    mx.eval(tokens, slots)
    written = {name: Pages(name, 1024, 1) for name in FORMATS}

    def writer(layers):
        def write():
            pages = layers.layers[0]
            slot = slots[next(turns) % PAGE]
            layers.layers[0] = _ext.write_pages(
                tokens, pages, slot, alias=True, formats=layers.formats
            )
            mx.eval(layers.layers[0])

        return write

    candidates = [
        Candidate(f"write, {name}", on_threads(1, writer(layers)))
        for name, layers in written.items()
    ]
    steps = {name: Pages(name, 1024, 24) for name in FORMATS}
    candidates += [
        Candidate(f"decode at 1k, {name}", on_threads(1, layers.attend), layers.nbytes)
        for name, layers in steps.items()
    ]

    def check(outputs):
        for layers in steps.values():
            layers.check()

    return Case("a written token, and a decode step at 1k", candidates, check, 40, 5, "cpu")


def cases():
    yield decode_case()
    yield write_case()


def main():
    run(f"formats_{_ext.isa()}", cases())


if __name__ == "__main__":
    main()
