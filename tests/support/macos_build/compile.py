"""Compiles the extension's sources for arm64 macOS with the ziglang wheel."""

import hashlib
import importlib.metadata
import json
import os
import shlex
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nanobind

from .wheels import SHA256, cache_directory, mlx_for_macos

ROOT = Path(__file__).resolve().parents[3]
NANOBIND = Path(nanobind.include_dir()).parent
FRAMEWORKS = Path(__file__).with_name("frameworks")
_FLAGS = (
    "-target aarch64-macos.14.0 -std=c++20 -O0 -fPIC -DNDEBUG -D_METAL_ -DACCELERATE_NEW_LAPACK "
    "-DNB_DOMAIN=mlx -fvisibility=hidden -fno-strict-aliasing -Wno-unused-command-line-argument"
).split()


class Refused(RuntimeError):
    """A source that does not compile for macOS; the message is the compiler's."""


def sources(*folders: str) -> list[Path]:
    """The sources below folders of ``csrc``; all without an argument."""
    roots = [ROOT / "csrc" / folder for folder in folders] or [ROOT / "csrc"]
    return sorted(path for root in roots for path in root.rglob("*.cpp"))


def nanobind_source() -> Path:
    return NANOBIND / "src" / "nb_combined.cpp"


def objects(paths: list[Path]) -> dict[Path, Path]:
    """The object of each source. One whose text and headers are unchanged is not compiled again.

    Raises:
        Refused: A source does not compile.
        NotAvailable: mlx for macOS is not to be had.
    """
    flags = [*_FLAGS, *_include_flags(_generated())]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(paths, pool.map(lambda path: _object(path, flags), paths), strict=True))


def _generated() -> Path:
    """The folder of the embedded kernel sources."""
    folder = cache_directory() / "generated" / _digest(*sorted((ROOT / "kernels").iterdir()))
    if not (folder / "kernel_sources.h").exists():
        embed = [str(ROOT / "cmake" / "embed_kernels.py"), str(ROOT / "kernels")]
        subprocess.run([sys.executable, *embed, str(folder / "kernel_sources.h")], check=True)
    return folder


def _include_flags(generated: Path) -> list[str]:
    mlx = mlx_for_macos() / "include"
    own = [ROOT / "csrc", ROOT / "kernels", generated, mlx, mlx / "metal_cpp"]
    own += [NANOBIND / "include", NANOBIND / "ext" / "robin_map" / "include"]
    # After the compiler's own: its Darwin headers come before Linux's of Python.
    late = [sysconfig.get_path("include"), FRAMEWORKS]
    return [f"-I{path}" for path in own] + [f for path in late for f in ("-idirafter", str(path))]


def _object(source: Path, flags: list[str]) -> Path:
    extra = ["-DNB_BUILD"] if source == nanobind_source() else []
    identity = [importlib.metadata.version("ziglang"), SHA256, *flags, *extra, str(source)]
    stem = hashlib.sha256("\0".join(identity).encode()).hexdigest()[:24]
    target = cache_directory() / f"{stem}.o"
    record = target.with_suffix(".json")
    if not _is_fresh(target, record):
        _compile(source, [*flags, *extra], target)
        used = _dependencies(target.with_suffix(".d"))
        record.write_text(json.dumps({str(path): _digest(path) for path in used}))
    return target


def _is_fresh(target: Path, record: Path) -> bool:
    if not target.exists() or not record.exists():
        return False
    used = json.loads(record.read_text())
    return all(Path(path).exists() and _digest(Path(path)) == known for path, known in used.items())


def _compile(source: Path, flags: list[str], target: Path) -> None:
    command = [sys.executable, "-m", "ziglang", "c++", *flags, "-MD", "-MF"]
    command += [str(target.with_suffix(".d")), "-c", str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        target.unlink(missing_ok=True)
        raise Refused(f"{source.relative_to(ROOT)}:\n{done.stderr[-6000:]}")


def _dependencies(path: Path) -> list[Path]:
    """Files of this checkout that an object was made from; the others are pinned."""
    words = shlex.split(path.read_text().replace("\\\n", " "))[1:]
    return [p for p in (Path(word).resolve() for word in words) if p.is_relative_to(ROOT)]


def _digest(*paths: Path) -> str:
    whole = hashlib.sha256()
    for path in paths:
        whole.update(path.read_bytes() + b"\0")
    return whole.hexdigest()[:24]
