"""``enable``: paged K and V for a model of mlx-lm, by one call, undone completely."""

import copy
import types
from collections import Counter

import mlx.nn as nn
from mlx_lm.models import cache as stock

from paged_mlx.errors import fail, whole_number
from paged_mlx.mlx_lm import hook, prompt_files, prompt_hooks
from paged_mlx.mlx_lm.cache import PagedKVCache
from paged_mlx.mlx_lm.group import LayerGroup
from paged_mlx.mlx_lm.layout import Layout, build, kind_of, probe_geometry, unpaged
from paged_mlx.mlx_lm.model_seam import DefaultMakeCache, MakeCache, paged_model_of
from paged_mlx.mlx_lm.passes import Passes
from paged_mlx.mlx_lm.prefixes import PromptPrefixes, fingerprint, layers_of
from paged_mlx.mlx_lm.prompt_run import tokens_in
from paged_mlx.mlx_lm.sequence import SequencePages
from paged_mlx.pages.tokens import pack_tokens, unpack_tokens

FIRST_PAGES = 64
PAGES_BEFORE_EVICTION = 4096  # a pool with a prefix cache grows to, then it evicts
NO_LIMIT = 1 << 24
# Metadata of files: the tokens, if they are known, and of which weights K and V are.
TOLD, WEIGHTS = "paged_mlx_tokens", "paged_mlx_weights"


def enable(
    model,
    *,
    page_size: int = 16,
    num_pages: int | None = None,
    retain: int | None = 32,
    prefix_cache: bool = False,
):
    """Keep K and V of ``model`` in pages from now on.

    Prompt caches made afterwards, by mlx-lm's functions or ``model.make_cache()``, are
    paged. Caches that exist, and other models, are left alone.

    Args:
        model: A model of mlx-lm.
        page_size: Tokens in a page; powers of two from 8 to 256 are fast.
        num_pages: Pages for each kind of layer. None: the pools grow on demand.
        retain: Tokens that a sliding-window layer keeps behind its window, so that as many
            can be taken back; None: all of them.
        prefix_cache: Let prompts that begin alike share pages, in a batch and across calls.
            Pages outlive their sequences until the pool needs them; recurrent states are
            kept at some positions.

    Returns:
        A PagedModel: a context manager, and the way to look at the pages.

    Raises:
        ValueError: The model is enabled already, has no cache that can be paged, or an
            option is not what it must be.
    """
    if not isinstance(model, nn.Module):
        fail("enable", "model must be a model of mlx-lm", type(model).__name__)
    if paged_model_of(model) is not None:
        fail("enable", "model must not be enabled already", type(model).__name__)
    paged = PagedModel(model, page_size, num_pages, retain, prefix_cache)
    paged.enable()
    return paged


