"""Quantised pages as the raw operations take them: ``(codes, scales, biases)`` for a side."""

from __future__ import annotations

from typing import TypeAlias

import mlx.core as mx

from paged_mlx.errors import fail, kind_of
from paged_mlx.formats.page_format import BITS, NAMES, PageFormats

#: One side's pages, or what ``mx.quantize`` gives of them.
Pages: TypeAlias = mx.array | tuple[mx.array, mx.array, mx.array]


def layer_of(
    op: str, k_pages: Pages, v_pages: Pages, k_format: str | None, v_format: str | None
) -> tuple[list[mx.array], PageFormats]:
    """The arrays of a layer in order, and its formats.

    Raises:
        ValueError: A format is none that raw operations take, or a side is not as its format says.
    """
    formats = PageFormats(k_format, v_format)
    arrays = []
    for letter, pages, name in zip("kv", (k_pages, v_pages), formats):
        if name is not None and (not isinstance(name, str) or name not in NAMES):
            fail(op, f'{letter}_format must be None, "q8" or "q4"', kind_of(name))
        if name is None:
            arrays.append(_dense(op, f"{letter}_pages", pages))
        elif letter == "k" and name == "q4":
            must = 'k_format must be "q8" or None here: "q4" needs a PagePool, for its open pages'
            fail(op, must, repr(name))
        else:
            arrays += _quantised(op, letter, pages, name)
    return arrays, formats


def _dense(op: str, name: str, pages) -> mx.array:
    if isinstance(pages, (tuple, list)):
        must = f"{name} must be one mx.array, unless {name[0]}_format says how it is quantised"
        fail(op, must, f"{len(pages)} arrays")
    if not isinstance(pages, mx.array):
        fail(op, f"{name} must be an mx.array", kind_of(pages))
    if pages.dtype == mx.uint32:
        must = f"{name} must be float32, float16 or bfloat16, or (codes, scales, biases) with {name[0]}_format"
        fail(op, must, "uint32")
    return pages


def _quantised(op: str, letter: str, pages, name: str) -> list[mx.array]:
    is_triple = isinstance(pages, (tuple, list)) and len(pages) == 3
    if not is_triple or not all(isinstance(array, mx.array) for array in pages):
        must = f'{letter}_pages must be (codes, scales, biases) for {letter}_format="{name}"'
        found = f"{len(pages)} values" if isinstance(pages, (tuple, list)) else kind_of(pages)
        fail(op, must, found)
    return list(pages)


def sides(arrays: list[mx.array], formats: PageFormats) -> tuple[Pages, Pages]:
    """The arrays of a layer as its two sides."""
    k = arrays[:1] if formats.k is None else arrays[:3]
    v = arrays[len(k) :]
    return _side(k), _side(v)


def _side(arrays: list[mx.array]) -> Pages:
    if len(arrays) == 1:
        return arrays[0]
    codes, scales, biases = arrays
    return codes, scales, biases


def head_dim_of(codes_or_pages: mx.array, name: str | None) -> int:
    """head_dim of a side, from its first array."""
    width = codes_or_pages.shape[-1]
    return width if name is None else width * 32 // BITS[name]
