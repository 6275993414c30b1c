"""``enable``: paged K and V for a model of mlx-lm, by one call, undone completely."""

import contextlib
import copy
import logging
import os
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import cache as stock

import paged_mlx.mlx_lm.lost_ranks as lost_ranks
from paged_mlx.errors import as_list, check_flag, check_kind, fail, whole_number
from paged_mlx.formats.page_format import BITS, formats_of
from paged_mlx.forward.group import LayerGroup
from paged_mlx.forward.hook import ATTENTION
from paged_mlx.forward.identity import Identity
from paged_mlx.forward.passes import Passes
from paged_mlx.forward.routes import FRESH, GATHER, PAGES, routes_of
from paged_mlx.forward.sequence import History, Sequence
from paged_mlx.machine.memory import MAX_BYTES, memory_limit
from paged_mlx.mlx_lm.beginnings import SEAMS as BEGINNINGS
from paged_mlx.mlx_lm.cache import PagedKVCache
from paged_mlx.mlx_lm.checkpoints import SHARE_OF_CHECKPOINTS, states_of
from paged_mlx.mlx_lm.counted_states import count_tokens_beside_states
from paged_mlx.mlx_lm.layout import Layout, build, kind_of, probe_geometry, unpaged
from paged_mlx.mlx_lm.model_seam import MakeCache, paged_model_of
from paged_mlx.mlx_lm.prefixes import Key, PromptPrefixes, keys_of, layers_of
from paged_mlx.mlx_lm.prompt_files import from_stock, load, save, to_stock
from paged_mlx.mlx_lm.prompts import Prompts, seam_of
from paged_mlx.mlx_lm.ranks import Ranks
from paged_mlx.mlx_lm.ranks import seam_of as seam_of_ranks
from paged_mlx.mlx_lm.store import RANK_SEAMS as STORE_OF_RANKS
from paged_mlx.mlx_lm.store import SEAMS as STORE
from paged_mlx.mlx_lm.waiting import seams as waiting_seams
from paged_mlx.pages.tokens import token_ids
from paged_mlx.prefix.hash import pack_keys

log = logging.getLogger("paged_mlx")

PAGE_SIZE = 16
FIRST_PAGES = 64
PAGES_BEFORE_EVICTION = 4096  # a pool with a prefix cache grows to, then it evicts
NO_LIMIT = 1 << 24


def enable(
    model: nn.Module,
    *,
    page_size: int | None = None,
    num_pages: int | None = None,
    retain: int | None = 32,
    prefix_cache: bool = False,
    max_bytes: int | None = None,
    kv_format: str | tuple[str | None, str | None] | None = None,
) -> "PagedModel":
    """Keep K and V of ``model`` in pages from now on.

    Prompt caches made afterwards, by mlx-lm's functions or ``model.make_cache()``, are
    paged. Caches that exist, and other models, are left alone.

    Args:
        model: A model of mlx-lm.
        page_size: Tokens in a page; powers of two from 8 to 256 are fast. None: 16, or 64 where K
            is held as ``"q4"``.
        num_pages: Pages for each kind of layer. None: the pools grow on demand.
        retain: Tokens that a sliding-window layer keeps behind its window, so that as many
            can be taken back; None: all of them.
        prefix_cache: Let prompts that begin alike share pages, in a batch and across calls.
            Pages outlive their sequences until the pool needs them; recurrent states are
            kept at some positions.
        max_bytes: Bytes that all pages may take, those of cached prefixes, recurrent states kept
            beside them and what growing takes for a moment included. With this or ``num_pages`` a
            ``BatchGenerator`` has prompts wait for pages.
        kv_format: How K and V are held: None as they are, ``"q8"``, ``"q4"``, or a pair of them
            for K and V, ``("q8", "q4")``; see docs/formats.md.

    Returns:
        A PagedModel: a context manager, and the way to look at the pages.

    Raises:
        ValueError: The model is enabled already, has no cache that can be paged, or an
            option is wrong; the message says why.

    Examples:
        >>> from mlx_lm.models import llama
        >>> sizes = dict(hidden_size=64, intermediate_size=64, vocab_size=100, rms_norm_eps=1e-5)
        >>> heads = dict(num_hidden_layers=2, num_attention_heads=4)
        >>> model = llama.Model(llama.ModelArgs("llama", **sizes, **heads))
        >>> with enable(model, page_size=16) as paged:
        ...     cache = model.make_cache()
        ...     logits = model(mx.array([[1, 2, 3]]), cache=cache)
        ...     paged.groups[None]
        LayerGroup(2 layers, 1 of 64 pages of 16 tokens)
    """
    check_model("enable", model)
    if paged_model_of(model) is not None:
        fail("enable", "model must not be enabled already", type(model).__name__)
    paged = PagedModel(model, page_size, num_pages, retain, prefix_cache, max_bytes, kv_format)
    paged.meet()
    paged.enable()
    return paged


