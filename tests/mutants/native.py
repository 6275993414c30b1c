"""The native module with one source changed, built in the user's cache.

A CMake build of the project, unoptimised, lies in the cache and follows the tree. A mutant takes
its compile command for the source that changed, its link command for the rest. Neither the
tree nor the installed module is written to.
"""

import fcntl
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import threading
from contextlib import contextmanager, suppress
from pathlib import Path

import mlx.core as mx
from paged_mlx import _native

from .mutant import ROOT, Mutant

#: Where the build leaves the module, below its folder.
_BUILT = f"native/{_native.folder_name(mx.__version__)}/_ext" + sysconfig.get_config_var(
    "EXT_SUFFIX"
)
MODULE = Path(_BUILT).name
_KEPT = 300
#: The last word on optimisation, after what the sources ask for.
_COMPILE = "<CMAKE_CXX_COMPILER> <DEFINES> <INCLUDES> <FLAGS> -O0 -o <OBJECT> -c <SOURCE>"
#: The instruction set that mutants of the CPU backend run with: every machine of its kind has it.
ISA = "v2" if platform.machine() in ("x86_64", "AMD64") else "neon"


class BuildError(RuntimeError):
    """CMake, the compiler or the linker refused."""


def unsupported() -> str | None:
    """Why the native module cannot be built here, or None."""
    missing = [tool for tool in ("cmake", "ninja") if _tool(tool) is None]
    return (
        f"mutants need {' and '.join(missing)}; run: pip install {' '.join(missing)}"
        if missing
        else None
    )


@functools.cache
def cache() -> Path:
    """Where builds stay: $XDG_CACHE_HOME or ~/.cache, paged_mlx/mutants."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    directory = Path(root) / "paged_mlx" / "mutants"
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def build(mutant: Mutant) -> Path:
    """The module with the fault, from the cache when its sources have not changed.

    Raises:
        BuildError: The mutant, or the project, does not compile.
    """
    base = project()
    key = hashlib.sha256("\0".join([base.identity, mutant.file, mutant.text]).encode())
    module = cache() / "modules" / f"{key.hexdigest()[:24]}.so"
    if module.exists():
        os.utime(module)
        return module
    work = cache() / "work" / f"{module.stem}.{os.getpid()}"
    work.mkdir(parents=True)
    try:
        objects = _compile(mutant, base, work)
        made = base.link(objects, work / MODULE)
        module.parent.mkdir(exist_ok=True)
        os.replace(made, module)
    finally:
        shutil.rmtree(work)
    _prune(module.parent)
    return module


class Project:
    """The unchanged project, built."""

    def __init__(self, directory: Path):
        self.directory = directory
        ninja = [_tool("ninja"), "-C", str(directory)]
        commands = _run([*ninja, "-t", "commands", _BUILT]).splitlines()
        self.commands = {_source(line): line for line in commands if " -c " in line}
        link = next(line for line in commands if f" -o {_BUILT}" in line)
        self.link_line = next(part for part in link.split(" && ") if f" -o {_BUILT}" in part)
        digest = hashlib.sha256(self.link_line.encode())
        for path in _sources():
            digest.update(path.read_bytes())
        self.identity = digest.hexdigest()

    def object_of(self, source: str) -> str:
        words = shlex.split(self.commands[str(ROOT / source)])
        return words[words.index("-o") + 1]

    def compile(self, source: str, changed: Path, output: Path, first=(), last=()) -> None:
        """Compile ``changed`` as ``source`` is compiled, with more words before and after."""
        words = shlex.split(self.commands[str(ROOT / source)])
        for option in ("-MT", "-MF"):
            if option in words:
                at = words.index(option)
                del words[at : at + 2]
        words = [word for word in words if word != "-MD"]
        words[words.index("-o") + 1] = str(output)
        words[words.index("-c") + 1] = str(changed)
        at = next(i for i, word in enumerate(words) if word.startswith("-"))  # the launcher before
        _run([*words[:at], *first, *words[at:], *last], self.directory)

    def link(self, objects: dict[str, Path], output: Path, last=()) -> Path:
        """Link with some sources' objects replaced, and with more words after the rest."""
        replaced = {self.object_of(source): str(path) for source, path in objects.items()}
        words = [replaced.get(word, word) for word in shlex.split(self.link_line)]
        words[words.index("-o") + 1] = str(output)
        _run([*words, *last], self.directory)
        return output


def _compile(mutant: Mutant, base: Project, work: Path) -> dict[str, Path]:
    """Objects of the sources that the changed file is part of."""
    changed = work / "overlay" / Path(mutant.file).relative_to("csrc")
    changed.parent.mkdir(parents=True)
    changed.write_text(mutant.text)
    source = mutant.file if changed.suffix == ".cpp" else f"csrc/cpu/isa_{ISA}.cpp"
    changed_source = changed if source == mutant.file else ROOT / source
    # Where quoted names are looked for: <limits.h> is not the one beside the file.
    includes = ["-iquote", str(work / "overlay"), "-iquote", str((ROOT / mutant.file).parent)]
    base.compile(source, changed_source, work / "changed.o", first=includes)
    return {source: work / "changed.o"}


_building = threading.Lock()


def project() -> Project:
    """The unchanged project, built on the first call."""
    with _building:
        return _build_project()


@functools.cache
def _build_project() -> Project:
    directory = cache() / (
        "base-" + hashlib.sha256(f"{ROOT}\0{sys.prefix}".encode()).hexdigest()[:12]
    )
    configure = [
        _tool("cmake"), "-G", "Ninja", "-S", str(ROOT), "-B", str(directory),
        f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}", f"-DPython_EXECUTABLE={sys.executable}",
        "-DCMAKE_BUILD_TYPE=Release", f"-DCMAKE_CXX_COMPILE_OBJECT={_COMPILE}",
        "-DCMAKE_CXX_COMPILER_LAUNCHER=",
        "-DPAGED_MLX_STUB=OFF", "-DPAGED_MLX_CORE_KIND=OBJECT",
    ]  # fmt: skip
    with only_one(lock_of(directory)):
        _run(configure)
        _run([_tool("cmake"), "--build", str(directory)])
    return Project(directory)


def lock_of(directory: Path) -> Path:
    """Held while a build changes."""
    return directory.with_suffix(".lock")


@contextmanager
def only_one(lock: Path):
    """Let one thread of one process in at a time."""
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _tool(name: str) -> str | None:
    """A program of this Python's environment, or of the path."""
    return shutil.which(
        name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    )


def _run(words: list[str], directory: Path = ROOT) -> str:
    done = subprocess.run(words, cwd=directory, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{Path(words[0]).name} failed:\n{(done.stdout + done.stderr)[-3000:]}")
    return done.stdout


def _source(line: str) -> str:
    words = shlex.split(line)
    return words[words.index("-c") + 1]


def _sources() -> list[Path]:
    folders = (ROOT / "csrc", ROOT / "kernels", ROOT / "cmake")
    found = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return sorted([ROOT / "CMakeLists.txt", *found])


def _prune(directory: Path) -> None:
    """Leave the modules that were used last."""
    used = {}
    for module in directory.glob("*.so"):
        with suppress(FileNotFoundError):  # another trial prunes as well
            used[module] = module.stat().st_mtime_ns
    for module in sorted(used, key=used.get)[: max(0, len(used) - _KEPT)]:
        module.unlink(missing_ok=True)
