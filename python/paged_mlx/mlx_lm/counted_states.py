"""The caches of a rank that has recurrent layers alone, of a model in a pipeline.

The other ranks keep K and V of a sequence's tokens in pages; this one counts the same tokens, in
pages without bytes, so that it knows which prompts its states are of.
"""

from mlx_lm.models import cache as stock

from paged_mlx.mlx_lm.cache import PagedKVCache


class CountedStates(stock.ArraysCache):
    """The states of a recurrent layer, and beside them the sequences of all layers.

    Attributes:
        tokens: A paged cache of no layer, into which no K and V are written.
    """

    tokens: PagedKVCache

    @classmethod
    def of(cls, states: stock.ArraysCache, tokens: PagedKVCache) -> "CountedStates":
        counted = cls.__new__(cls)
        counted.__dict__.update(states.__dict__)
        counted.tokens = tokens
        return counted

    def plain(self) -> stock.ArraysCache:
        """mlx-lm's own cache of the same states."""
        states = stock.ArraysCache(len(self.cache))
        states.__dict__.update(self.__dict__)
        del states.__dict__["tokens"]
        return states

    # The batch

    @classmethod
    def merge(cls, caches):
        merged = super().merge(caches)
        return cls.of(merged, PagedKVCache.merge([cache.tokens for cache in caches]))

    def extract(self, idx):
        return self.of(super().extract(idx), self.tokens.extract(idx))

    def filter(self, batch_indices):
        super().filter(batch_indices)
        self.tokens.filter(batch_indices)

    def extend(self, other):
        super().extend(other)
        self.tokens.extend(other.tokens)

    def prepare(self, **lengths):
        super().prepare(**lengths)
        self.tokens.prepare(**lengths)

    def finalize(self):
        super().finalize()
        self.tokens.finalize()


# Files name the class, and mlx-lm looks it up among its own when it reads them.
CountedStates.__name__ = "ArraysCache"


def count_tokens_beside_states(prompt_cache: list, tokens: PagedKVCache) -> None:
    """Have the first recurrent layer of a prompt cache carry ``tokens``."""
    for i, cache in enumerate(prompt_cache):
        if isinstance(cache, stock.ArraysCache):
            prompt_cache[i] = CountedStates.of(cache, tokens)
            return