def check_model(function: str, model: object) -> None:
    """Refuse what is no model of mlx-lm.

    Raises:
        ValueError: It is none.
    """
    makes_caches = hasattr(model, "layers") or hasattr(model, "make_cache")
    if not isinstance(model, nn.Module) or not makes_caches:
        fail(function, "model must be a model of mlx-lm", type(model).__name__)


def _check_path(function: str, path: object) -> None:
    if not isinstance(path, (str, os.PathLike)):
        fail(function, "path must be a path", type(path).__name__)


class Estimate(NamedTuple):
    """Bytes that pages will take, and whether there is room for them."""

    nbytes: int
    fits: bool


class PagedModel:
    """A model whose K and V are paged, until ``disable``.

    Attributes:
        model: The model.
        groups: Its layers, one group for each window.
        passes: Its forward passes, of all threads.
        prefixes: PromptPrefixes: with ``prefix_cache=True``, or once ``begin`` or ``remember``
            were called; else None.
        prompts: Runs the model's calls with ``prefix_cache=True``; else None.
        ranks: The ranks that compute the model together.
        has_states: Whether the model has recurrent states, on any rank.
        checkpoint_bytes: Bytes that checkpoints of them may take.
        caches_attend: Whether the model has its caches attend, as mlx-vlm's do.
        formats: Of K's and V's pages.
    """

    def __init__(
        self,
        model: nn.Module,
        page_size: int | None,
        num_pages: int | None,
        retain: int | None,
        prefix_cache: bool = False,
        max_bytes: int | None = None,
        kv_format: str | tuple[str | None, str | None] | None = None,
        alone: bool = False,
    ):
        self.formats = formats_of("enable", "kv_format", kv_format)
        if page_size is None:
            page_size = self.formats.default_page_size or PAGE_SIZE
        options = {"page_size": page_size, "num_pages": num_pages, "retain": retain}
        for name, value in options.items():
            if value is not None:
                whole_number("enable", name, value, int(name != "retain"))
        if max_bytes is not None:
            max_bytes = whole_number("enable", "max_bytes", max_bytes, 1, MAX_BYTES)
        prefix_cache = check_flag("enable", "prefix_cache", prefix_cache)
        self.is_limited = num_pages is not None or max_bytes is not None
        self.num_pages, self.max_bytes = num_pages, max_bytes
        self.page_size, self.retain, self.prefix_cache = page_size, retain, prefix_cache
        self.model = model
        self._make_cache = MakeCache(self)
        self._seams = contextlib.ExitStack()
        self.ranks = Ranks(model)
        self.has_states = any(True for _ in states_of(self.stock_cache()))
        self.checkpoint_bytes = (max_bytes or memory_limit()) // SHARE_OF_CHECKPOINTS
        self.ranks.have_met |= alone  # nobody else is asked
        if self.ranks.size == 1 or alone:
            self._build()

    def _build(self) -> None:
        """Make everything that depends on the layers of the model, as this rank has them."""
        caches = self.stock_cache()
        self.layout = Layout.of(caches)
        counts_alone = not self.layout.num_layers and self.ranks.size > 1 and self.has_states
        if counts_alone:
            self.layout.num_layers = {None: 0}
        if not self.layout.num_layers:
            fail("enable", "model must have a cache of K and V that can be paged", caches[:1])
        if self.prefix_cache:
            self._check_prefixes_can_be_shared("prefix_cache must be False")
        page_size, num_pages, max_bytes = self.page_size, self.num_pages, self.max_bytes
        first = 1 if max_bytes is not None else FIRST_PAGES
        first, most = (num_pages, num_pages) if num_pages else (first, NO_LIMIT // page_size)
        unhurried = most if self.prefix_cache and num_pages is None else first
        self.groups = {
            window: LayerGroup(
                num_layers,
                page_size,
                first,
                most,
                min(unhurried, PAGES_BEFORE_EVICTION),
                window,
                self.retain,
                self.formats,
            )
            for window, num_layers in self.layout.num_layers.items()
        }
        self.passes = Passes(self.groups, self.model)
        for group in self.groups.values():
            group.passes = self.passes
            group.grows_past_memory = not self.is_limited or self.ranks.size > 1
        found, self.caches_attend = probe_geometry(self.model, caches, self.layout.places)
        self.passes.num_layers = len(found)
        for (window, layer), geometry in found.items():
            self.formats.check("enable", geometry[1], geometry[2], page_size)
            self.groups[window].geometry[layer] = geometry
        for group in self.groups.values():
            group.caches_attend = self.caches_attend
        self._limit(max_bytes)
        self.prefixes = self.prompts = None
        self._identity: Identity | None = None
        if self.prefix_cache:
            self.prefixes = PromptPrefixes(self)
            self.prompts = Prompts(self)

    def meet(self) -> None:
        """Agree with the other ranks of a shared model on options and budgets: the smallest of
        all. Done once, before the model's first prompt, when it is sharded or in a pipeline.

        Raises:
            ValueError: Options differ, or the model cannot be enabled on some rank.
        """
        if self.ranks.have_met:
            return
        if self.ranks.size == 1:
            self.ranks = Ranks(self.model)
        if self.ranks.size == 1:
            return
        self.ranks.have_met = True
        lost_ranks.watch(self.ranks)
        self._agree_on_options()
        error = None
        try:
            self._build()
        except ValueError as raised:
            error = raised
        if self.ranks.all("the model can be enabled", error is None):
            return
        if error is not None:
            raise error
        must = "prefix_cache must be False" if self.prefix_cache else "model must be another"
        fail("enable", f"{must}, because some rank cannot enable it so", type(self.model).__name__)

    def _agree_on_options(self) -> None:
        limits = self.num_pages, self.max_bytes
        options = [self.page_size, -1 if self.retain is None else self.retain, self.prefix_cache]
        options += [0 if name is None else BITS[name] for name in self.formats]
        options += [limit is None for limit in limits]
        for option in map(int, options):
            least, most = self.ranks.spread("options", option)
            if least != most:
                must = (
                    "page_size, retain, prefix_cache, kv_format and which limits there are must be "
                    "the same"
                )
                fail("enable", f"{must} on all ranks", options)
        self.has_states = self.ranks.any("states", self.has_states)
        budgets = [limit or NO_LIMIT for limit in limits] + [self.checkpoint_bytes]
        num_pages, max_bytes, self.checkpoint_bytes = self.ranks.least("budgets", *budgets)
        self.num_pages = num_pages if limits[0] is not None else None
        self.max_bytes = max_bytes if limits[1] is not None else None

    def _limit(self, max_bytes: int | None) -> None:
        """Hold pages, checkpoints and what growing takes for a moment to so many bytes."""
        if max_bytes is None:
            return
        page = sum(group.page_bytes for group in self.groups.values())
        layers = sum(group.num_layers for group in self.groups.values())
        states = self.checkpoint_bytes if self.has_states else 0
        self.passes.max_bytes = max_bytes - states
        if sum(len(group.geometry) for group in self.groups.values()) != layers:
            must = "max_bytes must be left out for a model whose layers are not known beforehand"
            fail("enable", must, f"{max_bytes}; give num_pages")
        if 2 * page > self.passes.max_bytes:
            must = f"max_bytes must be at least {2 * page + states}, two pages of each layer"
            fail("enable", must, max_bytes)

    def _known_prefixes(self) -> PromptPrefixes:
        self.meet()
        if self.prefixes is None:
            self._check_prefixes_can_be_shared("model must be one whose prefixes can be shared")
            self.prefixes = PromptPrefixes(self)
        return self.prefixes

    def _check_prefixes_can_be_shared(self, must: str) -> None:
        others = [
            reason
            for cache, reason in unpaged(self.stock_cache(), self.layout.places)
            if kind_of(cache) != "ArraysCache"
        ]
        if others:
            fail("enable", f"{must}, because not all that it remembers is in pages", others[0])

    # On and off

    def enable(self) -> None:
        """Page the model's caches, also again after ``disable``.

        Raises:
            ValueError: Another PagedModel has taken the model over.
        """
        if self._is_enabled:
            return
        if paged_model_of(self.model) is not None:
            fail("enable", "model must not be enabled already", type(self.model).__name__)
        self._make_cache = MakeCache(self)
        self._make_cache.install()
        self._seams.callback(self._make_cache.uninstall)
        seams = [] if self.caches_attend else [ATTENTION]
        of_ranks = [seam_of_ranks(self.model), *STORE_OF_RANKS]
        if Ranks.are_several():
            seams += of_ranks
        if self.prompts is not None:
            seams += [seam_of(self.model), *BEGINNINGS]
        if self.is_limited:
            seams += waiting_seams()
        if self.prompts is not None or self.is_limited:
            seams += STORE
        for seam in seams:
            seam.install()
            self._seams.callback(seam.uninstall)

    @property
    def _is_enabled(self) -> bool:
        return paged_model_of(self.model) is self

    def disable(self) -> None:
        """Undo ``enable``. Caches in use stay right, and are slower."""
        self._seams.close()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.disable()

    # Caches

    def stock_cache(self) -> list:
        """mlx-lm's own prompt cache of the model."""
        return self._make_cache.stock_cache()

    def rotating_cache(self, size: int) -> list:
        """The prompt cache that mlx-lm makes for ``max_kv_size``: not paged."""
        whole_number("rotating_cache", "size", size, 1)
        if self._make_cache.is_the_models:
            return self.make_cache()
        log.warning("max_kv_size=%d: mlx-lm's rotating cache is used, which is not paged", size)
        return [stock.RotatingKVCache(size, keep=4) for _ in self.model.layers]

    def make_cache(self, keys: tuple = ()) -> list:
        """A prompt cache on pages.

        Args:
            keys: ExtraKeys that K and V will depend on besides tokens.
        """
        pack_keys(keys, 1, "make_cache")  # refuses what is no key
        self.meet()
        history = History()
        history.keys = (*keys, *self.formats.extra_keys)
        sequence = Sequence(self.groups, history=history)

        def paged(place):
            return PagedKVCache(self.groups[place.window], place.layer, [sequence])

        caches = build(self.layout.places, self.stock_cache(), paged)
        if not any(self.layout.num_layers.values()):
            count_tokens_beside_states(caches, PagedKVCache(self.groups[None], 0, [sequence]))
        return caches

    def begin(self, tokens: list[int], key: Key = None) -> tuple[list, list[int]]:
        """A prompt cache with the cached beginning of ``tokens``, and the tokens left to compute.

        For any function of mlx-lm that takes a prompt cache; nothing is replaced for it.

        Args:
            tokens: The prompt.
            key: Anything else that K and V depend on: a tenant, an adapter, a salt.
                Tokens remembered under another key are not found.
        """
        tokens, keys = token_ids("begin", tokens), keys_of("begin", key)
        prefixes, prompt_cache = self._known_prefixes(), self.make_cache(keys)
        known = prefixes.begin(tokens, prompt_cache) if tokens else 0
        prefixes.count(len(tokens), known)
        if not known:
            first = next(layers_of(prompt_cache)).rows[0].history
            first.generation = prefixes.generation
        return prompt_cache, tokens[known:]

    def known(self, tokens: list[int], key: Key = None) -> int:
        """How many of the first ``tokens``, less than all, ``begin`` would not leave to compute;
        of a model that several ranks share, on every rank."""
        keys = (*keys_of("known", key), *self.formats.extra_keys)
        return self._known_prefixes().known(token_ids("known", tokens), keys)

    def remember(self, tokens: list[int], prompt_cache: list) -> None:
        """Let later prompts begin with ``tokens``, which ``prompt_cache`` holds; those behind
        the ones that it holds, as an answer's last one, are left out.

        The cache may go on from here. Its tokens are found under the key that ``begin`` was given.

        Raises:
            ValueError: It is not of this model, or holds other tokens.
        """
        held = self._layers_of_ours("remember", prompt_cache)[0].offset
        tokens = token_ids("remember", tokens)[:held]
        self._known_prefixes().remember(tokens, prompt_cache, finished=True)

    def fork(self, prompt_cache: list, n: int) -> list[list]:
        """``n`` prompt caches of the same tokens on the same pages; no bytes move."""
        self._layers_of_ours("fork", prompt_cache)
        n = whole_number("fork", "n", n)
        return [copy.deepcopy(prompt_cache) for _ in range(n)]

    def _layers_of_ours(self, function: str, prompt_cache: list) -> list:
        """The paged caches of a prompt cache, which has some, all of this model."""
        layers = list(layers_of(as_list(function, "prompt_cache", prompt_cache, "caches")))
        if not layers:
            must = "prompt_cache must be on pages, as make_cache makes it"
            fail(function, must, type(prompt_cache).__name__)
        for layer in layers:
            if layer.group.passes.model() is not self.model:
                fail(function, "prompt_cache must be of this model", layer)
        return layers

    def to_stock(self, prompt_cache: list) -> list:
        """mlx-lm's own prompt cache of the same tokens."""
        return to_stock(as_list("to_stock", "prompt_cache", prompt_cache, "caches"))

    def from_stock(self, prompt_cache: list) -> list:
        """A prompt cache on pages of the tokens of mlx-lm's own."""
        return from_stock(self, as_list("from_stock", "prompt_cache", prompt_cache, "caches"))

    def save(self, path: str, prompt_cache: list, metadata: dict | None = None) -> None:
        """Write a prompt cache to a file that mlx-lm can read too: its tokens, not the pool.

        The file is there whole or not at all, and says of which model it is.
        """
        layer = self._layers_of_ours("save", prompt_cache)[0]
        _check_path("save", path)
        if metadata is not None:
            check_kind("save", "metadata", metadata, dict)
            if not all(isinstance(text, str) for pair in metadata.items() for text in pair):
                fail("save", "metadata must be of text", metadata)
        tokens = layer.rows[0].history.first(int(layer.lens[0]))
        save(path, prompt_cache, self.identity, tokens, metadata, self.formats)

    def load(self, path: str, return_metadata: bool = False):
        """Read a prompt cache from a file of ``save`` or of mlx-lm into pages.

        With ``prefix_cache=True``, other prompts begin with one that was saved so too.

        Raises:
            ValueError: The file is damaged, or of another model, or of pages of another format;
                nothing is remembered of it.
        """
        _check_path("load", path)
        return_metadata = check_flag("load", "return_metadata", return_metadata)
        prompt_cache, metadata, tokens = load(self, path)
        if self.prefixes is not None and tokens:
            self.prefixes.remember(tokens, prompt_cache, finished=True)
        return (prompt_cache, metadata) if return_metadata else prompt_cache

    @property
    def identity(self) -> Identity:
        """The model as it is now: weights, configuration and rank."""
        self.meet()
        if self.prefixes is not None:
            self.prefixes.notice_changes()
            return self.prefixes.identity
        if self._identity is None or self._identity.has_changed():
            self._identity = Identity(self.model, self.ranks.place)
        return self._identity

    # Memory

    def has_pages(self, rows: list) -> bool:
        """Whether this rank has pages for ``rows``: (sequence, tokens held, tokens to come)."""
        self.passes.reclaim()
        needs = []
        for group in self.groups.values():
            missing = group.pages_missing(sum(group.pages_to_go(*row) for row in rows))
            if missing > group.max_pages - group.allocator.total_pages:
                return False
            needs.append(group.bytes_to_grow(missing))
        to_stay = sum(stays for stays, _ in needs)
        for_a_moment = max(passes for _, passes in needs)
        most = self.passes.max_bytes
        return most is None or not to_stay or self.nbytes + to_stay + for_a_moment <= most

    def estimate(self, lengths: list[int], max_new_tokens: int) -> Estimate:
        """Bytes of the pages of sequences with prompts of ``lengths``, and whether they fit.

        Nothing is counted that they might share.
        """
        lengths = as_list("estimate", "lengths", lengths, "whole numbers")
        lengths = [whole_number("estimate", "lengths", length) for length in lengths]
        max_new_tokens = whole_number("estimate", "max_new_tokens", max_new_tokens)
        nbytes, fits = 0, True
        for group in self.groups.values():
            pages = sum(group.pages_for(length, max_new_tokens) for length in lengths)
            if self.prefix_cache:  # pages behind windows stay, as long as pools may grow
                tokens = sum(lengths) + max_new_tokens * len(lengths)
                pages = max(pages, min(tokens // self.page_size, group.grow_first))
            fits = fits and pages <= group.most_pages
            nbytes += group.pages_grown_to(pages) * group.page_bytes
        most = self.passes.max_bytes
        if not self.is_limited:
            most = memory_limit() - mx.get_active_memory() + self.nbytes
        return Estimate(nbytes, fits and (most is None or nbytes <= most))

    def trim_memory(self) -> int:
        """Give back pages that no sequence holds: cached prefixes, then free pages at the end of
        the pools. Returns the bytes given back."""
        before = self.nbytes
        with self.passes.turn:
            self.passes.join()
            self.passes.reclaim()
            for cache in self.prefixes.caches.values() if self.prefixes is not None else ():
                cache.evict(cache.num_evictable)
            for group in self.groups.values():
                group.allocator.shrink()
            self.passes.keep()
        mx.clear_cache()
        return before - self.nbytes

    def trim_prefixes(self, nbytes: int) -> None:
        """Give up cached prefixes that nobody holds until they take ``nbytes`` at most."""
        nbytes = whole_number("trim_prefixes", "nbytes", nbytes, 0, MAX_BYTES)
        if self.prefixes is None:
            return
        with self.passes.turn:
            self.passes.reclaim()
            caches = [(self.groups[w].page_bytes, c) for w, c in self.prefixes.caches.items()]
            held = sum(page * cache.num_evictable for page, cache in caches)
            for _, cache in caches if held > nbytes else ():
                cache.evict(cache.num_evictable - cache.num_evictable * nbytes // held)

    # Figures

    @property
    def is_wholly_paged(self) -> bool:
        """Whether all attention of the model so far has read pages."""
        left = unpaged(self.stock_cache(), self.layout.places)
        return all(kind_of(cache) == "ArraysCache" for cache, _ in left) and all(
            group.is_wholly_paged for group in self.groups.values()
        )

    @property
    def routes(self) -> dict[str, int]:
        """Attention calls so far by route: "pages", "fresh prompt", or "gather: " and the reason."""
        return routes_of(self.groups.values())

    @property
    def paged_calls(self) -> int:
        """Attention calls that read the pages."""
        return self.routes.get(PAGES, 0)

    @property
    def gathered_calls(self) -> dict[str, int]:
        """Attention calls that went through a gather, by reason."""
        gathers = {route: n for route, n in self.routes.items() if route.startswith(GATHER)}
        return {route.removeprefix(GATHER): n for route, n in gathers.items()}

    @property
    def fresh_prompt_calls(self) -> int:
        """Attention calls of fresh prompts, whose K and V were written and not read."""
        return self.routes.get(FRESH, 0)

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
        with self.passes.turn:
            self.passes.reclaim()
            for group in self.groups.values():
                group.allocator.check()
                for pool in group.pools:
                    pool.check()

    def __repr__(self):
        state = "" if self._is_enabled else ", disabled"
        return f"PagedModel({type(self.model).__module__}, {list(self.groups.values())}{state})"
