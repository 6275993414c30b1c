"""Token ids and their packed form: little-endian int32, one after the other."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np

from paged_mlx.errors import fail, kind_of

TOKEN_BYTES = 4  # of one packed token

Tokens = Sequence[int] | np.ndarray


def pack_tokens(tokens: Tokens, function: str = "pack_tokens") -> bytes:
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
    except (struct.error, TypeError, ValueError, OverflowError):
        pass
    fail(
        function,
        "tokens must be a sequence of token ids, whole numbers below 2**31",
        _what_is_wrong(tokens),
    )


def _what_is_wrong(tokens: object) -> str:
    for token in tokens if isinstance(tokens, (list, tuple)) else ():
        if not isinstance(token, (int, np.integer)) or not -(2**31) <= token < 2**31:
            return f"{kind_of(token)} in it"
    return kind_of(tokens)


def token_ids(function: str, tokens: Tokens) -> list[int]:
    """Return token ids as ints.

    Raises:
        ValueError: A token is no whole number, or does not fit.
    """
    return list(unpack_tokens(pack_tokens(tokens, function)))


def unpack_tokens(packed: bytes) -> tuple[int, ...]:
    """Undo ``pack_tokens``."""
    return struct.unpack(f"<{len(packed) // TOKEN_BYTES}i", packed)
