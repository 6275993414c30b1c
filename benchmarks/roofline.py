"""What the machine can do at the best, natively: read pages, multiply. Built when first used."""

import ctypes
import functools
import hashlib
import os
import subprocess
from ctypes import c_bool, c_char_p, c_double, c_float, c_int, c_size_t, c_void_p
from pathlib import Path

import mlx.core as mx
import numpy as np
from paged_mlx._native import _ext

ROOT = Path(__file__).parents[1]
SOURCES = [
    ROOT / "benchmarks" / "native" / "roofline.cpp",
    *(ROOT / "csrc" / "cpu" / name for name in ("thread_pool.cpp", "machine.cpp")),
]


def read_pages(k_pages: mx.array, v_pages: mx.array, page_ids: np.ndarray, threads: int) -> float:
    """Read the named pages of K and V, and compute nothing: the memory's limit.

    Args:
        k_pages, v_pages: Pages of a pool, evaluated.
        page_ids: ``int32 [n]``, pages of the pool.
        threads: That read.

    Returns:
        The sum of the pages' words, as 32-bit integers that wrap around.
    """
    page_ids = np.ascontiguousarray(page_ids, np.int32)
    num_pages = len(k_pages)
    if page_ids.size and not (0 <= page_ids.min() and page_ids.max() < num_pages):
        raise ValueError(f"[read_pages] page_ids must lie in [0, {num_pages}); got {page_ids}.")
    pages = (k_pages, v_pages)
    return _library().read_pages(
        *map(_ext.data_address, pages),
        *(array.nbytes // num_pages for array in pages),
        page_ids.ctypes.data,
        page_ids.size,
        threads,
    )


def spend_flops(flops: float, dot_products: bool, threads: int, isa: str = "") -> float:
    """Add and multiply so often as fast as an instruction set can, and read nothing.

    Args:
        flops: Additions and multiplications together.
        dot_products: Of pairs of bfloat16, where the instruction set has them.
        threads: That compute.
        isa: One of ``isa_names()``; the one in use without.

    Returns:
        A sum of the results, so that no work is left out.
    """
    return _library().spend_flops(flops, (isa or _ext.isa()).encode(), dot_products, threads)


@functools.cache
def _library() -> ctypes.CDLL:
    built = ROOT / "build" / f"roofline-{_digest()}.so"
    if not built.exists():
        built.parent.mkdir(exist_ok=True)
        own = built.with_suffix(f".{os.getpid()}")
        compiler = os.environ.get("CXX", "c++")
        flags = ["-std=c++20", "-O3", "-ffp-contract=off", "-fPIC", "-shared", "-pthread"]
        command = [compiler, *flags, f"-I{ROOT / 'csrc'}", *map(str, SOURCES), "-o", str(own)]
        subprocess.run(command, check=True)
        own.replace(built)  # at once: another process may build it too
    library = ctypes.CDLL(str(built))
    library.read_pages.argtypes = [
        c_void_p, c_void_p, c_size_t, c_size_t, c_void_p, c_int, c_int,
    ]  # fmt: skip
    library.read_pages.restype = c_float
    library.spend_flops.argtypes = [c_double, c_char_p, c_bool, c_int]
    library.spend_flops.restype = c_float
    return library


def _digest() -> str:
    texts = [path.read_bytes() for path in SOURCES]
    return hashlib.sha256(b"".join(texts)).hexdigest()[:12]
