"""Few cases that together tell every encoder that breaks MLX's contract.

They run in a process whose native module is built against the stand-in of ``metal_contract``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import mlx.core as mx
import numpy as np
from metal_on_host import metal_on_host
from paged_mlx import fast
from paged_mlx._native import _ext

from .mutant import Mutant

_HEADS, _PAGE, _DIM, _PAGES = 2, 8, 32, 12


def _normal(*shape: int) -> mx.array:
    return mx.array(np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32))


def _step() -> np.ndarray:
    """Write, attend in partitions, and write over what was attended."""
    pages = [mx.zeros((_PAGES, _HEADS, _PAGE, _DIM)) for _ in range(2)]
    mx.eval(pages)
    tokens, slots = _normal(_PAGES * _PAGE, _HEADS, _DIM), mx.arange(_PAGES * _PAGE, dtype=mx.int32)
    mx.eval(tokens, slots)
    pages = _ext.write_pages([tokens, tokens], pages, slots, alias=True)
    plan = fast.plan(
        [np.arange(_PAGES)], [_PAGES * _PAGE], num_q_heads=4, num_kv_heads=_HEADS,
        page_size=_PAGE, fixed_partition=32, dtype=mx.float32,
    )  # fmt: skip
    out, _, *pages = _ext.paged_attention(_normal(1, 4, _DIM), pages, plan.array, _DIM**-0.5)
    pages = _ext.write_pages([tokens * 2, tokens * 2], pages, slots, alias=True)
    mx.eval(out, pages)
    return np.array(out)


def _check(ops: int, node_work: float, nodes: int) -> str | None:
    """Why a step breaks the contract; ``nodes``: command encoders that attend, at least."""
    expected = _step()
    encoders = set()

    def record(dispatch):
        if dispatch["kernel"].startswith("attend"):
            encoders.add(dispatch["order"][0])
        return dispatch

    _ext.contract_limits(ops=ops)
    _ext.set_node_work(node_work)
    try:
        with metal_on_host(change=record) as launches:
            out = _step()
    finally:
        _ext.set_node_work(0)
        _ext.contract_limits()
    if launches.findings:
        return launches.findings[0]
    if len(encoders) < nodes:
        return f"{len(encoders)} command encoders for {nodes} nodes of long work"
    wrong = np.abs(out - expected).max()
    return f"off by {wrong}" if not wrong < 1e-4 else None


def cases(mutant: Mutant) -> dict[str, Callable[[], str | None]]:
    """The suite, by name."""
    return {
        "one command buffer": partial(_check, 1000, 0, 1),
        "a command buffer for each node": partial(_check, 0, 0, 1),
        "long work": partial(_check, 1000, 1, 3),
    }
