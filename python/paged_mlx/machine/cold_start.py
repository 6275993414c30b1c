"""Kernels that are compiled before anything can run: libraries and pipelines, counted without a GPU.

The launch code is asked what it would dispatch, and nothing runs. Metal compiles a library for each
kernel text with its macros, and a pipeline for each set of function constants.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import mlx.core as mx

from paged_mlx._native import _ext
from paged_mlx.pages.policies import PageAllocator
from paged_mlx.pages.table import PageTable
from paged_mlx.pool import PagePool


class Compiled(NamedTuple):
    """What was asked for."""

    libraries: set[str]
    pipelines: set[tuple]

    def __str__(self):
        return f"{len(self.libraries)} libraries, {len(self.pipelines)} pipelines"


class Model(NamedTuple):
    """Attention of a model: its heads, and the windows of its layers."""

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...] = (None,)
    sinks: bool = False


MODELS = {
    "Llama 3.1 8B": Model(32, 8, 128),
    "Gemma 3 4B": Model(8, 4, 256, windows=(1024, None)),
    "gpt-oss 20B": Model(64, 8, 64, windows=(128, None), sinks=True),
}


@contextmanager
def counted() -> Iterator[Compiled]:
    """What operations of the CPU device inside would compile for a GPU; none of them runs."""
    found = Compiled(set(), set())

    def asked(dispatch: dict) -> None:
        found.libraries.add(dispatch["library"])
        found.pipelines.add((dispatch["library"], *sorted(dispatch["constants"].items())))

    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    _ext.set_host_launch(asked)
    try:
        yield found
        mx.synchronize()
    finally:
        _ext.set_host_launch(None)
        mx.set_default_device(before)


def first_token(model: Model) -> Compiled:
    """What a model needs for its first token and the next: a prompt, then a decode step."""
    dtype = mx.bfloat16
    with counted() as found:
        allocator = PageAllocator(64, 16)
        pool = PagePool(1, 64, 16, model.num_kv_heads, model.head_dim, dtype, allocator=allocator)
        table = PageTable(16)
        sinks = mx.zeros(model.num_q_heads, dtype) if model.sinks else None
        for tokens in (300, 1):
            slots = table.append_tokens(tokens, allocator).slots
            q = mx.zeros((tokens, model.num_q_heads, model.head_dim), dtype)
            k = mx.zeros((tokens, model.num_kv_heads, model.head_dim), dtype)
            pool[0].write(k, k, slots)
            for window in model.windows:
                plan = pool.plan(
                    [table],
                    num_q_heads=model.num_q_heads,
                    query_lens=[tokens],
                    sliding_window=window,
                )
                mx.eval(pool[0].attend(q, plan, sinks=sinks))
    return found
