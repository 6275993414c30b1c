"""K, or V, of a layer as a format stores it: what its pages read as, and what a write makes of tokens."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from paged_mlx.formats.page_format import PageFormats, sides_of
from paged_mlx.formats.quantise import (
    dequantise_channels,
    dequantise_tokens,
    quantise_channels,
    quantise_tokens,
)
from paged_mlx.formats.rotation import rotate


class Stored:
    """One side of a layer.

    Args:
        arrays: Its pages, or their codes, scales and biases.
        name: Its format.
        is_key: Whether it is K.
        opened: The open pages, where there are any: ids from ``num_pages`` on.

    Attributes:
        num_pages, num_kv_heads, page_size, dim: Sizes of the pages.
        dtype: Of K and V.
    """

    def __init__(
        self, arrays: list[mx.array], name: str | None, is_key: bool, opened: mx.array | None
    ) -> None:
        self.arrays, self.name, self.opened = arrays, name, opened
        self.by_channel = is_key and name == "q4"
        self.is_rotated = not is_key and name == "q4"
        self.dtype = arrays[-1].dtype
        self.num_pages, self.num_kv_heads, self.page_size, width = arrays[0].shape
        self.dim = width if name is None else width * (4 if name == "q8" else 8)

    def read(self, page_ids: mx.array) -> mx.array:
        """``[*page_ids, num_kv_heads, page_size, dim]`` in float32, rotated where V is; any id is
        taken for one that there is."""
        closed = mx.clip(page_ids, 0, self.num_pages - 1)
        parts = [array[closed] for array in self.arrays]
        if self.name is None:
            found = parts[0].astype(mx.float32)
        elif self.by_channel:
            found = dequantise_channels(*parts)
        else:
            codes, scales, biases = parts
            found = dequantise_tokens(codes, scales, biases, self.name)
        if self.opened is not None:
            slots = mx.clip(page_ids - self.num_pages, 0, self.opened.shape[0] - 1)
            is_open = (page_ids >= self.num_pages)[..., None, None, None]
            found = mx.where(is_open, self.opened[slots].astype(mx.float32), found)
        return found

    def pages(self, page_ids: np.ndarray) -> mx.array:
        """K or V of some pages, in its dtype, rotated back."""
        found = self.read(mx.array(page_ids))
        return (rotate(found) if self.is_rotated else found).astype(self.dtype)

    def prepared(self, x: mx.array) -> mx.array:
        """Tokens as they are quantised, or written to open pages."""
        return rotate(x).astype(self.dtype) if self.is_rotated else x

    def encode_tokens(self, x: mx.array) -> list[mx.array]:
        """What is stored of prepared tokens, ``[..., dim]``, whose format is one of tokens."""
        return [x] if self.name is None else list(quantise_tokens(x, self.name))

    def encode_pages(self, x: mx.array, tokens: mx.array) -> list[mx.array]:
        """What is stored of prepared pages ``[pages, num_kv_heads, page_size, dim]``."""
        return list(quantise_channels(x, tokens)) if self.by_channel else self.encode_tokens(x)


def stored(pages: list[mx.array], formats: PageFormats) -> tuple[Stored, Stored]:
    """K and V of a layer."""
    sides = sides_of(pages, formats)
    opened = sides.open or [None, None]
    return (
        Stored(sides.k, formats[0], True, opened[0]),
        Stored(sides.v, formats[1], False, opened[1]),
    )
