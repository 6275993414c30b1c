"""Writing, sealing and gathering pages in formats: what comes out that is not right.

Each function returns findings and the names of arrays that differ from the oracle's, bit for bit.
"""

from __future__ import annotations

import numpy as np
from paged_mlx.reference import dtypes, formats
from paged_mlx.reference.case import Case

from .pages import gather_in_formats, seal_pages, write_in_formats

_BITS = {"q8": 8, "q4": 4}
_PARTS = ("pages", "scales", "biases")


def write(pair: tuple[str | None, str | None], dtype: str, dims=(128, 64), **options) -> list[str]:
    """Five tokens, one of them nowhere, into pages of eight."""
    heads, page_size, slots = 2, 8, np.array([3, -1, 17, 31, 8], np.int32)
    k, v = (_tokens((len(slots), heads, dim), i, dtype) for i, dim in enumerate(dims))
    is_open = pair[0] == "q4"  # the open pages are written, which are dense
    stored = {
        "k": _stored(k, None if is_open else pair[0], dtype),
        "v": _stored(_turned(v, pair[1], dtype), None if is_open else pair[1], dtype),
    }
    arrays, expected = {}, {}
    for name, rows in _named(stored):
        arrays[name] = np.full((4, heads, page_size, rows.shape[-1]), 7, rows.dtype)
        expected[name] = arrays[name].copy()
        for token, slot in enumerate(slots):
            if slot >= 0:
                expected[name][slot // page_size, :, slot % page_size] = rows[token]
    tokens = [dtypes.encode(x, dtype) for x in (k, v)]
    launches = write_in_formats(*tokens, arrays, slots, pair, dtype, **options)
    return _findings(launches) + _differing(arrays, expected, dtype)


def seal(v_format: str | None, dtype: str, rotated: bool = False, **options) -> list[str]:
    """Three pages, the second with five tokens of eight, the last all the same."""
    heads, page_size, dims = 2, 8, (72, 64)
    k, v = (_tokens((3, heads, page_size, dim), i, dtype) for i, dim in enumerate(dims))
    k[2, 1, :, 5] = -1.5  # a constant channel
    pairs = np.array([[2, 0, 8], [1, 3, 5], [0, 4, 8]], np.int32)
    turned = v if rotated else _turned(v, v_format, dtype)
    stored = {
        "k": formats.quantise_channels(k[pairs[:, 0]], pairs[:, 2], dtype),
        "v": _stored(turned[pairs[:, 0]], v_format, dtype),
    }
    arrays, expected = {}, {}
    for name, rows in _named(stored):
        arrays[name] = np.full((5, *rows.shape[1:]), 7, rows.dtype)
        expected[name] = arrays[name].copy()
        for row, (_, target, tokens) in zip(rows, pairs):
            held = slice(None) if name.startswith("k") else slice(tokens)
            expected[name][target][:, held] = row[:, held]
    sources = [dtypes.encode(x, dtype) for x in (k, v)]
    pair = ("q4", v_format)
    launches = seal_pages(*sources, arrays, pairs, pair, dtype, rotated, **options)
    return _findings(launches) + _differing(arrays, expected, dtype)


def gather(pair: tuple[str | None, str | None], ragged: bool = False, **options) -> list[str]:
    """Three sequences, of which one is empty; values to a rounding of float32."""
    case = Case(
        sequences=((1, 70), (1, 21), (1, 0)), num_kv_heads=2, num_q_heads=2, ragged=ragged,
        k_format=pair[0], v_format=pair[1],
    )  # fmt: skip
    problem = case.build()
    k, v, launches = gather_in_formats(problem, 72, **options)
    wrong = _findings(launches)
    contexts = (problem.keys, problem.values)
    for name, out, rows in zip("kv", (k, v), contexts):
        for s, row in enumerate(rows):
            right = np.zeros_like(out[s])
            right[:, : len(row)] = np.moveaxis(row, 0, 1)
            if not np.allclose(out[s], right, rtol=2e-6, atol=2e-6):
                wrong.append(f"{name} of sequence {s}")
    return wrong


def _tokens(shape, seed: int, dtype: str) -> np.ndarray:
    """Random rows with outliers, a constant one and one that is not finite."""
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    x.reshape(-1, shape[-1])[::7] *= 30
    x[0] = 0.25
    x[(-1,) * (len(shape) - 1)][3] = np.nan
    return dtypes.round_to(x, dtype)


def _turned(v: np.ndarray, name: str | None, dtype: str) -> np.ndarray:
    return dtypes.round_to(formats.rotate(v), dtype) if name == "q4" else v


def _stored(x: np.ndarray, name: str | None, dtype: str):
    if name is None:
        return [dtypes.encode(x, dtype)]
    return formats.quantise_tokens(x, _BITS[name], dtype)


def _named(stored: dict):
    for side, parts in stored.items():
        for part, rows in zip(_PARTS, parts):
            yield f"{side}_{part}", rows


def _findings(launches) -> list[str]:
    return [str(error) for launched in launches for error in launched.result.errors]


def _differing(found: dict, expected: dict, dtype: str) -> list[str]:
    def values(array):
        return array if array.dtype == np.uint32 else dtypes.decode(array, dtype)

    return [
        name
        for name, array in found.items()
        if not np.array_equal(
            values(array), values(expected[name]), equal_nan=array.dtype != np.uint32
        )
    ]
