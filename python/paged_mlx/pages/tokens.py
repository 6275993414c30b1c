"""Token ids and their packed form: little-endian int32, one after the other."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np

from paged_mlx.errors import fail

TOKEN_BYTES = 4  # of one packed token

Tokens = Sequence[int] | np.ndarray


def pack_tokens(tokens: Tokens) -> bytes:
    """Return token ids as little-endian int32.

    Raises:
        ValueError: A token is no whole number, or does not fit.
    """
    try:
        if isinstance(tokens, (list, tuple)):
            return struct.pack(f"<{len(tokens)}i", *tokens)
        array = np.asarray(tokens)
        if array.ndim == 1 and (array.dtype.kind in "iu" or not array.size):
            packed = array.astype("<i4", copy=False)
            if array.dtype == packed.dtype or (packed == array).all():
                return packed.tobytes()
    except (struct.error, TypeError, ValueError):
        pass
    fail(
        "pack_tokens",
        "tokens must be a sequence of token ids, whole numbers below 2**31",
        "something else",
    )


def unpack_tokens(packed: bytes) -> tuple[int, ...]:
    """Undo ``pack_tokens``."""
    return struct.unpack(f"<{len(packed) // TOKEN_BYTES}i", packed)
