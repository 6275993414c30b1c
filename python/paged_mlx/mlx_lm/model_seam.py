"""The seam on a model: ``make_cache`` on the instance, which mlx-lm asks for prompt caches."""

import copy
import types
import weakref

from mlx_lm.models import cache as stock

_enabled: weakref.WeakValueDictionary = weakref.WeakValueDictionary()  # by the id of the model


def paged_model_of(model):
    """The ``PagedModel`` of this model, while it is enabled."""
    paged = _enabled.get(id(model))
    return paged if paged is not None and paged.model is model else None


def enabled_models() -> list:
    """The ``PagedModel`` of every model that is enabled."""
    return list(_enabled.values())


def stock_caches(model) -> list:
    """The caches that mlx-lm makes for a model that does not make its own."""
    return [stock.KVCache() for _ in model.layers]


class MakeCache:
    """``model.make_cache`` of an enabled model; one for each time that it is enabled."""

    def __init__(self, paged):
        self.paged = paged
        self._own = vars(paged.model).get("make_cache")
        self._before = getattr(paged.model, "make_cache", None)
        if isinstance(self._before, MakeCache):  # a model that is enabled is being explained
            self._own, self._before = self._before._own, self._before._before
        self._is_installed = False

    def __call__(self) -> list:
        return self.paged.make_cache() if self._is_installed else self.stock_cache()

    @property
    def is_the_models(self) -> bool:
        """Whether the model, not mlx-lm, decides on the kind of cache."""
        return self._before is not None

    def stock_cache(self) -> list:
        """The model's prompt cache as it is without us."""
        return stock_caches(self.paged.model) if self._before is None else self._before()

    def install(self) -> None:
        self._is_installed = True
        _enabled[id(self.paged.model)] = self.paged
        self.paged.model.make_cache = self

    def uninstall(self) -> None:
        """Take ours away, and leave what others have put in its place since."""
        model = self.paged.model
        self._is_installed = False
        _enabled.pop(id(model), None)
        if vars(model).get("make_cache") is self:
            del model.make_cache
            if self._own is not None:
                model.make_cache = self._own

    def __deepcopy__(self, memo):
        """A copy of the model is another model, with weights of its own: not enabled."""
        model = memo.get(id(self.paged.model), self.paged.model)
        if self._own is not None:
            return copy.deepcopy(self._own, memo)
        if hasattr(type(model), "make_cache"):
            return types.MethodType(type(model).make_cache, model)
        return lambda: stock_caches(model)
