"""The launch code as a library, and what its dispatches did.

``csrc/metal`` is compiled with ``launcher.cpp``, which hands each dispatch to a callback here;
the callback runs the kernel's text, as the launch code composed it, in ``metal_host``.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from ctypes import POINTER, c_char_p, c_int, c_size_t, c_void_p
from dataclasses import dataclass, field
from pathlib import Path

import metal_host
import numpy as np
import pytest
from metal_host.compiler import build, digest

ROOT = Path(__file__).parents[3]
KERNELS = ROOT / "kernels"
SOURCES = (
    *(ROOT / "csrc/metal" / f"{name}.cpp" for name in (
        "variant", "bodies", "long_work", "launch_attention", "launch_pages", "host_encoder")),
    Path(__file__).with_name("launcher.cpp"),
)  # fmt: skip
#: The numbers of cpu::DType and cpu::MaskKind.
DTYPES = {"float32": 0, "float16": 1, "bfloat16": 2}
MASK_KINDS = {"none": 0, "boolean": 1, "additive": 2}
#: The numbers of PageFormat, by what K and V call their formats.
K_FORMATS = {None: 0, "q8": 1, "q4": 3}
V_FORMATS = {None: 0, "q8": 1, "q4": 2}


class Memory(ctypes.Structure):
    _fields_ = [("address", c_void_p), ("nbytes", c_size_t)]

    @classmethod
    def of(cls, array: np.ndarray | None) -> Memory:
        """The memory of a contiguous array, which must outlive the launch."""
        if array is None:
            return cls(None, 0)
        assert array.flags.c_contiguous
        return cls(array.ctypes.data, array.nbytes)


class _Constant(ctypes.Structure):
    _fields_ = [("id", c_int), ("is_bool", ctypes.c_bool), ("value", c_int)]


class _Dispatch(ctypes.Structure):
    _fields_ = [
        ("kernel", c_char_p),
        ("library", c_char_p),
        ("name", c_char_p),
        ("text", c_char_p),
        ("num_constants", c_int),
        ("constants", POINTER(_Constant)),
        ("num_buffers", c_int),
        ("buffer_indices", POINTER(c_int)),
        ("buffers", POINTER(Memory)),
        ("num_bytes", c_int),
        ("bytes_indices", POINTER(c_int)),
        ("bytes", POINTER(Memory)),
        ("grid", c_size_t * 6),
    ]


class Body(ctypes.Structure):
    """How items of so many rows are attended."""

    _fields_ = [("_kernel", c_char_p), ("rows", c_int), ("simdgroups", c_int)]
    kernel = property(lambda self: self._kernel.decode())


_RUN = ctypes.CFUNCTYPE(c_int, POINTER(_Dispatch))


@functools.cache
def library() -> ctypes.CDLL:
    """The launch code, compiled by the compiler that builds the extension."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("the launch code needs a C++ compiler: set CXX, or install g++ or clang++")
    headers = [*(ROOT / "csrc").glob("**/*.h"), *KERNELS.iterdir()]
    embedder = ROOT / "cmake/embed_kernels.py"
    texts = [path.read_text() for path in (*sorted((*SOURCES, *headers)), embedder)]

    def make(output: Path) -> str:
        with tempfile.TemporaryDirectory() as generated:
            embed = [sys.executable, embedder, KERNELS]
            subprocess.run([*embed, Path(generated) / "kernel_sources.h"], check=True)
            includes = [f"-I{path}" for path in (ROOT / "csrc", KERNELS, generated)]
            flags = ["-std=c++20", "-O1", "-fPIC", "-shared", *includes]
            sources = [str(path) for path in SOURCES]
            subprocess.run([compiler, *flags, "-o", str(output), *sources], check=True)
            return ""

    return ctypes.CDLL(str(build("launch-" + digest(compiler, *texts), make)))


@dataclass
class Launch:
    """One dispatch: what was asked for, and what ``metal_host`` saw."""

    kernel: str
    library: str
    name: str
    constants: dict[int, int]
    groups: tuple[int, ...]
    group: tuple[int, ...]
    buffers: dict[int, int]
    result: metal_host.Result = field(repr=False)


def launch(
    function: str, *arguments, forbid=(), max_threads: int = 1024, change=None, **options
) -> list[Launch]:
    """Call ``function`` of launcher.cpp; return its dispatches.

    Args:
        forbid: ``(array, begin, end)``: bytes that no dispatch may load.
        max_threads: What every pipeline says it can take.
        change: ``dispatch -> dispatch``: another text in the place of a kernel's.
        options: Of ``metal_host.Program.run``.
    """
    done, failures = [], []

    @_RUN
    def run(dispatch):
        try:
            done.append(_run(dispatch.contents, forbid, change, options))
            return 0
        except Exception as error:  # crosses C++: carried around it
            failures.append(error)
            return 1

    failed = getattr(library(), function)(run, max_threads, *arguments)
    if failures:
        raise failures[0]
    assert not failed, f"{function} threw"
    return done


@functools.lru_cache(maxsize=64)
def _program(text: str) -> metal_host.Program:
    return metal_host.Program(text)


def _run(d: _Dispatch, forbid, change, options) -> Launch:
    memory = {d.buffer_indices[i]: d.buffers[i] for i in range(d.num_buffers)}
    bound = {i: metal_host.HostMemory(m.address, m.nbytes) for i, m in memory.items()}
    for i in range(d.num_bytes):
        bound[d.bytes_indices[i]] = ctypes.string_at(d.bytes[i].address, d.bytes[i].nbytes)
    constants = {}
    for i in range(d.num_constants):
        constant = d.constants[i]
        constants[constant.id] = bool(constant.value) if constant.is_bool else constant.value
    addresses = {index: m.address for index, m in memory.items()}
    forbidden = [
        (index, begin, end)
        for array, begin, end in forbid
        for index, address in addresses.items()
        if address == array.ctypes.data
    ]
    kernel, grid = d.kernel.decode(), tuple(d.grid)
    text = d.text.decode()
    if change is not None:
        text = change({"text": text})["text"]
    result = _program(text).run(
        kernel,
        bound,
        groups=grid[:3],
        group=grid[3:],
        constants=constants,
        forbid=forbidden,
        **options,
    )
    return Launch(
        kernel,
        d.library.decode(),
        d.name.decode(),
        constants,
        grid[:3],
        grid[3:],
        addresses,
        result,
    )


def variants_are_told_apart() -> bool:
    """Whether variants are the same where each of their parts is, and only there."""
    return bool(library().variants_are_told_apart())


def choose_body(
    rows: int, head_dim: int, v_head_dim: int, dtype: str, formats=(None, None)
) -> Body:
    """The launch code's choice for items of at most ``rows`` rows per KV head."""
    body, k, v = Body(), K_FORMATS[formats[0]], V_FORMATS[formats[1]]
    library().choose_body_of(rows, head_dim, v_head_dim, DTYPES[dtype], k, v, ctypes.byref(body))
    return body
