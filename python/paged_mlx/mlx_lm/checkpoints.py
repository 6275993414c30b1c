"""States of recurrent layers at known positions of prompts, kept beside cached pages.

Pages can be shared up to any token; a recurrent state is that of one position. A checkpoint
is the states of all recurrent layers after the first tokens of a sequence. It lives in the
prefix cache, beside the last page of those tokens, and leaves with it.
"""

import itertools
from typing import Any
from weakref import WeakSet

import mlx.core as mx
import numpy as np
from mlx_lm.models import cache as stock

from paged_mlx.prefix.cache import PrefixCache

SHARE_OF_CHECKPOINTS = 16  # one in so many bytes of the memory limit

_times = itertools.count(1)


class Checkpoint:
    """The states of a model's recurrent layers, one list of arrays for each.

    Attributes:
        states: The arrays; None once they were given up.
        nbytes: Their bytes.
        hits: How often a prompt began from here.
        last_used: Logical time; larger is later.
    """

    def __init__(self, states: list[list[mx.array | None]]):
        self.states: list[list[mx.array | None]] | None = states
        self.nbytes = sum(x.nbytes for arrays in states for x in arrays if x is not None)
        self.hits = 0
        self.last_used = next(_times)


class Checkpoints:
    """The checkpoints of a model, those never used given up first, then the oldest.

    Args:
        cache: The prefix cache beside whose pages they are kept.
        most_bytes: Bytes that they may take together.
    """

    def __init__(self, cache: PrefixCache, most_bytes: int):
        self._cache = cache
        self._most_bytes = most_bytes
        self._all: WeakSet[Checkpoint] = WeakSet()

    @property
    def nbytes(self) -> int:
        return sum(checkpoint.nbytes for checkpoint in self._all)

    def __len__(self) -> int:
        return len(self._all)

    def longest(self, tokens: list[int], keys=()) -> int:
        """Tokens of the longest beginning of ``tokens``, or all of them, with a checkpoint."""
        return self._find(tokens, keys)[0]

    def _find(self, tokens: list[int], keys) -> tuple[int, Checkpoint | None]:
        kept: list[tuple[int, Any]] = self._cache.kept(tokens, keys)
        usable = [found for found in kept if found[1].states is not None]
        return usable[-1] if usable else (0, None)

    def restore(self, tokens: list[int], keys, prompt_cache: list, row: int) -> None:
        """Put the states after exactly ``tokens`` into one row of a prompt cache."""
        length, checkpoint = self._find(tokens, keys)
        assert length == len(tokens), f"no checkpoint at {len(tokens)}, but at {length}"
        assert checkpoint is not None and checkpoint.states is not None
        checkpoint.hits += 1
        checkpoint.last_used = next(_times)
        for cache, arrays in zip(states_of(prompt_cache), checkpoint.states):
            batch = cache.batch_size
            cache.cache = [
                _with_row(before, array, row, batch) for before, array in zip(cache.cache, arrays)
            ]

    def take(self, tokens: list[int], keys, prompt_cache: list, row: int) -> None:
        """Keep the states after ``tokens``, which one row of a prompt cache holds."""
        if self.longest(tokens, keys) != len(tokens):
            self.keep(tokens, keys, rows_of(prompt_cache, row))

    def keep(self, tokens: list[int], keys, states: list) -> None:
        """Keep the states after ``tokens``."""
        checkpoint = Checkpoint(states)
        if checkpoint.nbytes <= self._most_bytes and self._cache.keep(tokens, checkpoint, keys):
            self._all.add(checkpoint)
            self._give_up_the_least_useful()
        # A later pass may run in another thread, which cannot compute what is pending here.
        mx.async_eval([x for arrays in states for x in arrays if x is not None])

    def _give_up_the_least_useful(self) -> None:
        order = sorted(
            self._all, key=lambda checkpoint: (checkpoint.hits > 0, checkpoint.last_used)
        )
        for checkpoint in order:
            if self.nbytes <= self._most_bytes:
                return
            checkpoint.states = None
            self._all.discard(checkpoint)


def states_of(prompt_cache):
    """The recurrent states in a prompt cache, those inside a CacheList too."""
    for cache in prompt_cache:
        if isinstance(cache, stock.CacheList):
            yield from states_of(cache.caches)
        elif isinstance(cache, stock.ArraysCache):
            yield cache


def rows_of(prompt_cache, row: int) -> list:
    """The states of one row of a prompt cache, in memory of their own."""
    return [
        [None if array is None else _row(array, row) for array in cache.cache]
        for cache in states_of(prompt_cache)
    ]


def _row(array: mx.array, row: int) -> mx.array:
    return mx.array(array) if array.shape[0] == 1 else mx.take(array, mx.array([row]), axis=0)


def _with_row(before: mx.array | None, array: mx.array | None, row: int, batch: int):
    """A batch's array with one row replaced; under a name of its own, since a model may assign
    to parts of it."""
    if array is None or batch == 1:
        return None if array is None else mx.array(array)
    if before is None:
        before = mx.zeros((batch, *array.shape[1:]), array.dtype)
    return mx.concatenate([before[:row], array, before[row + 1 :]])


# Padding


def padding_is_seen(model, make_cache) -> bool:
    """Whether padding after a short prompt of a batch changes the model's recurrent states.

    mlx-lm pads on the right; some models then go on into the padding. One pass of two short
    prompts tells.
    """
    alone, batch = make_cache(), _merged([make_cache(), make_cache()])
    outputs = [model(mx.array([[1, 2]]), cache=alone)]
    for cache in batch:
        cache.prepare(lengths=[2, 4], right_padding=[2, 0])
    outputs.append(model(mx.array([[1, 2, 0, 0], [1, 2, 3, 4]]), cache=batch))
    for cache in batch:
        cache.finalize()
    mx.eval(outputs)  # wholly: other ranks wait for what this one sends
    pairs = [
        (expected, found[:1])
        for ours, theirs in zip(states_of(alone), states_of(batch))
        for expected, found in zip(ours.cache, theirs.cache)
        if expected is not None
    ]
    return not all(_close(expected, found) for expected, found in pairs)


def _merged(caches: list[list]) -> list:
    return [layer[0].merge(list(layer)) for layer in zip(*caches)]


def _close(expected: mx.array, found: mx.array) -> bool:
    """Equal but for rounding, of a batch against a single row in the model's precision."""
    if expected.shape != found.shape:
        return False
    one, other = (np.array(x.astype(mx.float32)) for x in (expected, found))
    return bool(np.abs(one - other).max() <= 0.03 * np.abs(one).max() + 1e-6)
