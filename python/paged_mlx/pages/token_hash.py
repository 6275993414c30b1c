"""What a sequence leaves behind: after each token a mark that depends on all tokens so far."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from paged_mlx.prefix.hash import Tokens, pack_tokens

_FACTOR = 0x9E3779B97F4A7C15  # odd, so that it has an inverse
_STEP = 0xD1B54A32D192ED03
_BITS = 2**64


class Trail:
    """The tokens of one sequence and the mark after each; see ``Canary.trail``.

    Args:
        numbers: Where the sequence's number, and those of its forks, come from.
    """

    def __init__(self, numbers: Iterator[int]) -> None:
        self.sequence = next(numbers)
        self._numbers = numbers
        self._length = 0
        self._marks = np.empty(16, np.uint64)
        self._tokens = np.empty(16, np.int32)

    def __len__(self) -> int:
        return self._length

    @property
    def marks(self) -> np.ndarray:
        """The mark after each token, ``uint64``."""
        return self._marks[: self._length]

    @property
    def tokens(self) -> np.ndarray:
        """The tokens, ``int32``."""
        return self._tokens[: self._length]

    def extend(self, tokens: Tokens) -> np.ndarray:
        """Append tokens; return their marks."""
        added = np.frombuffer(pack_tokens(tokens), "<i4")
        start, end = self._length, self._length + len(added)
        self._reserve(end)
        last = int(self._marks[start - 1]) if start else 0
        self._tokens[start:end] = added
        self._marks[start:end] = _marks_after(last, added)
        self._length = end
        return self._marks[start:end]

    def _reserve(self, length: int) -> None:
        if length > len(self._marks):
            self._marks = np.resize(self._marks, 2 * length)
            self._tokens = np.resize(self._tokens, 2 * length)

    def fork(self, length: int | None = None) -> Trail:
        """Return the trail of a sequence that begins with the first ``length`` tokens."""
        child = Trail(self._numbers)
        child._length = self._length if length is None else min(length, self._length)
        child._marks, child._tokens = self._marks.copy(), self._tokens.copy()
        return child

    def truncate(self, length: int) -> None:
        """Forget the tokens from ``length`` on."""
        self._length = min(length, self._length)


def _marks_after(last: int, tokens: np.ndarray) -> np.ndarray:
    """Return mark[i] = (mark[i - 1] + token[i] + step) * factor, modulo 2**64, without a loop.

    With f the factor, mark[i] = f**(i + 1) * (last + sum over j <= i of (token[j] + step) / f**j).
    """
    count = len(tokens)
    powers = np.cumprod(np.full(count, _FACTOR, np.uint64))
    inverses = np.full(count, pow(_FACTOR, -1, _BITS), np.uint64)
    inverses[:1] = 1
    terms = (tokens.astype(np.uint64) + np.uint64(_STEP)) * np.cumprod(inverses)
    return powers * (np.uint64(last) + np.cumsum(terms))


def extend_all(trails: Sequence[Trail], tokens: Sequence[Tokens]) -> np.ndarray:
    """``extend`` different trails by tokens of their own; return the marks, one after the other."""
    if any(len(added) != 1 for added in tokens):
        return np.concatenate([trail.extend(added) for trail, added in zip(trails, tokens)])
    added = np.frombuffer(pack_tokens([token for (token,) in tokens]), "<i4")
    for trail in trails:
        trail._reserve(trail._length + 1)
    last = [trail._marks[trail._length - 1] if trail._length else 0 for trail in trails]
    marks = np.array(last, np.uint64) + added.astype(np.uint64) + np.uint64(_STEP)
    marks *= np.uint64(_FACTOR)
    for trail, token, mark in zip(trails, added, marks):
        trail._tokens[trail._length], trail._marks[trail._length] = token, mark
        trail._length += 1
    return marks
