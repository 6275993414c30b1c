"""The rotation of V: a Walsh-Hadamard transform along head_dim, which is its own inverse.

It spreads a channel that is larger than the others over all of them, so that codes of 4 bits
lose less.
"""

from __future__ import annotations

import mlx.core as mx

from paged_mlx.formats.page_format import rotation_size


def rotate(x: mx.array) -> mx.array:
    """The last axis in blocks of ``rotation_size``, rotated, in float32.

    Natural order; butterflies of distance 1, 2, 4, ..., then a factor of ``size ** -0.5``.
    """
    size = rotation_size(x.shape[-1])
    blocks = x.astype(mx.float32).reshape(-1, size)
    distance = 1
    while distance < size:
        pairs = blocks.reshape(-1, size // (2 * distance), 2, distance)
        a, b = pairs[:, :, 0], pairs[:, :, 1]
        blocks = mx.stack([a + b, a - b], axis=2).reshape(-1, size)
        distance *= 2
    return (blocks * size**-0.5).reshape(x.shape)
