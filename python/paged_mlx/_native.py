"""The native module, or one clear sentence why it cannot be used."""

from typing import Any

import mlx.core as mx  # loads libmlx and registers mx.array first  # noqa: F401

_ext: Any
try:
    from paged_mlx import _ext  # type: ignore[no-redef]
except ImportError as error:
    # An undefined symbol: the installed libmlx has another ABI.
    _ext = None
    _load_error = error


def check_versions(mlx_version: str) -> None:
    """Raise ImportError unless the native module fits the installed mlx."""
    installed = mlx_version.split(".dev")[0].split("+")[0]
    if _ext is None:
        raise ImportError(
            f"paged_mlx's native module does not load with mlx {installed}: "
            f"install the mlx version that paged_mlx was built for ({_load_error})."
        ) from _load_error
    if _ext.mlx_build_version != installed:
        raise ImportError(
            f"paged_mlx was built for mlx {_ext.mlx_build_version}, but mlx {installed} is "
            f"installed: run `pip install mlx=={_ext.mlx_build_version}`, or rebuild paged_mlx."
        )
