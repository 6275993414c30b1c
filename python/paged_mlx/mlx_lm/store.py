"""Prompt caches put aside: the store of mlx-lm's server, and one that knows what pages know."""

from typing import Any

from mlx_lm.models import cache as stock

from paged_mlx.forward.seams import Seam
from paged_mlx.mlx_lm.model_seam import enabled_models
from paged_mlx.mlx_lm.prefixes import layers_of


def _fetch_nearest_cache(before):
    def fetch_nearest_cache(self, model, tokens):
        found, rest = before(self, model, tokens)
        for paged in enabled_models():
            if paged.ranks.size > 1:
                held = len(tokens) - len(rest)
                least, most = paged.ranks.spread(f"stored of {len(tokens)} tokens", held)
                return (found, rest) if least == most else (None, tokens)
        return found, rest

    return fetch_nearest_cache


def put_aside(store, tokens: list[int], prompt_cache: list) -> list[int]:
    """Make a prompt cache ready to be filed, and return the tokens to file it under: those that
    all of its caches hold.

    mlx-lm's server files a speculative answer with its last token, which is in no cache if it was
    not the draft's; a draft's cache may lack one more.
    """
    layers = list(layers_of(prompt_cache))
    if not layers:
        return tokens
    counting = [cache for cache in prompt_cache if isinstance(getattr(cache, "offset", None), int)]
    length = min([len(tokens), *(cache.offset for cache in counting)])
    for cache in counting:
        if cache.offset > length and cache.is_trimmable():
            cache.trim(cache.offset - length)
    for layer in layers:
        layer.stored = True
    layers[0].group.passes.stores.add(store)
    return tokens[:length]


def bound_prefixes(store, nbytes: int | None) -> None:
    """Hold what a store has filed and the cached prefixes of its models to so many bytes."""
    for paged in enabled_models() if nbytes is not None else ():
        if store in paged.passes.stores:
            paged.trim_prefixes(max(0, nbytes - store.nbytes))


def _insert_cache(before):
    def insert_cache(self, model, tokens, prompt_cache, **options):
        before(self, model, put_aside(self, tokens, prompt_cache), prompt_cache, **options)
        bound_prefixes(self, self.max_bytes)

    return insert_cache


def _trim_to(before):
    def trim_to(self, *, n_sequences=None, n_bytes=None):
        before(self, n_sequences=n_sequences, n_bytes=n_bytes)
        bound_prefixes(self, n_bytes)

    return trim_to


SEAMS, RANK_SEAMS = [], []  # older versions of mlx-lm keep the store elsewhere
PromptStore = None
if hasattr(stock, "LRUPromptCache"):
    when = "`prefix_cache=True`, `num_pages` or `max_bytes`"
    files = "files a cache under the tokens that it holds"
    gives = "gives up cached prefixes past the store's bytes"
    SEAMS += [
        Seam(stock.LRUPromptCache, "insert_cache", _insert_cache, when, files),
        Seam(stock.LRUPromptCache, "trim_to", _trim_to, when, gives),
    ]
    RANK_SEAMS.append(
        Seam(
            stock.LRUPromptCache,
            "fetch_nearest_cache",
            _fetch_nearest_cache,
            "there are several ranks",
            "finds what is filed on all of them",
        )
    )

    class PromptStore(stock.LRUPromptCache):  # type: ignore[no-redef]
        """The prompt store of ``mlx_lm.server`` for an enabled model. It finds the longest cached
        beginning, filed here or not, and the server counts it as cached.

        ``ResponseGenerator(model_provider, PromptStore(paged))`` in place of mlx-lm's own.

        Args:
            paged: The ``PagedModel`` that ``enable`` returned; may be set later, and to another as
                the server loads another model. None: as mlx-lm's own store.
            max_size, max_bytes: Limits of the filed caches, as mlx-lm's.

        Attributes:
            tokens_asked, tokens_reused: Tokens of the prompts that were looked for, and those of
                them that were found, filed here or in pages.
        """

        def __init__(self, paged: Any = None, max_size: int = 10, max_bytes: int = 1 << 63):
            super().__init__(max_size, max_bytes)
            self.paged = paged
            self.tokens_asked = self.tokens_reused = 0

        def fetch_nearest_cache(self, model: Any, tokens: list[int]):
            found, rest = self._longest(model, tokens)
            self.tokens_asked += len(tokens)
            self.tokens_reused += len(tokens) - len(rest)
            return found, rest

        def _longest(self, model, tokens):
            found, rest = super().fetch_nearest_cache(model, tokens)
            paged, held = self.paged, len(tokens) - len(rest)
            if paged is None or found is not None and len(found) != len(paged.layout.places):
                return found, rest  # with a draft's
            if held < paged.known(tokens):
                return paged.begin(tokens)
            return found, rest

        def insert_cache(self, model: Any, tokens: list[int], prompt_cache: list, **options: Any):
            tokens = put_aside(self, tokens, prompt_cache)
            super().insert_cache(model, tokens, prompt_cache, **options)
            if self.paged is not None and len(prompt_cache) == len(self.paged.layout.places):
                self.paged.remember(tokens, prompt_cache)
            bound_prefixes(self, self.max_bytes)

        def trim_to(self, *, n_sequences: int | None = None, n_bytes: int | None = None):
            super().trim_to(n_sequences=n_sequences, n_bytes=n_bytes)
            bound_prefixes(self, n_bytes)
