"""Prompts that begin alike share pages: which pages hold which tokens."""

import logging
from typing import TypeAlias

from mlx_lm.models import cache as stock

from paged_mlx.errors import fail
from paged_mlx.forward.identity import Identity
from paged_mlx.mlx_lm.cache import PagedKVCache
from paged_mlx.mlx_lm.checkpoints import Checkpoints
from paged_mlx.mlx_lm.counted_states import CountedStates
from paged_mlx.pages.table import PageTable
from paged_mlx.prefix.cache import PrefixCache
from paged_mlx.prefix.hash import ExtraKey

log = logging.getLogger("paged_mlx")

Key: TypeAlias = str | bytes | int | tuple[ExtraKey, ...] | None

NO_TOKEN = -1  # a token that no prompt has: after it nothing is left to compute


class PromptPrefixes:
    """The prefix caches of a model, one for each group of layers, used as one.

    Attributes:
        caches: One PrefixCache for each window.
        checkpoints: Those of the recurrent layers, if the model has any; else None.
        tokens_asked: Tokens of the prompts begun.
        tokens_reused: How many of them needed no computing.
        declined: Why prompts were not looked for or not remembered, and how often.
    """

    def __init__(self, paged):
        self._paged = paged
        self._passes = paged.passes
        self._ranks = paged.ranks
        self.caches = {
            window: PrefixCache(group.allocator, window=window)
            for window, group in paged.groups.items()
        }
        self.checkpoints = None
        if paged.has_states:
            beside = self.caches.get(None) or next(iter(self.caches.values()))
            self.checkpoints = Checkpoints(beside, paged.checkpoint_bytes)
        self.tokens_asked = self.tokens_reused = 0
        self.declined: dict[str, int] = {}
        self.generation = 0
        self.identity = Identity(paged.model, paged.ranks.place)
        paged.passes.on_retired = self._remember_retired

    # Finding

    def known(self, tokens: list[int], keys=()) -> int:
        """Length of the longest beginning, less than all, that nothing need be computed of."""
        with self._passes.turn:
            self.notice_changes()
            self._passes.reclaim()
            for sequence in list(self._passes.sequences):
                self._remember_running(sequence)
            return self._ranks.longest(
                tokens, lambda begun: self._longest(begun, keys, self.checkpoints)
            )

    def parting(self, tokens: list[int], keys=()) -> int:
        """Where ``tokens`` part from those whose pages are known: a good place for a checkpoint."""
        with self._passes.turn:
            return self._ranks.least("parting", self._longest(tokens, keys, None))[0]

    def _longest(self, tokens: list[int], keys, checkpoints: Checkpoints | None) -> int:
        length = max(0, len(tokens) - 1)
        while length:
            begun = tokens[: length + 1]
            found = min(cache.match(begun, keys).num_tokens for cache in self.caches.values())
            if checkpoints is not None:
                found = checkpoints.longest(tokens[:found], keys)
            if found == length:
                break
            length = found
        return length

    def begin(self, tokens: list[int], prompt_cache: list, row: int = 0) -> int:
        """Have one row of a prompt cache hold the longest known beginning of ``tokens``, if that
        is more than it holds.

        Returns:
            How many tokens it holds then: less than all.
        """
        with self._passes.turn:
            layers = list(layers_of(prompt_cache))
            sequence = layers[0].rows[row]
            keys, held = sequence.history.keys, int(layers[0].lens[row])
            known = self.known(tokens, keys)
            if known <= held:
                return held
            self._passes.begins(layers[0].group.window)
            self._ranks.end_lease()
            self._adopt(sequence, tokens, known)
            lens = layers[0].lens.copy()
            lens[row] = known
            for layer in layers:
                layer.hold(layer.rows, lens)
            if self.checkpoints is not None:
                self.checkpoints.restore(tokens[:known], keys, prompt_cache, row)
            return known

    def _adopt(self, sequence, tokens: list[int], known: int) -> None:
        """Replace a sequence's pages by those of the first ``known`` of ``tokens``."""
        for window, cache in self.caches.items():
            table = PageTable(sequence.tables[window].page_size)
            found = cache.reuse(tokens[: known + 1], table, sequence.history.keys)
            assert found == known, f"{found} of {known} tokens found again"
            sequence.tables[window].release()
            sequence.tables[window] = table
            sequence.first_token[window] = 0
        sequence.rename()
        sequence.history.truncate(0)
        sequence.history.add(0, tokens[:known])
        sequence.history.remembered, sequence.history.generation = known, self.generation

    def count(self, asked: int, reused: int) -> None:
        self.tokens_asked += asked
        self.tokens_reused += reused

    def decline(self, reason: str) -> None:
        """Count a prompt that is left alone."""
        self.declined[reason] = self.declined.get(reason, 0) + 1

    # Remembering

    def remember(self, tokens: list[int], prompt_cache: list, row: int = 0, finished=False) -> None:
        """Let later prompts begin with the pages of one row, which holds ``tokens``.

        Args:
            finished: Nothing will be appended: remember the last page too, part-filled.

        Raises:
            ValueError: The row is known to hold other tokens, or another number of them.
        """
        with self._passes.turn:
            self.notice_changes()
            layers = list(layers_of(prompt_cache))
            sequence = layers[0].rows[row]
            held = {int(layer.lens[row]) for layer in layers}
            if len(held) > 1 or max(held) < len(tokens):
                must = f"tokens must be those that prompt_cache holds, {sorted(held)}"
                fail("remember", must, len(tokens))
            is_all = held == {len(tokens)}
            history = sequence.history
            if history.generation != self.generation and len(history):
                return self.decline("the model has changed since the prompt began")
            if sequence.broken is not None:
                return self.decline("a pass over the tokens failed")
            length = min(len(history), len(tokens))
            if history.first(length) not in (None, tokens[:length]):
                fail("remember", "tokens must be those that were read into prompt_cache", "others")
            if length < len(tokens):
                history.add(length, tokens[length:])
            history.generation = self.generation
            self._insert(history, sequence.tables, len(tokens), finished and is_all)
            if self.checkpoints is not None and tokens and is_all:
                self.checkpoints.take(tokens, history.keys, prompt_cache, row)

    def _insert(self, history, tables: dict, length: int, finished: bool) -> None:
        tokens = history.first(length)
        for window, table in tables.items():
            if table.allocator is not None and tokens:
                self.caches[window].insert(tokens, table, history.keys, tail=finished)
        history.remembered = length
        if self.checkpoints is not None and history.states is not None:
            position, states = history.states
            if position <= length:
                self.checkpoints.keep(tokens[:position], history.keys, states)
                history.states = None

    def _remember_running(self, sequence) -> None:
        """Let others begin with the full pages of an answer that is still being given."""
        history = sequence.history
        size = next(iter(sequence.tables.values())).page_size
        if len(history) - history.remembered >= size and history.generation == self.generation:
            most = min(table.num_tokens for table in sequence.tables.values())
            length = min(most, len(history.computed())) // size * size
            if length > history.remembered and sequence.broken is None:
                self._insert(history, sequence.tables, length, finished=False)

    def _remember_retired(self, tables: dict, history) -> None:
        """Keep what a sequence that is gone has computed."""
        self.notice_changes()
        if history.generation == self.generation:
            most = min(table.num_tokens for table in tables.values())
            length = min(most, len(history.computed()))
            if length > history.remembered:
                self._insert(history, tables, length, finished=True)

    # Forgetting

    def reset(self) -> None:
        """Forget every page, and what sequences that are there began with."""
        with self._passes.turn:
            self.generation += 1
            for cache in self.caches.values():
                cache.reset()

    def notice_changes(self) -> None:
        """Forget everything if K and V of the model are others now."""
        if self.identity.has_changed():
            self.reset()
            self.identity = Identity(self._paged.model, self._ranks.place)

    def __repr__(self):
        pages = {window: cache.num_pages for window, cache in self.caches.items()}
        kept = "" if self.checkpoints is None else f", {len(self.checkpoints)} checkpoints"
        reused = f"{self.tokens_reused} of {self.tokens_asked} tokens reused"
        return f"PromptPrefixes({reused}, pages {pages}{kept})"


def keys_of(function: str, key: Key) -> tuple:
    """What ``key`` of a tenant, an adapter or a salt adds to every page's hash."""
    if key is None or isinstance(key, tuple) and all(isinstance(part, ExtraKey) for part in key):
        return key or ()
    if not isinstance(key, (str, bytes, int)) or isinstance(key, bool):
        fail(function, "key must be a string, bytes, a whole number or a tuple of ExtraKeys", key)
    return (ExtraKey("key", key),)


def layers_of(prompt_cache):
    """The paged caches in a prompt cache, those inside a CacheList too."""
    for cache in prompt_cache or ():
        if isinstance(cache, stock.CacheList):
            yield from layers_of(cache.caches)
        elif isinstance(cache, CountedStates):
            yield cache.tokens
        elif isinstance(cache, PagedKVCache):
            yield cache
