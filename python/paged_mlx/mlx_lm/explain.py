"""The layers of a model that read pages, and why the others do not."""

from contextlib import ExitStack
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn

from paged_mlx.forward.hook import ATTENTION
from paged_mlx.forward.routes import routes_of
from paged_mlx.mlx_lm.enable import PagedModel, check_model
from paged_mlx.mlx_lm.layout import CachePlace
from paged_mlx.mlx_lm.model_seam import paged_model_of

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
        calls: Attention calls so far by route, of a model that is enabled; see
            ``PagedModel.routes``.
    """

    name: str
    window: int | None
    is_paged: bool
    reason: str | None = None
    calls: dict[str, int] = field(default_factory=dict)

    def __str__(self):
        window = f"window {self.window}" if self.window else ""
        calls = ", ".join(f"{count} {route}" for route, count in self.calls.items())
        so_far = f"  (calls so far: {calls})" if calls else ""
        return f"{self.name:>5}  {window:<12} {'paged' if self.is_paged else self.reason}{so_far}"


@dataclass(frozen=True, repr=False)
class Explanation:
    """How every cache of a model is read.

    Attributes:
        model: Its family.
        layers: One for each cache.
        calls: Attention calls so far by route, of a model that is enabled.
        declined: How often prompts were not looked for or not remembered so far, by reason.
    """

    model: str
    layers: list[LayerRoute]
    calls: dict[str, int] = field(default_factory=dict)
    declined: dict[str, int] = field(default_factory=dict)

    @property
    def num_paged(self) -> int:
        return sum(layer.is_paged for layer in self.layers)

    def __str__(self):
        title = f"{self.model}: {self.num_paged} of {len(self.layers)} layers read pages"
        calls = ", ".join(f"{count} {route}" for route, count in self.calls.items())
        end = [f"calls so far: {calls}"] if calls else []
        end += [f"prefixes declined {n} times: {reason}" for reason, n in self.declined.items()]
        return "\n".join([title, *map(str, self.layers), *end])

    __repr__ = __str__


def explain(model: nn.Module) -> Explanation:
    """Say for each layer of a model of mlx-lm whether it reads pages, and why not.

    Builds the graph of a prompt and of a step, and evaluates neither. Of a model that is enabled
    it says too which routes its attention has taken so far.

    Raises:
        ValueError: It is no such model, or no cache of it can be paged.

    Examples:
        >>> from mlx_lm.models import llama
        >>> sizes = dict(hidden_size=64, intermediate_size=64, vocab_size=100, rms_norm_eps=1e-5)
        >>> heads = dict(num_hidden_layers=2, num_attention_heads=4)
        >>> print(explain(llama.Model(llama.ModelArgs("llama", **sizes, **heads))))
        llama: 2 of 2 layers read pages
            0               paged
            1               paged
    """
    check_model("explain", model)
    paged = PagedModel(model, page_size=8, num_pages=1, retain=None, alone=True)
    paged.passes.computes = False
    with ExitStack() as seams:  # the model itself is left as it is: another thread may use it
        if not paged.caches_attend:
            ATTENTION.install()
            seams.callback(ATTENTION.uninstall)
        cache = paged.make_cache()
        for tokens in (4, 1):
            model(mx.zeros((1, tokens), mx.int32), cache=cache)
    in_use = paged_model_of(model)
    routes = list(_routes(paged, in_use, paged.layout.places, ""))
    family = type(model).__module__.removeprefix("mlx_lm.models.")
    if in_use is None:
        return Explanation(family, routes)
    declined = {} if in_use.prefixes is None else dict(in_use.prefixes.declined)
    return Explanation(family, routes, in_use.routes, declined)


def _routes(paged, in_use, places, prefix):
    for i, place in enumerate(places):
        name = f"{prefix}{i}"
        if isinstance(place, CachePlace):
            reason = _reason(paged.groups[place.window], place.layer)
            calls = {}
            if in_use is not None:
                calls = routes_of([in_use.groups[place.window]], place.layer)
            yield LayerRoute(name, place.window, reason is None, reason, calls)
        elif isinstance(place, list):
            yield from _routes(paged, in_use, place, f"{name}.")
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
