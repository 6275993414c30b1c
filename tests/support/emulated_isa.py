"""The AVX-512 kernels on a machine without AVX-512: compiled for AVX2, their lanes emulated.

    python -m emulated_isa NAME MODULE

runs the small suite of ``paged_mlx.testing`` on the kernels called NAME of a native module.
"""

import hashlib
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mutants import native
from mutants.mutant import ROOT
from mutants.trial import MutantModule

NAMES = ("v4", "v4_bf16") if platform.machine() in ("x86_64", "AMD64") else ()
HEADER = ROOT / "tests/support/cpp/emulated_avx512.h"
#: The last words of a compile command.
PLAIN = ["-O1", "-w", "-march=x86-64-v3", "-mno-avx512f", "-include", str(HEADER)]
OPTIONS = {"v4": PLAIN, "v4_bf16": ["-D__AVX512BF16__=1", *PLAIN]}


def module() -> Path:
    """A native module whose AVX-512 kernels run without AVX-512, from the cache if it can be."""
    project = native.project()
    key = hashlib.sha256(project.identity.encode() + HEADER.read_bytes()).hexdigest()[:24]
    made = native.cache() / "modules" / f"emulated-{key}.so"
    if made.exists():
        return made
    work = native.cache() / "work" / f"emulated.{os.getpid()}"
    work.mkdir(parents=True, exist_ok=True)
    options = {f"csrc/cpu/isa_{name}.cpp": OPTIONS[name] for name in NAMES}
    # Every kernel is chosen from, whatever the machine has.
    options["csrc/cpu/dispatch.cpp"] = ["-D__builtin_cpu_supports(name)=true"]
    objects = {source: work / f"{Path(source).stem}.o" for source in options}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [
            pool.submit(project.compile, source, ROOT / source, objects[source], last=words)
            for source, words in options.items()
        ]
        for job in jobs:
            job.result()
    made.parent.mkdir(exist_ok=True)
    os.replace(project.link(objects, work / made.name), made)
    return made


def run_small_suite(name: str) -> str:
    """What the small suite finds wrong with the emulated kernels; empty when nothing."""
    words = [sys.executable, "-m", "emulated_isa", name, str(module())]
    paths = os.pathsep.join([str(ROOT / "tests"), str(ROOT / "tests/support")])
    environment = os.environ | {"PYTHONPATH": paths}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode == 0:
        return ""
    return f"exit status {done.returncode}\n{done.stdout}{done.stderr}"


def main(name: str, path: str) -> None:
    sys.meta_path.insert(0, MutantModule(path))
    from paged_mlx._native import _ext
    from paged_mlx.testing import backends, report, run_suite, small

    assert _ext.set_isa(name) and _ext.isa() == name
    result = run_suite(small.checks(), [backends.cpu()])
    sys.exit(None if result.right else report.failures(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
