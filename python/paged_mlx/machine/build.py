"""``paged-mlx build``: the native module for the mlx that is installed.

Compiles the sources that the package carries, against the headers in mlx's own wheel, into the
user's cache, where the next import finds it. Needs a C++20 compiler, CMake and ninja.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import paged_mlx


class CannotBuild(Exception):
    """Something that a build needs is missing, or it failed; the message says what to do."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="paged-mlx build", description=__doc__,
        epilog="examples:\n  paged-mlx build\n  paged-mlx build --force\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--force", action="store_true", help="build although there is a module")
    options = parser.parse_args(arguments)
    try:
        print(build(force=options.force))
    except CannotBuild as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def build(force: bool = False) -> str:
    """Build the module; return a sentence that says where it is.

    Raises:
        CannotBuild: A compiler, CMake or the sources are missing, or the build fails.
    """
    from paged_mlx import _native

    version = _native.release(_native.mlx_version())
    name = _native.folder_name(version)
    target = _native.user_cache() / name
    if not force:
        for folder in _native.folders(version):
            if _native.holds_module(folder):
                return f"There is a native module for mlx {version} already: {folder}"
    source = sources()
    cmake = _tool("cmake", "pip install cmake")
    ninja = _tool("ninja", "pip install ninja")
    compiler = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    if shutil.which(compiler[0]) is None:
        advice = "xcode-select --install" if sys.platform == "darwin" else "apt-get install g++"
        raise CannotBuild(f"There is no C++ compiler, {compiler[0]}: {advice}, or set CXX.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".building-", dir=target.parent))
    except OSError as error:
        raise CannotBuild(
            f"{target.parent} must be a folder that can be written: {error}"
        ) from error
    try:
        _run(
            [
                cmake, "-G", "Ninja", "-S", source, "-B", scratch, f"-DCMAKE_MAKE_PROGRAM={ninja}",
                f"-DPython_EXECUTABLE={sys.executable}", "-DCMAKE_BUILD_TYPE=Release",
                "-DPAGED_MLX_STUB=OFF", f"-DPAGED_MLX_FOR={version}",
                f"-DPAGED_MLX_CORE={core() or ''}", f"-DPAGED_MLX_RPATH={_rpath()}",
            ]
        )  # fmt: skip
        _run([cmake, "--build", scratch])
        made = scratch / "native" / name
        if not core():  # the module looks for it beside its own folder
            for library in (scratch / "native").glob("libpaged_mlx_core.*"):
                os.replace(library, target.parent / library.name)
        if target.exists():
            shutil.rmtree(target)
        os.replace(made, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return f"The native module for mlx {version} is built: {target}"


def sources() -> Path:
    """The sources: of the package, or of the checkout that it is part of.

    Raises:
        CannotBuild: There are none.
    """
    for entry in map(Path, paged_mlx.__path__):
        for folder in (entry / "sources", entry.parents[1]):
            if (folder / "CMakeLists.txt").is_file() and (folder / "csrc").is_dir():
                return folder
    raise CannotBuild("This installation of paged_mlx has no sources: install it anew with pip.")


def core() -> Path | None:
    """The library that all native modules of this installation share, if it has one."""
    for entry in map(Path, paged_mlx.__path__):
        for library in (entry / "native").glob("libpaged_mlx_core.*"):
            return library
    return None


def _rpath() -> str:
    import mlx.core as mx

    folders = [Path(mx.__file__).parent / "lib"]
    if library := core():
        folders.append(library.parent)
    return ";".join(map(str, folders))


def _tool(name: str, advice: str) -> str:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    found = shutil.which(name, path=path)
    if found is None:
        raise CannotBuild(f"A build needs {name}: {advice}.")
    return found


def _run(words: list[str | Path]) -> None:
    process = subprocess.Popen(list(map(str, words)), stdout=sys.stderr, start_new_session=True)
    try:
        status = process.wait()
    except BaseException:  # ctrl-C: its compilers end with it
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()
        raise
    if status:
        raise CannotBuild(f"{Path(words[0]).name} failed; its output is above.")
