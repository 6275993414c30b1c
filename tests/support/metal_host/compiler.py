"""The C++ compiler that stands in for Metal's, and the cache of what it made."""

import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path

_KEPT_LIBRARIES = 4000


class MetalHostError(RuntimeError):
    """A kernel that does not compile, or a launch that found something fatal."""


@dataclass(frozen=True)
class Compiler:
    """A clang, 18 or newer.

    Attributes:
        command: What to run, as a list of words.
        identity: Changes whenever the compiler does; part of every cache key.
        flags: Added to every compile: the CPU, in this driver's spelling.
        link_flags: Added to every link.
    """

    command: tuple[str, ...]
    identity: str
    flags: tuple[str, ...]
    link_flags: tuple[str, ...] = ()

    def run(self, arguments, what: str, text: str | None = None) -> tuple[str, str]:
        """Run the compiler; return its stdout and stderr.

        Raises:
            MetalHostError: The compiler refused; the message is its own.
        """
        done = subprocess.run(
            [*self.command, *arguments], input=text, capture_output=True, text=True
        )
        if done.returncode:
            raise MetalHostError(f"{what} failed:\n{done.stderr[:6000]}")
        return done.stdout, done.stderr


def unsupported() -> str | None:
    """Why kernels cannot run on this machine, or None when they can."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return (
            f"the Metal host runs on x86-64 Linux; this is {platform.machine()} {platform.system()}"
        )
    if importlib.util.find_spec("ziglang") is None and shutil.which("clang++") is None:
        return "the Metal host needs the ziglang wheel or a clang++; run: pip install ziglang"
    return None


@functools.cache
def find_compiler(name: str | None = None) -> Compiler:
    """The compiler called `name`, or the default.

    Args:
        name: A clang++ on the path. Default: the ziglang wheel of this Python,
            else `clang++`.

    Raises:
        MetalHostError: There is none.
    """
    wheel = importlib.util.find_spec("ziglang")
    if name is None and wheel is not None:
        zig = str(Path(wheel.origin).with_name("zig"))
        identity = "ziglang " + importlib.metadata.version("ziglang")
        return Compiler((zig, "c++"), identity, ("-march=x86_64_v3",), ("-Wl,-z,undefs",))
    path = shutil.which(name or "clang++")
    if path is None:
        raise MetalHostError(unsupported() or f"no compiler called {name}")
    changed = os.stat(os.path.realpath(path)).st_mtime_ns
    return Compiler((path,), f"{os.path.realpath(path)} {changed}", ("-march=x86-64-v3",))


@functools.cache
def cache_directory() -> Path:
    """Where compiled kernels stay: $XDG_CACHE_HOME or ~/.cache, paged_mlx/metal_host."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    directory = Path(root) / "paged_mlx" / "metal_host"
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def digest(*parts: str) -> str:
    """A file name for what is made from `parts`."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def build(key: str, make) -> Path:
    """The shared library `key` of the cache; `make(path)` builds it when missing.

    `make` returns the compiler's warnings, kept beside the library as `.log`.
    """
    library = cache_directory() / f"{key}.so"
    with contextlib.suppress(FileNotFoundError):  # never made, or dropped by another process
        os.utime(library)
        return library
    partial = library.with_suffix(f".{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        library.with_suffix(".log").write_text(make(partial))
        os.replace(partial, library)
    finally:
        partial.unlink(missing_ok=True)
    prune(library.parent, _KEPT_LIBRARIES)
    return library


def prune(directory: Path, keep: int) -> None:
    """Leave the `keep` libraries of a directory that were used last; others may prune as well."""
    used = {}
    for library in directory.glob("*.so"):
        with contextlib.suppress(FileNotFoundError):
            used[library] = library.stat().st_mtime_ns
    for library in sorted(used, key=used.__getitem__)[: max(0, len(used) - keep)]:
        library.unlink(missing_ok=True)
        library.with_suffix(".log").unlink(missing_ok=True)
