"""The native module over the stand-in, built in the user's cache.

The project's build for mutants lies there too: what does not know MLX's Metal device is taken
from it, the rest is compiled again, as for a Mac and unoptimised.
"""

import hashlib
import os
import re
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mutants import native
from mutants.mutant import ROOT, Mutant

_NATIVE = Path(__file__).parent / "native"
_OWN = ("device.cpp", "module.cpp")
_FLAGS = ("-D_METAL_", f"-I{_NATIVE}")
#: What is another thing for a GPU.
_FOR_A_GPU = {"ops/dispatch.h", "metal/mlx_encoder.h"}
_INCLUDE = re.compile(r'^#include "(.+)"', re.MULTILINE)


def build(mutant: Mutant | None = None) -> Path:
    """The module, from the cache when its sources have not changed; with a fault in one of them."""
    base = native.project()
    sources = _sources()
    texts = [path.read_text() for path in sorted(_NATIVE.rglob("*.*"))]
    key = hashlib.sha256("\0".join([base.identity, *_FLAGS, *texts]).encode()).hexdigest()[:24]
    folder = native.cache() / f"contract-{key}"
    objects = {source: folder / f"{i}.o" for i, source in enumerate(sources)}
    with native.only_one(native.lock_of(base.directory)):
        if all(path.exists() for path in objects.values()):
            os.utime(folder)
        else:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            _forget_others(folder)
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(lambda item: _compile(base, *item), objects.items()))
    name = native.MODULE if mutant is None else f"{_digest(mutant)}.so"
    module = folder / name
    if not module.exists():
        partial = folder / f"{os.getpid()}.{threading.get_ident()}.{name}"
        if mutant is not None:
            objects[mutant.file] = _mutated(base, mutant, folder)
        _link(base, objects, partial)
        os.replace(partial, module)
        if mutant is not None:
            objects[mutant.file].unlink()
    return module


def _sources() -> list[str]:
    """Sources that are compiled again, by path below the project."""
    found = [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "csrc").rglob("*.cpp"))
        if _FOR_A_GPU & _included(path)
    ]
    return [*found, *(str((_NATIVE / name).relative_to(ROOT)) for name in _OWN)]


def _included(path: Path) -> set[str]:
    """Headers of the project that a source includes, and those that they include."""
    found, unread = set(), [path]
    while unread:
        for name in _INCLUDE.findall(unread.pop().read_text()):
            header = ROOT / "csrc" / name
            if name not in found and header.exists():
                found.add(name)
                unread.append(header)
    return found


def _compile(base: native.Project, source: str, output: Path, changed: Path | None = None) -> None:
    partial = output.with_suffix(f".{os.getpid()}")
    is_own = (ROOT / source).is_relative_to(_NATIVE)
    like = "csrc/bindings/module.cpp" if is_own else source
    around = ["-iquote", str((ROOT / source).parent)]
    base.compile(like, changed or ROOT / source, partial, first=[*_FLAGS, *around])
    os.replace(partial, output)


def _mutated(base: native.Project, mutant: Mutant, folder: Path) -> Path:
    changed = folder / f"{_digest(mutant)}.{os.getpid()}.cpp"
    changed.write_text(mutant.text)
    output = changed.with_suffix(".o")
    _compile(base, mutant.file, output, changed)
    changed.unlink()
    return output


def _link(base: native.Project, objects: dict[str, Path], output: Path) -> None:
    own = {source for source in objects if (ROOT / source).is_relative_to(_NATIVE)}
    replaced = {source: path for source, path in objects.items() if source not in own}
    device, module = (objects[str((_NATIVE / name).relative_to(ROOT))] for name in _OWN)
    replaced["csrc/bindings/module.cpp"] = module
    base.link(replaced, output, last=[str(device)])


def _digest(mutant: Mutant) -> str:
    return hashlib.sha256(f"{mutant.file}\0{mutant.text}".encode()).hexdigest()[:24]


def _forget_others(folder: Path) -> None:
    """Leave the builds that were used last, one for each work tree or so."""
    built = sorted(native.cache().glob("contract-*"), key=lambda path: path.stat().st_mtime)
    for old in built[:-8]:
        if old != folder:
            shutil.rmtree(old, ignore_errors=True)


if __name__ == "__main__":
    print(build(), file=sys.stdout)
