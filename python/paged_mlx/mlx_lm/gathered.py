"""What our caches hand to a model: arrays that know which pages they stand for.

A ``GatheredKV`` is a real array, a gather that has not run. The attention hook takes the
pages it names and the gather never runs; anything else a model does with it runs it.
"""

from dataclasses import dataclass

import mlx.core as mx


@dataclass(eq=False, slots=True)
class PagesOfLayer:
    """Where one layer's K and V of one step lie."""

    group: object
    layer: int
    step: object
    batched: bool


class GatheredKV(mx.array):
    """K or V of one layer, contiguous, not yet gathered.

    Attributes:
        source: The pages it stands for.
        is_key: Whether it is K.
    """

    __slots__ = ("source", "is_key")

    def __init__(self, lazy: mx.array, source: PagesOfLayer, is_key: bool):
        super().__init__(lazy)
        self.source = source
        self.is_key = is_key

    def astype(self, dtype: mx.Dtype, stream=None) -> mx.array:
        """The same K or V: in float32 it stands for the pages still, since nothing is lost."""
        lazy = super().astype(dtype, stream=stream)
        return GatheredKV(lazy, self.source, self.is_key) if dtype == mx.float32 else lazy


class PagedMask(mx.array):
    """A causal mask over gathered columns, built only if something but our hook reads it.

    Attributes:
        group: The group of layers it is for.
        window: Keys a token may see, its own included; None: all.
        starts: Tokens of each sequence before the step.
        num_tokens: Query tokens of a row.
    """

    __slots__ = ("group", "window", "starts", "num_tokens")

    def __init__(self, lazy: mx.array, group, window, starts, num_tokens):
        super().__init__(lazy)
        self.group = group
        self.window = window
        self.starts = starts
        self.num_tokens = num_tokens
