"""Arrays that paged caches hand to a model, and that know which pages they stand for.

A ``GatheredKV``, a handle, is a real array whose gather has not run. The attention hook takes
the pages it names and the gather never runs; anything else a model does with it runs it.
"""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from paged_mlx._native import _ext

GatheredKV = _ext.GatheredKV


@dataclass(eq=False, slots=True)
class LayerPlace:
    """Where one layer's pages are.

    Attributes:
        group: The group of layers it is one of.
        layer: Its number there.
        pool, index: Its pool, and its number there.
    """

    group: Any
    layer: int
    pool: Any
    index: int


@dataclass(eq=False, slots=True)
class PagesOfLayer:
    """Where one layer's K and V of one step lie.

    Attributes:
        place: The layer.
        step: The step.
        keys, values: The step's K and V while they wait to be written; else None.
    """

    place: LayerPlace
    step: Any
    keys: mx.array | None = None
    values: mx.array | None = None


class PagedMask(mx.array):
    """A causal mask over gathered columns, built only if something but our hook reads it.

    Attributes:
        group: The group of layers it is for.
        window: Keys a token may see, its own included; None: all.
        starts: Tokens of each sequence before the step.
        num_tokens: Query tokens of a row.
    """

    __slots__ = ("group", "window", "starts", "num_tokens", "_made")

    def __init__(self, lazy: mx.array, group, window, starts, num_tokens):
        super().__init__(lazy)
        self.group = group
        self.window = window
        self.starts = starts
        self.num_tokens = num_tokens
        self._made = _ext.descriptor(self)

    @property
    def is_changed(self) -> bool:
        """Whether an operation in place (``mask &= other``) has made it another mask."""
        return _ext.descriptor(self) != self._made
