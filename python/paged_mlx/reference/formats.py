"""The formats of pages in numpy, from their definitions: the oracle of codes and of what they read as.

Arrays are stored (see ``dtypes``). Nothing here is shared with the formulas on MLX's arrays.
"""

from __future__ import annotations

import numpy as np

from . import dtypes

_EPSILON = np.float32(1e-7)


def group_of(head_dim: int) -> int:
    """Channels that share a token's scale."""
    return 64 if head_dim % 64 == 0 else 32


def rotate(x: np.ndarray) -> np.ndarray:
    """``x [..., head_dim]`` rotated in float32, butterfly by butterfly."""
    x = np.asarray(x, np.float32)
    head_dim = x.shape[-1]
    size = head_dim if head_dim & (head_dim - 1) == 0 else 64
    out = x.copy()
    distance = 1
    with np.errstate(invalid="ignore", over="ignore"):
        while distance < size:
            for i in range(0, head_dim, 2 * distance):
                low, high = slice(i, i + distance), slice(i + distance, i + 2 * distance)
                a, b = out[..., low].copy(), out[..., high].copy()
                out[..., low], out[..., high] = a + b, a - b
            distance *= 2
        return out * np.float32(size**-0.5)


def quantise_tokens(x: np.ndarray, bits: int, dtype: str):
    """``(codes, scales, biases)`` of ``x [..., head_dim]`` as float32, MLX's affine rule.

    The edge that is farther from 0 is hit exactly, and so is 0 itself as near as a code is.
    """
    group = group_of(x.shape[-1])
    levels = np.float32(2**bits - 1)
    groups = np.asarray(x, np.float32).reshape(*x.shape[:-1], -1, group)
    with np.errstate(all="ignore"):
        least, most = np.fmin.reduce(groups, -1), np.fmax.reduce(groups, -1)
        least, most = (
            np.where(np.isnan(least), np.inf, least),
            np.where(np.isnan(most), -np.inf, most),
        )
        below = np.abs(least) > np.abs(most)
        scale = np.fmax((most - least) / levels, _EPSILON)
        scale = np.where(below, scale, -scale)
        edge = np.where(below, least, most)
        steps = np.rint(edge / scale)
        bias = np.where(steps != 0, edge, np.float32(0))
        scale = np.where(steps != 0, edge / steps, scale)
        codes = np.rint((groups - bias[..., None]) / scale[..., None])
        codes = np.clip(np.nan_to_num(codes, nan=0.0), 0, levels)
        scale = np.where(np.isfinite(groups).all(-1), scale, np.float32(np.nan))
    words = pack(codes.reshape(x.shape).astype(np.uint32), bits)
    return words, dtypes.encode(scale, dtype), dtypes.encode(bias, dtype)


def dequantise_tokens(words, scales, biases, bits: int, dtype: str) -> np.ndarray:
    """What codes read as, float32 ``[..., head_dim]``."""
    codes = unpack(words, bits).astype(np.float32)
    scale, bias = (dtypes.decode(a, dtype) for a in (scales, biases))
    group = codes.shape[-1] // scale.shape[-1]
    with np.errstate(all="ignore"):
        return np.repeat(scale, group, -1) * codes + np.repeat(bias, group, -1)


def quantise_channels(x: np.ndarray, tokens: np.ndarray, dtype: str):
    """``(codes, scales, minima)`` of pages ``[pages, heads, page_size, head_dim]`` as float32."""
    pages, heads, page_size, head_dim = x.shape
    codes = np.zeros(x.shape, np.uint32)
    scales = np.zeros((pages, heads, head_dim), np.float32)
    minima = np.zeros((pages, heads, head_dim), np.float32)
    for page, head in np.ndindex(pages, heads):
        held = np.asarray(x[page, head, : tokens[page]], np.float32)
        if not len(held):
            continue
        for channel in range(head_dim):
            column = held[:, channel]
            if not np.isfinite(column).all():
                scales[page, head, channel] = np.nan
                continue
            with np.errstate(all="ignore"):
                step = (column.max() - column.min()) / np.float32(15)
                step, least = dtypes.round_to(np.array([step, column.min()]), dtype)
                scales[page, head, channel], minima[page, head, channel] = step, least
                if step > 0 and np.isfinite(step):
                    code = np.clip(np.rint((column - least) / step), 0, 15)
                    codes[page, head, : len(held), channel] = code.astype(np.uint32)
    return pack(codes, 4), dtypes.encode(scales, dtype), dtypes.encode(minima, dtype)


def dequantise_channels(words, scales, minima, dtype: str) -> np.ndarray:
    """What the codes of pages read as, float32."""
    scale, least = (dtypes.decode(a, dtype)[:, :, None] for a in (scales, minima))
    with np.errstate(all="ignore"):
        return scale * unpack(words, 4).astype(np.float32) + least


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes in words of 32 bits, the first in the lowest."""
    words = codes.reshape(*codes.shape[:-1], -1, 32 // bits).astype(np.uint64)
    shifted = words << (np.arange(32 // bits, dtype=np.uint64) * np.uint64(bits))
    return np.bitwise_or.reduce(shifted, -1).astype(np.uint32)


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """The codes of words."""
    shifts = np.arange(32 // bits, dtype=np.uint32) * np.uint32(bits)
    return ((words[..., None] >> shifts) & np.uint32(2**bits - 1)).reshape(*words.shape[:-1], -1)
