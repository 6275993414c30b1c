"""Which module runs operations on quantised pages."""

from __future__ import annotations

from types import ModuleType

from paged_mlx._native import _ext


def module_for(formats: tuple) -> ModuleType:
    """The native module where it has these formats, else MLX's own operations."""
    if formats == (None, None) or hasattr(_ext, "seal_pages"):
        return _ext
    from paged_mlx import fallback

    return fallback
