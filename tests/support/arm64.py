"""The CPU backend for arm64, run on another machine: ``python tests/support/arm64.py``.

`tests/support/cpp/cpu_attention_test.cpp` and the backend, cross-compiled by the ziglang wheel
and run by qemu-user (Debian's and Ubuntu's package qemu-user-static).
"""

import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "tests" / "support" / "cpp" / "cpu_attention_test.cpp"
FLAGS = [
    "-std=c++20", "-O2", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'kernels'}",
]  # fmt: skip


def emulator() -> str | None:
    """The program that runs arm64 programs here; "" where the machine is one."""
    if platform.machine() in ("aarch64", "arm64"):
        return ""
    return shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")


def unsupported() -> str | None:
    """Why the backend for arm64 cannot be run here, or None."""
    if sys.platform != "linux":
        return "only Linux runs the arm64 build for Linux"
    if importlib.util.find_spec("ziglang") is None:
        return "cross-compiling for arm64 needs ziglang; run: pip install ziglang"
    if emulator() is None:
        return "running arm64 programs needs qemu; run: apt-get install qemu-user-static"
    return None


def build() -> Path:
    """The test program for arm64 Linux, from the user's cache where its sources are as they were."""
    sources = [PROGRAM, *sorted(_cpu_sources())]
    read = [
        *sources,
        *sorted((ROOT / "csrc").rglob("*.h")),
        *sorted((ROOT / "kernels").glob("*.h")),
    ]
    digest = hashlib.sha256("\0".join(FLAGS).encode())
    for path in read:
        digest.update(path.read_bytes())
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(root) / "paged_mlx" / "arm64" / digest.hexdigest()[:24]
    program = folder / "cpu_attention_test"
    if not program.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(lambda source: _compile(source, folder), sources))
        partial = folder / f"linking.{os.getpid()}"
        # Static, so that the emulator needs no libraries of arm64.
        _zig(["-static", "-o", str(partial), *map(str, objects)])
        os.replace(partial, program)
    return program


def run(program: Path) -> subprocess.CompletedProcess:
    """Run the program, emulated where the machine is no arm64."""
    words = [emulator(), str(program)] if emulator() else [str(program)]
    return subprocess.run(words, capture_output=True, text=True)


def _cpu_sources() -> list[Path]:
    return [
        p
        for p in (ROOT / "csrc" / "cpu").glob("*.cpp")
        if not p.name.startswith(("isa_v", "isa_avx"))
    ]


def _compile(source: Path, folder: Path) -> Path:
    made = folder / f"{source.stem}.o"
    _zig([*FLAGS, "-c", "-o", str(made), str(source)])
    return made


def _zig(words: list[str]) -> None:
    command = [sys.executable, "-m", "ziglang", "c++", "-target", "aarch64-linux-musl", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"zig c++ failed:\n{done.stderr[-3000:]}")


if __name__ == "__main__":
    if reason := unsupported():
        sys.exit(f"skipped: {reason}")
    done = run(build())
    print(done.stdout + done.stderr, end="")
    sys.exit(done.returncode)
