"""A rolling hash of a sequence's tokens: 64 bits after each token, of all tokens so far."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from paged_mlx.pages.tokens import Tokens, pack_tokens

_FACTOR = 0x9E3779B97F4A7C15  # odd, so that it has an inverse
_STEP = 0xD1B54A32D192ED03
_BITS = 2**64


class RollingHash:
    """The tokens of one sequence and the hash after each.

    Args:
        numbers: Where the sequence's number, and those of its forks, come from.

    Attributes:
        sequence: The sequence's number.
    """

    def __init__(self, numbers: Iterator[int]) -> None:
        self.sequence = next(numbers)
        self._numbers = numbers
        self._length = 0
        self._hashes = np.empty(16, np.uint64)
        self._tokens = np.empty(16, np.int32)

    def __len__(self) -> int:
        return self._length

    def __repr__(self) -> str:
        return f"RollingHash(sequence {self.sequence}, {self._length} tokens)"

    @property
    def hashes(self) -> np.ndarray:
        """The hash after each token, ``uint64``."""
        return self._hashes[: self._length]

    @property
    def tokens(self) -> np.ndarray:
        """The tokens, ``int32``."""
        return self._tokens[: self._length]

    def extend(self, tokens: Tokens) -> np.ndarray:
        """Append tokens; return their hashes."""
        added = np.frombuffer(pack_tokens(tokens), "<i4")
        last = int(self._hashes[self._length - 1]) if self._length else 0
        return self.put(added, _hashes_after(last, added))

    def put(self, tokens: np.ndarray, hashes: np.ndarray) -> np.ndarray:
        """Append tokens whose hashes are known; return these."""
        start, end = self._length, self._length + len(tokens)
        if end > len(self._hashes):
            self._hashes = np.resize(self._hashes, 2 * end)
            self._tokens = np.resize(self._tokens, 2 * end)
        self._tokens[start:end], self._hashes[start:end] = tokens, hashes
        self._length = end
        return hashes

    def fork(self, length: int | None = None) -> RollingHash:
        """Return the hash of a sequence that begins with the first ``length`` tokens."""
        child = RollingHash(self._numbers)
        child._length = self._length if length is None else min(length, self._length)
        child._hashes, child._tokens = self._hashes.copy(), self._tokens.copy()
        return child

    def truncate(self, length: int) -> None:
        """Forget the tokens from ``length`` on."""
        self._length = min(length, self._length)


def _hashes_after(last: int, tokens: np.ndarray) -> np.ndarray:
    """Return hash[i] = (hash[i - 1] + token[i] + step) * factor, modulo 2**64, without a loop.

    With f the factor, hash[i] = f**(i + 1) * (last + sum over j <= i of (token[j] + step) / f**j).
    """
    count = len(tokens)
    powers = np.cumprod(np.full(count, _FACTOR, np.uint64))
    inverses = np.full(count, pow(_FACTOR, -1, _BITS), np.uint64)
    inverses[:1] = 1
    terms = (tokens.astype(np.uint64) + np.uint64(_STEP)) * np.cumprod(inverses)
    return powers * (np.uint64(last) + np.cumsum(terms))


def extend_all(sequences: Sequence[RollingHash], tokens: Sequence[Tokens]) -> np.ndarray:
    """``extend`` different hashes by tokens of their own; return theirs, one after the other."""
    if any(len(added) != 1 for added in tokens):
        return np.concatenate([one.extend(added) for one, added in zip(sequences, tokens)])
    added = np.frombuffer(pack_tokens([token for (token,) in tokens]), "<i4")
    last = [one.hashes[-1] if len(one) else 0 for one in sequences]
    hashes = np.array(last, np.uint64) + added.astype(np.uint64) + np.uint64(_STEP)
    hashes *= np.uint64(_FACTOR)
    for row, one in enumerate(sequences):
        one.put(added[row : row + 1], hashes[row : row + 1])
    return hashes
