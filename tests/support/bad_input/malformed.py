"""Calls that must be refused: a sound call, and one thing about it spoilt.

The arguments are small ``mx.array``s and host integers of the operations in
``paged_mlx.fast``. ``spoilt_tables`` and ``spoilt_arrays`` hold the functions that spoil a
call in place, each named after what is then wrong with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

NUM_PAGES, NUM_KV_HEADS, PAGE_SIZE = 7, 2, 4
NUM_Q_HEADS, HEAD_DIM, V_HEAD_DIM = 4, 16, 8
OUT_OF_POOL = (NUM_PAGES, NUM_PAGES + 1, 2**31 - 1, -2, -(2**31))


@dataclass(frozen=True)
class Call:
    """One call of an operation of ``paged_mlx.fast``."""

    op: str
    arguments: dict

    def copy(self) -> Call:
        fresh = {
            name: value.copy() if isinstance(value, np.ndarray) else value
            for name, value in self.arguments.items()
        }
        return replace(self, arguments=fresh)


Spoil = Callable[[dict, np.random.Generator], None]


def array(*shape: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    """Zeros; the values of a call that must be refused do not matter."""
    return mx.zeros(shape, dtype)


def sound_calls() -> list[Call]:
    """Calls that are right, with every kind of argument among them."""
    pages = {
        "k_pages": mx.ones((NUM_PAGES, NUM_KV_HEADS, PAGE_SIZE, HEAD_DIM)),
        "v_pages": mx.ones((NUM_PAGES, NUM_KV_HEADS, PAGE_SIZE, V_HEAD_DIM)),
    }
    tables = {
        "block_tables": np.array([[3, 1, -1], [0, 5, 6], [2, -1, -1]], np.int32),
        "context_lens": np.array([7, 11, 3], np.int32),
    }
    ragged = {
        "page_starts": np.array([[0, 4, 0], [0, 4, 8], [0, 0, 0]], np.int32),
        "page_lens": np.array([[4, 3, 0], [4, 4, 4], [3, 0, 0]], np.int32),
    }
    decode = {"q": array(3, NUM_Q_HEADS, HEAD_DIM), **pages, **tables}
    packed = {
        "q": array(8, NUM_Q_HEADS, HEAD_DIM),
        **pages,
        **tables,
        "cu_seqlens_q": np.array([0, 5, 6, 8], np.int32),
    }
    extras = {
        "softcap": 30.0,
        "sliding_window": 6,
        "scale": 0.5,
        "alibi_slopes": array(NUM_Q_HEADS),
        "sinks": array(NUM_Q_HEADS),
        "mask": array(NUM_Q_HEADS, 8, 11),
    }
    return [
        Call("paged_attention", decode),
        Call("paged_attention", packed),
        Call("paged_attention", {**packed, **ragged, **extras}),
        Call("plan", {**_geometry(), **tables}),
        Call("plan", {**_geometry(), **tables, "cu_seqlens_q": packed["cu_seqlens_q"], **ragged}),
        Call("gather_pages", {**pages, **tables}),
        Call("gather_pages", {**pages, **tables, **ragged}),
        Call("write_pages", _new_tokens() | pages),
        Call("copy_pages", {"pools": list(pages.values()), "pairs": np.array([[0, 3], [0, 4]])}),
        Call("merge_states", _states()),
    ]


def _geometry() -> dict:
    return {
        "num_q_heads": NUM_Q_HEADS,
        "num_kv_heads": NUM_KV_HEADS,
        "page_size": PAGE_SIZE,
        "num_pages": NUM_PAGES,
    }


def _new_tokens() -> dict:
    return {
        "k": array(5, NUM_KV_HEADS, HEAD_DIM),
        "v": array(5, NUM_KV_HEADS, V_HEAD_DIM),
        "slot_mapping": np.array([3, 20, 7, -1, 1], np.int32),
    }


def _states() -> dict:
    return {
        "outs": [array(3, NUM_Q_HEADS, V_HEAD_DIM) for _ in range(3)],
        "lses": [array(3, NUM_Q_HEADS) for _ in range(3)],
    }


_SPOILS: list[tuple[tuple[str, ...], Spoil]] = []


def spoils(*needed: str) -> Callable[[Spoil], Spoil]:
    """Register a function that spoils calls with these arguments."""

    def register(spoil: Spoil) -> Spoil:
        _SPOILS.append((needed, spoil))
        return spoil

    return register


def spoils_of(call: Call) -> dict[str, Spoil]:
    """Everything that can be spoilt about this call, by what is then wrong with it."""
    from . import spoilt_arrays, spoilt_tables  # noqa: F401  they register themselves

    return {
        spoil.__name__.replace("_", " "): spoil
        for needed, spoil in _SPOILS
        if all(name in call.arguments for name in needed)
    }
