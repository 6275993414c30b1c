"""Prompts that begin alike share pages, by themselves.

``PromptPrefixes`` knows which pages hold which tokens; ``prompt_hooks`` asks it wherever
mlx-lm begins, reads or ends a prompt.
"""

import hashlib
import logging
import weakref

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models import cache as stock

from paged_mlx.device_memory import memory_limit
from paged_mlx.mlx_lm.cache import PagedKVCache
from paged_mlx.mlx_lm.checkpoints import Checkpoints, padding_is_seen, states_of
from paged_mlx.prefix.cache import PrefixCache

log = logging.getLogger("paged_mlx")

SHARE_OF_CHECKPOINTS = 16  # one in so many bytes of the memory limit


class PromptPrefixes:
    """The prefix caches of a model, one for each group of layers, used as one.

    Attributes:
        caches: One PrefixCache for each window.
        checkpoints: Those of the recurrent layers, if the model has any; else None.
        tokens_asked: Tokens of the prompts begun.
        tokens_reused: How many of them needed no computing.
    """

    def __init__(self, paged):
        self._paged = paged
        self._lock = next(iter(paged.groups.values())).passes.lock
        self.caches = {
            window: PrefixCache(group.allocator, window=window)
            for window, group in paged.groups.items()
        }
        self.checkpoints = None
        if any(True for _ in states_of(paged.stock_cache())):
            beside = self.caches.get(None) or next(iter(self.caches.values()))
            self.checkpoints = Checkpoints(beside, memory_limit() // SHARE_OF_CHECKPOINTS)
        self.tokens_asked = self.tokens_reused = 0
        self._weights = Weights(paged.model)
        self._padding_is_seen = None

    # Finding

    def begin(self, tokens: list[int], prompt_cache: list) -> int:
        """Let an empty prompt cache begin with the longest known beginning of ``tokens``.

        Returns:
            How many tokens it holds then: less than all.
        """
        with self._lock:
            return self._begin(tokens, prompt_cache)

    def _begin(self, tokens: list[int], prompt_cache: list) -> int:
        known = self.known(tokens)
        layers = list(layers_of(prompt_cache))
        for row in rows_of(layers, 0):
            if known:
                found = self.caches[row.group.window].reuse(tokens[: known + 1], row.table)
                assert found == known, f"{found} of {known} tokens found again"
            row.tell(tokens[:known])
            row.stale = False
        lens = np.array([known], np.int32)
        for layer in layers:
            layer.lens = lens
        if self.checkpoints is not None and known:
            self.checkpoints.restore(tokens[:known], prompt_cache)
        return known

    def count(self, asked: int, reused: int) -> None:
        self.tokens_asked += asked
        self.tokens_reused += reused

    def known(self, tokens: list[int]) -> int:
        """Length of the longest beginning, less than all, that nothing need be computed of."""
        with self._lock:
            self._forget_other_weights()
            return self._longest(tokens, self.checkpoints)

    def parting(self, tokens: list[int]) -> int:
        """Where ``tokens`` part from those whose pages are known: a good place for a checkpoint."""
        with self._lock:
            return self._longest(tokens, None)

    def _longest(self, tokens: list[int], checkpoints: Checkpoints | None) -> int:
        length = max(0, len(tokens) - 1)
        while length:
            begun = tokens[: length + 1]
            found = min(cache.match(begun).num_tokens for cache in self.caches.values())
            if checkpoints is not None:
                found = checkpoints.longest(tokens[:found])
            if found == length:
                break
            length = found
        return length

    # Remembering

    def remember(
        self, tokens: list[int], prompt_cache: list, row: int = 0, finished: bool = False
    ) -> None:
        """Let later prompts begin with the pages of one row, which holds ``tokens``.

        Nothing is remembered of a row that holds another number of tokens, or began with
        others.

        Args:
            finished: Nothing will be appended: remember the last page too, part-filled.
        """
        with self._lock:
            self._remember(tokens, prompt_cache, row, finished)

    def _remember(self, tokens: list[int], prompt_cache: list, row: int, finished: bool) -> None:
        self._forget_other_weights()
        layers = list(layers_of(prompt_cache))
        lens = {int(layer.lens[row]) for layer in layers}
        rows = rows_of(layers, row)
        if any(each.stale for each in rows):
            return
        if lens != {len(tokens)} or not all(_begins_with_told(tokens, each) for each in rows):
            return
        for each in rows:
            if each.table.allocator is not None:
                self.caches[each.group.window].insert(tokens, each.table, tail=finished)
            each.tell(tokens)
        if self.checkpoints is not None and tokens:
            self.checkpoints.take(tokens, prompt_cache, row)

    def padding_is_seen(self) -> bool:
        """Whether the model's recurrent states are wrong in a batch that mlx-lm has padded."""
        if self._padding_is_seen is None:
            self._padding_is_seen = self.checkpoints is not None and padding_is_seen(
                self._paged.model, self._paged.stock_cache
            )
            if self._padding_is_seen:
                log.warning(
                    "%s goes on into the padding of a batch: its prompts are shared in "
                    "single generation alone",
                    type(self._paged.model).__module__,
                )
        return self._padding_is_seen

    # Forgetting

    def reset(self) -> None:
        """Forget every page, and what sequences that are there began with."""
        with self._lock:
            for window, cache in self.caches.items():
                cache.reset()
                for sequence in self._paged.groups[window].sequences:
                    sequence.told, sequence.stale = b"", True

    def _forget_other_weights(self) -> None:
        if self._weights.have_changed():
            self.reset()
            self._padding_is_seen = None
            self._weights = Weights(self._paged.model)

    def __repr__(self):
        pages = {window: cache.num_pages for window, cache in self.caches.items()}
        kept = "" if self.checkpoints is None else f", {len(self.checkpoints)} checkpoints"
        reused = f"{self.tokens_reused} of {self.tokens_asked} tokens reused"
        return f"PromptPrefixes({reused}, pages {pages}{kept})"


class Weights:
    """The arrays that K and V were computed with; not held."""

    def __init__(self, model):
        self._model = weakref.ref(model)
        self._arrays = [weakref.ref(array) for _, array in tree_flatten(model.parameters())]

    def have_changed(self) -> bool:
        """Whether the model has others now."""
        arrays = [array for _, array in tree_flatten(self._model().parameters())]
        return len(arrays) != len(self._arrays) or any(
            before() is not now for before, now in zip(self._arrays, arrays)
        )


def fingerprint(model) -> str:
    """What tells a model's weights from others: names, shapes, dtypes and the first bytes."""
    digest = hashlib.sha256()
    weights = sorted(tree_flatten(model.parameters()))
    firsts = [array.reshape(-1)[:16].view(mx.uint8) for _, array in weights]
    mx.eval(firsts)
    for (name, array), first in zip(weights, firsts):
        digest.update(f"{name} {array.shape} {array.dtype} {first.tolist()}\n".encode())
    return digest.hexdigest()


def layers_of(prompt_cache):
    """The paged caches in a prompt cache, those inside a CacheList too."""
    for cache in prompt_cache:
        if isinstance(cache, stock.CacheList):
            yield from layers_of(cache.caches)
        elif isinstance(cache, PagedKVCache):
            yield cache


def rows_of(layers, row: int) -> list:
    """The SequencePages of one row, one for each group of layers."""
    return list({id(layer.rows[row]): layer.rows[row] for layer in layers}.values())


def _begins_with_told(tokens: list[int], row) -> bool:
    told = len(row.told) // 4
    return told <= len(tokens) and row.all_told(told) == tokens[:told]
