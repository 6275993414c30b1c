"""The caches of a model that can be pages, and the shapes that each layer will write."""

import logging
from dataclasses import dataclass, field

import mlx.core as mx
from mlx_lm.models import cache as stock

from paged_mlx.forward.group import geometry_of
from paged_mlx.mlx_lm.vlm import attending

log = logging.getLogger("paged_mlx")


@dataclass
class CachePlace:
    """One cache of the model that holds K and V.

    Attributes:
        window: Keys a token may see; None: all.
        layer: Its number among the caches of that window.
    """

    window: int | None
    layer: int


@dataclass
class Layout:
    """The caches of a model, nested as its ``make_cache`` nests them.

    Attributes:
        places: For each cache a CachePlace, a list of them, or why it stays as it is.
        num_layers: Layers of each window.
    """

    places: list = field(default_factory=list)
    num_layers: dict = field(default_factory=dict)

    @classmethod
    def of(cls, caches) -> "Layout":
        layout = cls()
        layout.places = [layout._place(cache) for cache in caches]
        return layout

    def _place(self, cache):
        kind = kind_of(cache)
        if kind == "CacheList":
            return [self._place(part) for part in cache.caches]
        if kind == "KVCache":
            window = None
        elif kind == "RotatingKVCache" and cache.keep == 0:
            window = cache.max_size
        elif kind == "RotatingKVCache":
            return "it keeps the first tokens beside its window"
        else:
            return f"{type(cache).__name__} holds no pages of K and V"
        layer = self.num_layers.get(window, 0)
        self.num_layers[window] = layer + 1
        return CachePlace(window, layer)


def kind_of(cache) -> str | None:
    """The class of a cache of mlx-lm, or of mlx-vlm, which has its own of the same contract."""
    kind = type(cache)
    known = kind.__module__ in ("mlx_lm.models.cache", "mlx_vlm.models.cache")
    return kind.__name__ if known else None


def unpaged(caches, places):
    """(cache, why) for each cache that stays as it is."""
    for cache, place in zip(caches, places):
        if isinstance(place, list):
            yield from unpaged(cache.caches, place)
        elif not isinstance(place, CachePlace):
            yield cache, place


def build(places, caches, make) -> list:
    """``caches`` with those that have a place replaced by ``make(place)``."""
    return [_build(place, cache, make) for place, cache in zip(places, caches)]


def _build(place, cache, make):
    if isinstance(place, CachePlace):
        return make(place)
    if isinstance(place, list):
        return type(cache)(*build(place, cache.caches, make))
    return cache


class GeometryProbe(stock.KVCache):
    """Takes down what a layer writes; in a pipeline models order what it returns after what they send."""

    def __init__(self, place, found: dict):
        super().__init__()
        self._place = place
        self._found = found
        self.has_attended = False

    def update_and_fetch(self, keys, values):
        self._found[self._place.window, self._place.layer] = geometry_of(keys, values)
        self.keys, self.values = keys, values
        return keys, values

    def attend(self, queries, keys, values, scale, mask):
        self.has_attended = True
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)


def probe_geometry(model, caches, places) -> tuple[dict, bool]:
    """What each layer writes, {(window, layer): geometry}, and whether all have their caches attend.

    Builds the graph of one token and evaluates nothing. A model that cannot be called
    this way has an empty answer: then each layer gets a pool of its own, when it writes.
    """
    found: dict[tuple, tuple] = {}
    probes: list[GeometryProbe] = []

    def probe(place):
        probes.append(attending(GeometryProbe, model)(place, found))
        return probes[-1]

    try:
        model(mx.zeros((1, 1), mx.int32), cache=build(places, caches, probe))
    except Exception as error:
        log.debug("the layers of %s are not known beforehand: %s", type(model).__name__, error)
        return {}, False
    num_attended = sum(probe.has_attended for probe in probes)
    return found, num_attended > 0 and num_attended == len(model.layers)
