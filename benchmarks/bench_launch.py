"""What does a layer of a decode step cost the host?

The launch code in C++, into an encoder that does nothing; and the calls that build a layer's nodes
in Python, beside those of contiguous K and V. One thread, by CPU time.
"""

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np
from paged_mlx import PagePool, fast

from benchmarks.harness import Candidate, Case, LeftOut, run

ROOT = Path(__file__).parents[1]
LAYERS = 3200  # of a hundred steps of 32
Q_HEADS, KV_HEADS, DIM, PAGE, CONTEXT = 32, 8, 128, 16, 1000


def launch_code(folder: str) -> ctypes.CDLL:
    """csrc/metal's launch code with launch_time.cpp."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("clang++")
    if compiler is None:
        raise LeftOut("no C++ compiler")
    embed = [sys.executable, ROOT / "cmake/embed_kernels.py", ROOT / "kernels"]
    subprocess.run([*embed, Path(folder) / "kernel_sources.h"], check=True)
    names = ("variant", "bodies", "long_work", "launch_attention", "launch_pages")
    sources = [ROOT / f"csrc/metal/{name}.cpp" for name in names]
    sources.append(Path(__file__).with_name("launch_time.cpp"))
    includes = [f"-I{path}" for path in (ROOT / "csrc", ROOT / "kernels", folder)]
    library = Path(folder) / "launch.so"
    flags = ["-std=c++20", "-O3", "-fPIC", "-shared"]
    subprocess.run([compiler, *flags, *includes, "-o", library, *sources], check=True)
    return ctypes.CDLL(str(library))


def native(library: ctypes.CDLL) -> Case:
    def layers(merges):
        return lambda: library.launch_layers(LAYERS, merges)

    candidates = [
        Candidate("write + attend", layers(False)),
        Candidate("write + attend in parts + merge", layers(True)),
    ]
    about = {"unit": "layer", "units": LAYERS}
    return Case(
        "C++: launch code, empty encoder", candidates, lambda outputs: None, 30, 2, "cpu", about
    )


def python() -> Case:
    """Nodes are built and dropped: nothing is evaluated."""
    pool = PagePool(1, 64, PAGE, KV_HEADS, DIM, mx.float16)
    plan = fast.plan(
        [np.arange(64)], [CONTEXT], num_q_heads=Q_HEADS, num_kv_heads=KV_HEADS, page_size=PAGE,
        dtype=mx.float16, head_dim=DIM,
    )  # fmt: skip
    slots = pool.slots([CONTEXT - 1])
    q, k = mx.zeros((1, Q_HEADS, DIM), mx.float16), mx.zeros((1, KV_HEADS, DIM), mx.float16)
    contiguous = [mx.zeros((1, KV_HEADS, 1024, DIM), mx.float16) for _ in range(2)]
    q4, k4 = q[:, :, None], k[:, :, None]
    mx.eval(pool.state, contiguous, q, k, q4, k4)
    layer = pool[0]

    def paged():
        for _ in range(LAYERS):
            layer.write(k, k, slots)
            out = layer.attend(q, plan)
        return out

    def sdpa():
        keys, values = (mx.array(x) for x in contiguous)
        for _ in range(LAYERS):
            keys[..., CONTEXT - 1 : CONTEXT, :] = k4
            values[..., CONTEXT - 1 : CONTEXT, :] = k4
            out = mx.fast.scaled_dot_product_attention(
                q4, keys[..., :CONTEXT, :], values[..., :CONTEXT, :], scale=DIM**-0.5
            )
        return out

    # The versions of a pool follow each other: each run begins with the evaluated ones.
    base = list(layer.arrays)

    def reset():
        layer.arrays[:] = base

    candidates = [
        Candidate("pool: write, attend", paged, after=reset),
        Candidate("mx.fast: slice updates, SDPA", sdpa),
    ]
    about = {"unit": "layer", "units": LAYERS}
    return Case("Python: nodes of a layer", candidates, lambda outputs: None, 20, 2, "cpu", about)


def main():
    def cases():
        with tempfile.TemporaryDirectory() as folder:
            try:
                yield native(launch_code(folder))
            except LeftOut as why:
                print(f"left out: {why}")
        yield python()

    record = run("launch", cases())
    for result in record["cases"]:
        for candidate in result["candidates"]:
            layer = candidate["median"] / result["about"]["units"] * 1e6
            print(
                f"{candidate['name']:<34} {layer:6.2f} us a layer, {32 * layer:7.1f} us a step of 32"
            )


if __name__ == "__main__":
    main()