class PagedModel:
    """A model whose K and V are paged, until ``disable``.

    Attributes:
        model: The model.
        groups: Its layers, one group for each window.
        passes: Its forward passes, of all threads.
        prefixes: PromptPrefixes, with ``prefix_cache=True``; else None.
    """

    def __init__(self, model, page_size, num_pages, retain, prefix_cache=False):
        for name, value in (("page_size", page_size), ("num_pages", num_pages), ("retain", retain)):
            if value is not None:
                whole_number("enable", name, value, int(name != "retain"))
        self.model = model
        self._enabled = False
        enabled = paged_model_of(model)  # by another: then this one is for explain
        if enabled is not None:
            self._stock_make_cache = enabled._stock_make_cache
            self._own_make_cache = enabled._own_make_cache
        else:
            self._stock_make_cache = getattr(model, "make_cache", None)
            self._own_make_cache = vars(model).get("make_cache")
        caches = self.stock_cache()
        self.layout = Layout.of(caches)
        if not self.layout.num_layers:
            fail("enable", "model must have a cache of K and V that can be paged", caches[:1])
        if prefix_cache:
            self._check_prefixes_can_be_shared(caches)
        first, most = (num_pages, num_pages) if num_pages else (FIRST_PAGES, NO_LIMIT // page_size)
        unhurried = most if prefix_cache and num_pages is None else first
        self.groups = {
            window: LayerGroup(
                num_layers,
                page_size,
                first,
                most,
                min(unhurried, PAGES_BEFORE_EVICTION),
                window,
                retain,
            )
            for window, num_layers in self.layout.num_layers.items()
        }
        self.passes = Passes(list(self.groups.values()), model)
        for group in self.groups.values():
            group.passes = self.passes
        for (window, layer), geometry in probe_geometry(model, caches, self.layout.places).items():
            self.groups[window].geometry[layer] = geometry
        self.prefixes = PromptPrefixes(self) if prefix_cache else None

    def _check_prefixes_can_be_shared(self, caches) -> None:
        others = [
            reason
            for cache, reason in unpaged(caches, self.layout.places)
            if kind_of(cache) != "ArraysCache"
        ]
        if others:
            must = (
                "prefix_cache must be False, because not all that the model remembers is in pages"
            )
            fail("enable", must, others[0])

    # On and off

    def enable(self) -> None:
        """Page the model's caches, also again after ``disable``.

        Raises:
            ValueError: Another PagedModel has taken the model over.
        """
        if self._enabled:
            return
        if paged_model_of(self.model) is not None:
            fail("enable", "model must not be enabled already", type(self.model).__name__)
        self.model.make_cache = MakeCache(self)
        hook.install()
        prompt_hooks.install()
        self._enabled = True

    def disable(self) -> None:
        """Leave the model and MLX as they were. Caches in use stay right, and are slower."""
        if not self._enabled:
            return
        self._enabled = False
        hook.uninstall()
        prompt_hooks.uninstall()
        del self.model.make_cache
        if self._own_make_cache is not None:
            self.model.make_cache = self._own_make_cache

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.disable()

    # Caches

    def stock_cache(self) -> list:
        """mlx-lm's own prompt cache of the model."""
        if self._stock_make_cache is not None:
            return self._stock_make_cache()
        return [stock.KVCache() for _ in self.model.layers]

    @property
    def has_default_cache(self) -> bool:
        """Whether mlx-lm, not the model, decides on the kind of cache."""
        return self._stock_make_cache is None or isinstance(
            self._stock_make_cache, DefaultMakeCache
        )

    def make_cache_of_copy(self, memo: dict):
        """What ``make_cache`` is on a deep copy of the model that is being made."""
        if self._own_make_cache is not None:
            return copy.deepcopy(self._own_make_cache, memo)
        model = memo.get(id(self.model), self.model)
        if self._stock_make_cache is None:
            return DefaultMakeCache(model)
        return types.MethodType(type(model).make_cache, model)

    def make_cache(self) -> list:
        """A prompt cache on pages."""
        sequences = {window: SequencePages(group) for window, group in self.groups.items()}

        def paged(place):
            return PagedKVCache(self.groups[place.window], place.layer, [sequences[place.window]])

        return build(self.layout.places, self.stock_cache(), paged)

    def fork(self, prompt_cache: list, n: int) -> list[list]:
        """``n`` prompt caches of the same tokens on the same pages; no bytes move."""
        self._check_is_ours("fork", prompt_cache)
        return [copy.deepcopy(prompt_cache) for _ in range(n)]

    def _check_is_ours(self, function: str, prompt_cache: list) -> None:
        for layer in layers_of(prompt_cache):
            if layer.group.passes.model() is not self.model:
                fail(function, "prompt_cache must be of this model", layer)

    def to_stock(self, prompt_cache: list) -> list:
        """mlx-lm's own prompt cache of the same tokens."""
        return prompt_files.to_stock(prompt_cache)

    def from_stock(self, prompt_cache: list) -> list:
        """A prompt cache on pages of the tokens of mlx-lm's own."""
        return prompt_files.from_stock(self, prompt_cache)

    def save(self, path: str, prompt_cache: list, metadata: dict | None = None) -> None:
        """Write a prompt cache to a file that mlx-lm can read too: its tokens, not the pool."""
        tokens = tokens_in(self, prompt_cache) if self.prefixes is not None else None
        metadata = dict(metadata or {})
        if tokens:
            metadata |= {TOLD: pack_tokens(tokens).hex(), WEIGHTS: fingerprint(self.model)}
        prompt_files.save(path, prompt_cache, metadata)

    def load(self, path: str, return_metadata: bool = False):
        """Read a prompt cache from a file of ``save`` or of mlx-lm into pages.

        With ``prefix_cache=True``, other prompts begin with one that was saved so too, by a
        model of the same weights.
        """
        prompt_cache, metadata = prompt_files.load(self, path)
        told, weights = metadata.pop(TOLD, ""), metadata.pop(WEIGHTS, "")
        if self.prefixes is not None and told and weights == fingerprint(self.model):
            tokens = list(unpack_tokens(bytes.fromhex(told)))
            self.prefixes.remember(tokens, prompt_cache, finished=True)
        return (prompt_cache, metadata) if return_metadata else prompt_cache

    # Figures

    @property
    def is_wholly_paged(self) -> bool:
        """Whether all attention of the model so far has read pages."""
        left = unpaged(self.stock_cache(), self.layout.places)
        return all(kind_of(cache) == "ArraysCache" for cache, _ in left) and all(
            group.is_wholly_paged for group in self.groups.values()
        )

    @property
    def paged_calls(self) -> int:
        """Attention calls that read the pages."""
        return self._calls().get(None, 0)

    @property
    def gathered_calls(self) -> dict[str, int]:
        """Attention calls that went through a gather, by reason."""
        return {reason: count for reason, count in self._calls().items() if reason is not None}

    def _calls(self) -> Counter:
        calls = Counter()
        for group in self.groups.values():
            for (_, reason), count in group.calls.items():
                calls[reason] += count
        return calls

    @property
    def nbytes(self) -> int:
        """Bytes of all pages."""
        return sum(group.nbytes for group in self.groups.values())

    @property
    def nbytes_used(self) -> int:
        """Bytes of the pages in use."""
        return sum(group.nbytes_used for group in self.groups.values())

    def check(self) -> None:
        """Prove that pools, allocators and versions agree.

        Raises:
            AssertionError: They do not.
        """
        with self.passes.turn():
            for group in self.groups.values():
                group.reclaim()
                group.allocator.check()
                for pool in group.pools:
                    pool.check()

    def __repr__(self):
        state = "" if self._enabled else ", disabled"
        return f"PagedModel({type(self.model).__module__}, {list(self.groups.values())}{state})"
