"""``paged-mlx build``: the native module for the mlx that is installed.

Compiles the sources that the package carries, against the headers in mlx's own wheel, into the
user's cache, where the next import finds it. Needs a C++20 compiler, CMake and ninja.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import paged_mlx
from paged_mlx.machine.cache import scratch_folder


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
    if _native.BUILT and not force:
        folder = Path(_native._ext.__file__).parent
        return f"There is a native module for mlx {version} already: {folder}"
    source = sources()
    if lacks := _script(source, "compiler").missing():
        raise CannotBuild(lacks)
    cmake, ninja = _tool("cmake", _oldest_cmake(source)), _tool("ninja")
    try:
        with scratch_folder(target.parent, ".building-") as scratch:
            made = _compile(version, source, scratch, cmake, ninja)
            target.mkdir(exist_ok=True)
            for file in (made / name).iterdir():  # one, named after the Python that it is for
                os.replace(file, target / file.name)
    except OSError as error:
        must = f"{target.parent} must be a folder that can be written"
        raise CannotBuild(f"{must} (XDG_CACHE_HOME names another): {error}") from error
    return f"The native module for mlx {version} is built: {target}"


def _compile(version: str, source: Path, scratch: Path, cmake: str, ninja: str) -> Path:
    """Compile in a scratch folder; return the folder of what was made."""
    try:  # what CMake will ask for: headers may have to be downloaded
        _script(source, "mlx_releases").roots(version, scratch / "releases")
    except SystemExit as error:
        raise CannotBuild(str(error)) from error
    _run(
        [
            cmake, "-G", "Ninja", "-S", source, "-B", scratch, f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DPython_EXECUTABLE={sys.executable}", "-DCMAKE_BUILD_TYPE=Release",
            "-DPAGED_MLX_STUB=OFF", f"-DPAGED_MLX_FOR={version}",
            "-DPAGED_MLX_CORE_KIND=OBJECT", f"-DPAGED_MLX_RPATH={_mlx_library()}",
        ]
    )  # fmt: skip
    _run([cmake, "--build", scratch])
    return scratch / "native"


def _script(source: Path, name: str):
    """A script of the build, as a module."""
    spec = spec_from_file_location(f"_paged_mlx_{name}", source / "cmake" / f"{name}.py")
    assert spec and spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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


def _mlx_library() -> Path:
    import mlx.core as mx

    return Path(mx.__file__).parent / "lib"


def _oldest_cmake(source: Path) -> tuple[int, ...]:
    return _numbers((source / "CMakeLists.txt").read_text())


def _numbers(text: str) -> tuple[int, ...]:
    """The first version in a text, as far as it decides: ``(3, 27)``."""
    found = re.search(r"(\d+)\.(\d+)", text)
    return tuple(map(int, found.groups())) if found else ()


def _tool(name: str, oldest: tuple[int, ...] = ()) -> str:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    found = shutil.which(name, path=path)
    if found is None:
        raise CannotBuild(f"A build needs {name}: pip install {name}.")
    if oldest:
        said = subprocess.run([found, "--version"], capture_output=True, text=True).stdout
        if _numbers(said) < oldest:
            least, first = ".".join(map(str, oldest)), (said.splitlines() or ["nothing"])[0]
            raise CannotBuild(
                f"A build needs {name} {least} or newer, and {found} is {first}: pip install {name}."
            )
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
