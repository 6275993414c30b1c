"""``enable``: paged K and V for a model of mlx-lm, by one call, undone completely."""

import copy
import logging
import sys
from collections import Counter

from mlx_lm.models import cache as stock

from paged_mlx.host_ints import fail
from paged_mlx.mlx_lm import hook
from paged_mlx.mlx_lm.cache import PagedKVCache
from paged_mlx.mlx_lm.group import LayerGroup
from paged_mlx.mlx_lm.layout import Layout, build, probe_geometry
from paged_mlx.mlx_lm.sequence import SequencePages

log = logging.getLogger("paged_mlx")

FIRST_PAGES = 64
NO_LIMIT = 1 << 24


def enable(model, *, page_size: int = 16, num_pages: int | None = None, retain: int | None = 32):
    """Keep K and V of ``model`` in pages from now on.

    Prompt caches made afterwards, by mlx-lm's functions or ``model.make_cache()``, are
    paged. Caches that exist, and other models, are left alone.

    Args:
        model: A model of mlx-lm.
        page_size: Tokens in a page; powers of two from 8 to 256 are fast.
        num_pages: Pages for each kind of layer. None: the pools double on demand.
        retain: Tokens that a sliding-window layer keeps behind its window, so that as many
            can be taken back; None: all of them.

    Returns:
        A PagedModel: a context manager, and the way to look at the pages.

    Raises:
        ValueError: The model is enabled already, has no cache that can be paged, or an
            option is not what it must be.
    """
    return PagedModel(model, page_size, num_pages, retain)


class PagedModel:
    """A model whose K and V are paged, until ``disable``.

    Attributes:
        model: The model.
        groups: Its layers, one group for each window.
    """

    def __init__(self, model, page_size, num_pages, retain):
        if paged_model_of(model) is not None:
            fail("enable", "model must not be enabled already", type(model).__name__)
        for name, value in (("page_size", page_size), ("num_pages", num_pages), ("retain", retain)):
            if value is not None and (not isinstance(value, int) or value < (name != "retain")):
                fail("enable", f"{name} must be a whole number of at least {int(name != 'retain')}", value)
        self.model = model
        self._enabled = False
        self._stock_make_cache = getattr(model, "make_cache", None)
        self._own_make_cache = vars(model).get("make_cache")
        caches = self.stock_cache()
        self.layout = Layout.of(caches)
        if not self.layout.num_layers:
            fail("enable", "model must have a cache of K and V that can be paged", caches[:1])
        first, most = (num_pages, num_pages) if num_pages else (FIRST_PAGES, NO_LIMIT // page_size)
        self.groups = {
            window: LayerGroup(num_layers, page_size, first, most, window, retain)
            for window, num_layers in self.layout.num_layers.items()
        }
        for (window, layer), geometry in probe_geometry(model, caches, self.layout.places).items():
            self.groups[window].geometry[layer] = geometry
        self.enable()

    # On and off

    def enable(self) -> None:
        """Page the model's caches again, after ``disable``."""
        if self._enabled:
            return
        self.model.make_cache = _MakeCache(self)
        hook.install()
        self._enabled = True

    def disable(self) -> None:
        """Leave the model and MLX as they were. Caches in use stay right, and are slower."""
        if not self._enabled:
            return
        self._enabled = False
        hook.uninstall()
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
        return self._stock_make_cache is None

    def make_cache(self) -> list:
        """A prompt cache on pages."""
        sequences = {window: SequencePages(group) for window, group in self.groups.items()}

        def paged(place):
            return PagedKVCache(self.groups[place.window], place.layer, [sequences[place.window]])

        return build(self.layout.places, self.stock_cache(), paged)

    def fork(self, prompt_cache: list, n: int) -> list[list]:
        """``n`` prompt caches of the same tokens on the same pages; no bytes move."""
        return [copy.deepcopy(prompt_cache) for _ in range(n)]

    # Figures

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
        for group in self.groups.values():
            group.reclaim()
            group.allocator.check()
            for pool in group.pools:
                pool.check()

    def __repr__(self):
        state = "" if self._enabled else ", disabled"
        return f"PagedModel({type(self.model).__module__}, {list(self.groups.values())}{state})"


def paged_model_of(model) -> PagedModel | None:
    """What ``enable`` returned for this model, while it is enabled."""
    make_cache = getattr(model, "make_cache", None)
    return make_cache.paged if isinstance(make_cache, _MakeCache) else None


class _MakeCache:
    """``model.make_cache`` of an enabled model."""

    def __init__(self, paged: PagedModel):
        self.paged = paged

    def __call__(self) -> list:
        size = _asked_size()
        if size is not None and self.paged.has_default_cache:
            log.warning("max_kv_size=%d: mlx-lm's rotating cache is used, which is not paged", size)
            return [stock.RotatingKVCache(size, keep=4) for _ in self.paged.model.layers]
        return self.paged.make_cache()


def _asked_size() -> int | None:
    """``max_kv_size`` of the ``make_prompt_cache`` that is calling, if it is.

    It has no other way here: mlx-lm does not pass it on to ``make_cache``, and would without
    one make caches of that size.
    """
    frame = sys._getframe(2)
    if frame.f_code is stock.make_prompt_cache.__code__:
        return frame.f_locals.get("max_kv_size")
    return None
