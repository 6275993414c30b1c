"""Prompts that begin alike share pages, by themselves.

``PromptPrefixes`` knows which pages hold which tokens; ``prompt_hooks`` asks it wherever
mlx-lm begins, reads or ends a prompt.
"""

import mlx.core as mx
import numpy as np
from mlx_lm.models import cache as stock

from paged_mlx.mlx_lm.cache import PagedKVCache
from paged_mlx.prefix_cache import PrefixCache


class PromptPrefixes:
    """The prefix caches of a model, one for each group of layers, used as one.

    Attributes:
        tokens_asked: Tokens of the prompts begun.
        tokens_reused: How many of them needed no computing.
    """

    def __init__(self, paged):
        self._paged = paged
        self.caches = {
            window: PrefixCache(group.allocator) for window, group in paged.groups.items()
        }
        self.tokens_asked = self.tokens_reused = 0

    def begin(self, tokens: list[int]) -> tuple[list, int]:
        """A prompt cache that holds the longest known beginning of ``tokens``.

        Returns:
            The prompt cache, and how many tokens it holds: less than all.
        """
        prompt_cache = self._paged.make_cache()
        known = self._known(tokens)
        for layer in layers_of(prompt_cache):
            table = layer.rows[0].table
            if not table.num_tokens and known:
                self.caches[layer.group.window].reuse(tokens[: known + 1], table)
            layer.lens = np.array([known], np.int32)
        self.tokens_asked += len(tokens)
        self.tokens_reused += known
        return prompt_cache, known

    def _known(self, tokens) -> int:
        return min(cache.match(tokens).num_tokens for cache in self.caches.values())

    def remember(self, tokens: list[int], prompt_cache: list, row: int = 0) -> None:
        """Let later prompts share the full pages of a sequence that begins with ``tokens``."""
        layers = list(layers_of(prompt_cache))
        length = min([len(tokens), *(int(layer.lens[row]) for layer in layers)])
        for layer in {layer.group.window: layer for layer in layers}.values():
            table = layer.rows[row].table
            if table.allocator is not None:
                self.caches[layer.group.window].insert(tokens[:length], table)

    def read_common(self, prompts: list[list[int]]) -> None:
        """Compute what several of these prompts begin with, once."""
        size = next(iter(self._paged.groups.values())).page_size
        ordered = sorted(prompts)
        for prompt, following in zip(ordered, ordered[1:]):
            common = _common_length(prompt, following) // size * size
            if common > self._known([*prompt[:common], -1]):
                prompt_cache, known = self.begin([*prompt[:common], -1])
                self._paged.model(mx.array([prompt[known:common]]), cache=prompt_cache)
                mx.eval([layer.state for layer in prompt_cache])
                self.remember(prompt[:common], prompt_cache)

    def reset(self) -> None:
        """Forget every page."""
        for cache in self.caches.values():
            cache.reset()

    def __repr__(self):
        pages = {window: cache.num_pages for window, cache in self.caches.items()}
        reused = f"{self.tokens_reused} of {self.tokens_asked} tokens reused"
        return f"PromptPrefixes({reused}, pages {pages})"


def layers_of(prompt_cache):
    """The paged caches in a prompt cache, those inside a CacheList too."""
    for cache in prompt_cache:
        if isinstance(cache, stock.CacheList):
            yield from layers_of(cache.caches)
        elif isinstance(cache, PagedKVCache):
            yield cache


def _common_length(left: list[int], right: list[int]) -> int:
    for i, (a, b) in enumerate(zip(left, right)):
        if a != b:
            return i
    return min(len(left), len(right))
