"""The native module for the mlx that is installed.

The package carries one module for each release of mlx, ``native/mlx_<release>/_ext``, and
``python -m paged_mlx build`` puts one more into the user's cache. The folder of the right one joins the
package's path before anything imports ``paged_mlx._ext``, so a module of another release cannot be
loaded.
"""

import platform
import sys
import warnings
from importlib import metadata
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

try:
    import mlx.core as mx  # loads libmlx and registers mx.array first
except ImportError as error:
    raise ImportError(
        "paged_mlx needs MLX and a library for it to run on: pip install "
        + ("mlx" if sys.platform == "darwin" else '"mlx[cpu]" (or "mlx[cuda]")')
    ) from error

import paged_mlx
from paged_mlx.machine.cache import cache_directory

OLDEST = "0.31.2"  #: the oldest mlx that the package runs beside


def mlx_version() -> str:
    """The version of the mlx that is imported."""
    return mx.__version__  # type: ignore[attr-defined]  # stubs leave it out


def release(version: str) -> str:
    """The release of a version of mlx: without a development or local part."""
    return version.split(".dev")[0].split("+")[0]


def folder_name(version: str) -> str:
    """The folder of the native module for a version of mlx."""
    return "mlx_" + release(version).replace(".", "_")


def user_cache() -> Path:
    """Where modules that were built on this machine lie."""
    return cache_directory("native") / paged_mlx.__version__


def folders(version: str) -> list[Path]:
    """Folders that may hold the native module for a version of mlx, in the order of trust."""
    packaged = [Path(entry) / "native" for entry in paged_mlx.__path__]
    return [root / folder_name(version) for root in [*packaged, user_cache()]]


def releases() -> list[str]:
    """The releases of mlx that there is a native module for, for this Python."""
    every = [folder for any_of in folders("0") for folder in any_of.parent.glob("mlx_*")]
    found = {
        folder.name.removeprefix("mlx_").replace("_", ".")
        for folder in every
        if holds_module(folder)
    }
    return sorted(found, key=_numbers)


def _numbers(version: str) -> list[int]:
    return [int(part) for part in release(version).split(".")]


def holds_module(folder: Path) -> bool:
    """Whether a folder holds a native module that this Python can load."""
    return any((folder / f"_ext{suffix}").is_file() for suffix in EXTENSION_SUFFIXES)


def _import():
    if mx.cuda.is_available():
        raise ImportError("paged_mlx has kernels for Apple's GPUs and for CPUs, none for CUDA")
    this = f"mlx {release(mlx_version())} and Python {platform.python_version()}"
    here = [folder for folder in folders(mlx_version()) if holds_module(folder)]
    if not here:
        others = ", ".join(releases())
        others = others and f" (there are modules for mlx {others})"
        raise ImportError(f"paged_mlx has no native module for {this}{others}")
    for folder in here:  # the next where one cannot be loaded
        paged_mlx.__path__.append(str(folder))
        try:
            return _loaded()
        except ImportError as error:
            paged_mlx.__path__.remove(str(folder))
            reason = error
    raise ImportError(f"paged_mlx cannot load its native module for {this} ({reason})")


def _loaded():
    from paged_mlx import _ext as module  # type: ignore[attr-defined]

    if (library := release(module.mlx_version)) != release(mlx_version()):
        places = ", ".join(f"{version} in {place}" for version, place in on_path())
        raise ImportError(
            f"mlx.core is of mlx {mlx_version()}, the library that was loaded of mlx {library}; on "
            f"the path are {places}: leave one of them"
        )
    return module


def on_path() -> list[tuple[str, str]]:
    """Version and folder of every mlx on this process's path; the first is imported."""
    found = metadata.distributions(name="mlx")
    return list(dict.fromkeys((mlx.version, str(mlx.locate_file(""))) for mlx in found))


def _fallback(error: ImportError):
    """MLX's own operations, and one warning that says how to do better."""
    advice = "" if mx.cuda.is_available() else " `python -m paged_mlx build` makes one."
    warnings.warn(
        f"{error}, so MLX's own operations do the work: right, slower, and with more memory.{advice}",
        RuntimeWarning,
        stacklevel=2,
    )
    from paged_mlx import fallback

    return fallback


if _numbers(mlx_version()) < _numbers(OLDEST):
    raise ImportError(
        f"paged_mlx needs mlx {OLDEST} or newer; this is mlx {mlx_version()}: "
        "pip install --upgrade mlx"
    )
_ext: Any
try:
    _ext = _import()
    BUILT = True  #: whether the operations are the native module's
except ImportError as error:
    _ext = _fallback(error)
    BUILT = False


def backend() -> str:
    """Which operations run: of the native module, or MLX's own.

    Examples:
        >>> paged_mlx.backend().split()[0] in ("native", "fallback:")
        True
    """
    if not BUILT:
        return f"fallback: MLX's own operations, mlx {mlx_version()}"
    return f"native module for mlx {release(mlx_version())}: {_ext.__file__}"
