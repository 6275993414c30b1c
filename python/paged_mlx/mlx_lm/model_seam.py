"""The seam on a model: ``make_cache`` on the instance, which mlx-lm asks for prompt caches."""

import logging
import sys

from mlx_lm.models import cache as stock

log = logging.getLogger("paged_mlx")


def paged_model_of(model):
    """What ``enable`` returned for this model, while it is enabled."""
    make_cache = getattr(model, "make_cache", None)
    ours = isinstance(make_cache, MakeCache) and make_cache.paged.model is model
    return make_cache.paged if ours else None


class MakeCache:
    """``model.make_cache`` of an enabled model."""

    def __init__(self, paged):
        self.paged = paged

    def __call__(self) -> list:
        size = asked_size()
        if size is not None and self.paged.has_default_cache:
            log.warning("max_kv_size=%d: mlx-lm's rotating cache is used, which is not paged", size)
            return [stock.RotatingKVCache(size, keep=4) for _ in self.paged.model.layers]
        return self.paged.make_cache()

    def __deepcopy__(self, memo):
        """A copy of the model is another model, with weights of its own: not enabled."""
        return self.paged.make_cache_of_copy(memo)


class DefaultMakeCache:
    """``make_cache`` of a copy of an enabled model whose caches mlx-lm decides on."""

    def __init__(self, model):
        self.model = model

    def __call__(self) -> list:
        size = asked_size()
        if size is not None:
            return [stock.RotatingKVCache(size, keep=4) for _ in self.model.layers]
        return [stock.KVCache() for _ in self.model.layers]


def asked_size() -> int | None:
    """``max_kv_size`` of the ``make_prompt_cache`` that is calling, if it is.

    It has no other way here: mlx-lm does not pass it on to ``make_cache``, and would without
    one make caches of that size.
    """
    frame = sys._getframe(2)
    if frame.f_code is stock.make_prompt_cache.__code__:
        return frame.f_locals.get("max_kv_size")
    return None


def asked_by_model() -> bool:
    """Whether the caller of the property that asks this is code of a model.

    To mlx-lm ``state`` is what it evaluates and saves. Models of mlx-lm up to 0.31.3 and of
    mlx-vlm that share K and V between layers take them from there.
    """
    module = sys._getframe(2).f_globals.get("__name__", "")
    package, _, name = module.partition(".models.")
    return package in ("mlx_lm", "mlx_vlm") and name not in ("", "cache")
