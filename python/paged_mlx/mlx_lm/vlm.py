"""Models of mlx-vlm, whose attention asks a cache of one class to attend: nothing is replaced then."""

from functools import cache
from typing import Any


def attending(kind: Any, model) -> Any:
    """``kind`` for a model of mlx-vlm: a cache that its attention asks to attend, by its ``attend``."""
    if issubclass(kind, _Attends) or not type(model).__module__.startswith("mlx_vlm."):
        return kind
    return _attending(kind)


class _Attends:
    """What attention asks of mlx-vlm's TurboQuantKVCache, which holds K and V as its codes."""

    def decode_attention(self, queries, keys_state=None, values_state=None, scale=1.0, mask=None):
        return self.attend(queries, keys_state, values_state, scale, mask)

    prefill_attention = decode_attention

    def dequantize(self, keys_state=None, values_state=None):
        """With sinks mlx-vlm attends by itself, to K and V."""
        return keys_state, values_state


@cache
def _attending(kind: Any) -> type:
    try:
        from mlx_vlm.turboquant import TurboQuantKVCache
    except ImportError:  # a release in which no cache attends
        return kind
    return type(kind.__name__, (_Attends, kind, TurboQuantKVCache), {})
