"""Paged K and V for mlx-lm: ``paged_mlx.enable(model)``.

Two seams, and no edit of any model: prompt caches come from ``model.make_cache`` on the
instance, and ``mx.fast.scaled_dot_product_attention`` reads the pages that they name.
"""

try:
    import mlx_lm
except ImportError as error:
    raise ImportError("paged_mlx.enable needs mlx-lm: run `pip install mlx-lm`.") from error

from paged_mlx.mlx_lm import versions

versions.check(mlx_lm.__version__)

from paged_mlx.mlx_lm.cache import BatchPagedKVCache, PagedKVCache  # noqa: E402
from paged_mlx.mlx_lm.enable import PagedModel, enable  # noqa: E402
from paged_mlx.mlx_lm.explain import Explanation, LayerRoute, explain  # noqa: E402
from paged_mlx.mlx_lm.speculative import (  # noqa: E402
    SpeculativeBatchGenerator,
    speculative_batch_generate,
)
from paged_mlx.mlx_lm.store import PromptStore  # noqa: E402

__all__ = [
    "BatchPagedKVCache",
    "Explanation",
    "LayerRoute",
    "PagedKVCache",
    "PagedModel",
    "PromptStore",
    "SpeculativeBatchGenerator",
    "enable",
    "explain",
    "speculative_batch_generate",
]


def __dir__() -> list[str]:
    return sorted(__all__)
