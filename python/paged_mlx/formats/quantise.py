"""The formulas of the formats on MLX's arrays; what the native code computes.

A token or page with a value that is not finite has a scale of NaN where the value is: all that
shares the scale reads as NaN.
"""

from __future__ import annotations

import mlx.core as mx

from paged_mlx.formats.page_format import BITS, group_size

_LEVELS = 15  # of a channel's codes of 4 bits, above the least


def _nan() -> mx.array:
    """NaN by its bits: ``mx.compile`` of mlx 0.31.2 cannot write the number into C++."""
    return mx.array(0x7FC00000, mx.uint32).view(mx.float32)


def quantise_tokens(x: mx.array, name: str) -> tuple[mx.array, mx.array, mx.array]:
    """Codes, scales and biases of ``[..., head_dim]`` by groups of channels: ``mx.quantize``."""
    group = group_size(x.shape[-1])
    codes, scales, biases = mx.quantize(x, group_size=group, bits=BITS[name])
    finite = mx.isfinite(x).reshape(*scales.shape, group).all(-1)
    return codes, mx.where(finite, scales, _nan()).astype(x.dtype), biases


def dequantise_tokens(codes: mx.array, scales: mx.array, biases: mx.array, name: str) -> mx.array:
    """``scale * code + bias`` in float32."""
    bits = BITS[name]
    head_dim = codes.shape[-1] * 32 // bits
    group = head_dim // scales.shape[-1]
    wide = scales.astype(mx.float32), biases.astype(mx.float32)
    return mx.dequantize(codes, *wide, group_size=group, bits=bits)


def quantise_channels(x: mx.array, tokens: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Codes, scales and minima of whole pages ``[pages, heads, page_size, head_dim]``.

    Args:
        tokens: ``int32 [pages]``, how many of each page's tokens count. The codes of the others
            are 0.

    Returns:
        ``uint32 [pages, heads, page_size, head_dim / 8]``, and ``[pages, heads, head_dim]`` twice
        in the dtype of ``x``: ``scale = (max - min) / 15``, each rounded to it.
    """
    counts = (mx.arange(x.shape[2]) < tokens[:, None])[:, None, :, None]
    wide = x.astype(mx.float32)
    least = mx.where(counts, wide, mx.inf).min(2)
    most = mx.where(counts, wide, -mx.inf).max(2)
    finite = (mx.isfinite(wide) | ~counts).all(2) & (least <= most)
    least = mx.where(finite, least, 0.0)
    scales = mx.where(finite, (most - least) / _LEVELS, _nan()).astype(x.dtype)
    scales = mx.where((tokens > 0)[:, None, None], scales, 0).astype(x.dtype)
    biases = least.astype(x.dtype)
    step = scales.astype(mx.float32)[:, :, None]
    codes = mx.round((wide - biases.astype(mx.float32)[:, :, None]) / step)
    codes = mx.clip(codes, 0, _LEVELS)
    known = counts & (step > 0) & mx.isfinite(step)
    codes = mx.where(known, codes, 0).astype(mx.uint32)
    return _packed(codes), scales, biases


def dequantise_channels(codes: mx.array, scales: mx.array, biases: mx.array) -> mx.array:
    """``scale * code + minimum`` in float32, ``[..., heads, page_size, head_dim]``."""
    scale, least = (a.astype(mx.float32)[..., None, :] for a in (scales, biases))
    return scale * _unpacked(codes).astype(mx.float32) + least


def _packed(codes: mx.array) -> mx.array:
    """Eight codes of 4 bits in a word, the first in the lowest bits."""
    nibbles = codes.reshape(*codes.shape[:-1], -1, 8)
    return mx.left_shift(nibbles, mx.arange(0, 32, 4, dtype=mx.uint32)).sum(-1).astype(mx.uint32)


def _unpacked(words: mx.array) -> mx.array:
    nibbles = mx.right_shift(words[..., None], mx.arange(0, 32, 4, dtype=mx.uint32)) & 15
    return nibbles.reshape(*words.shape[:-1], -1)
