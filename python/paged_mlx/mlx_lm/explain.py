"""Which layers of a model read pages, and why the others do not."""

from dataclasses import dataclass

import mlx.core as mx

from paged_mlx.forward.hook import ATTENTION
from paged_mlx.mlx_lm.enable import PagedModel
from paged_mlx.mlx_lm.layout import CachePlace

OWN_ATTENTION = "the model computes attention itself, from gathered K and V"
NOT_WRITTEN = "nothing was written to it"


@dataclass(frozen=True)
class LayerRoute:
    """How one cache of a prompt cache is read.

    Attributes:
        name: Its place in the prompt cache: "3", or "3.0" inside a CacheList.
        window: Keys a token may see; None: all, or it is no cache of K and V.
        is_paged: Whether attention reads its pages.
        reason: Why not.
    """

    name: str
    window: int | None
    is_paged: bool
    reason: str | None = None

    def __str__(self):
        window = f"window {self.window}" if self.window else ""
        return f"{self.name:>5}  {window:<12} {'paged' if self.is_paged else self.reason}"


@dataclass(frozen=True, repr=False)
class Explanation:
    """How every cache of a model is read."""

    model: str
    layers: list[LayerRoute]

    @property
    def num_paged(self) -> int:
        return sum(layer.is_paged for layer in self.layers)

    def __str__(self):
        title = f"{self.model}: {self.num_paged} of {len(self.layers)} layers read pages"
        return "\n".join([title, *map(str, self.layers)])

    __repr__ = __str__


def explain(model) -> Explanation:
    """Say for each layer of a model of mlx-lm whether it reads pages, and why not.

    Builds the graph of a prompt and of a step, and evaluates neither.

    Raises:
        ValueError: No cache of the model can be paged.
    """
    paged = PagedModel(model, page_size=8, num_pages=1, retain=None)
    paged.passes.computes = False
    ATTENTION.install()  # the model itself is left as it is: another thread may use it
    try:
        cache = paged.make_cache()
        for tokens in (4, 1):
            model(mx.zeros((1, tokens), mx.int32), cache=cache)
    finally:
        ATTENTION.uninstall()
    routes = list(_routes(paged, paged.layout.places, ""))
    return Explanation(type(model).__module__.removeprefix("mlx_lm.models."), routes)


def _routes(paged, places, prefix):
    for i, place in enumerate(places):
        name = f"{prefix}{i}"
        if isinstance(place, CachePlace):
            reason = _reason(paged.groups[place.window], place.layer)
            yield LayerRoute(name, place.window, reason is None, reason)
        elif isinstance(place, list):
            yield from _routes(paged, place, f"{name}.")
        else:
            yield LayerRoute(name, None, False, place)


def _reason(group, layer: int) -> str | None:
    """Why the calls of a layer did not read pages; None when all did."""
    if group.placed(layer) is None:
        return NOT_WRITTEN
    reasons = group.reasons(layer)
    if not reasons:
        return OWN_ATTENTION
    return next((reason for reason in reasons if reason is not None), None)
