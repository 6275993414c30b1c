"""Compile one kernel, with its function constants, for the host."""

import ctypes
import functools
import re
from dataclasses import dataclass
from pathlib import Path

from . import lowering
from .compiler import Compiler, MetalHostError, build, digest
from .declarations import Declarations, Kernel
from .line_table import LineTable
from .native import runtime
from .paths import INCLUDE

_FLAGS = (
    "-std=c++23 -O2 -fPIC -gline-tables-only -gdwarf-4 -nostdinc -nostdinc++ -fno-exceptions -fno-rtti "
    # Loads are counted as written: no vectoriser, no assumption about types.
    "-fno-vectorize -fno-slp-vectorize -fno-strict-aliasing -fno-math-errno -ffp-contract=fast "
    "-fno-stack-protector -fno-threadsafe-statics -ftrivial-auto-var-init=pattern "
    # half and bfloat round after every operation; 0.1 is a float.
    "-Xclang -ffloat16-excess-precision=none -Xclang -fbfloat16-excess-precision=none "
    "-Xclang -cl-single-precision-constant "
    "-Wno-everything -Wimplicit-float-conversion -ferror-limit=20"
).split()
_INSTRUMENT_FLAGS = (
    "-fsanitize=kernel-address -mllvm -asan-instrumentation-with-call-threshold=0 -mllvm -asan-stack=0 "
    "-mllvm -asan-globals=0 -mllvm -asan-opt-same-temp=0 -mllvm -asan-kernel-mem-intrinsic-prefix=1"
).split()
# Metal has no implicit conversion to bfloat.
_REJECTED_CONVERSION = re.compile(r"warning:.*to '(?:[^']*\b)?(?:__bf16|bfloat)")


@dataclass
class Variant:
    """A kernel compiled with its function constants, and loaded."""

    entry: int
    variables: tuple[int, int]
    base: int
    kernel: Kernel
    path: Path
    warnings: list[str]
    _lines: LineTable | None = None

    def line_of(self, pc: int) -> str:
        """The source line of the instruction before `pc`, which is a return address."""
        if self._lines is None:
            self._lines = LineTable(self.path)
        return self._lines.find(pc - self.base - 1)


def compile_variant(
    declared: Declarations,
    name: str,
    constants: dict,
    compiler: Compiler,
    instrument: bool,
    extra_flags,
) -> Variant:
    """Compile the kernel called `name`, or take it from the cache, and load it.

    Raises:
        ValueError: There is no such kernel.
        MetalHostError: It does not compile, or uses a function constant that has no value.
    """
    expression, kernel = declared.resolve(name)
    body = lowering.lower(declared, constants)
    text = '#include "metal_host.h"\n' + body + lowering.entry_point(expression, kernel)
    flags = [*_FLAGS, *compiler.flags, *(_INSTRUMENT_FLAGS if instrument else ()), *extra_flags]

    def make(output: Path) -> str:
        arguments = [*flags, "-I", str(INCLUDE), "-shared", "-nostdlib", *compiler.link_flags]
        source = output.with_suffix(".cpp")
        source.write_text(text)
        try:
            return compiler.run([*arguments, "-o", str(output), str(source)], f"compiling {name}")[
                1
            ]
        finally:
            source.unlink()

    path = build("kernel-" + digest(compiler.identity, shim_text(), text, *flags), make)
    warnings = path.with_suffix(".log").read_text().splitlines()
    rejected = sorted({line for line in warnings if _REJECTED_CONVERSION.search(line)})
    library = _load(path, name, declared)
    library.metal_host_variables_begin.restype = ctypes.c_void_p
    library.metal_host_variables_end.restype = ctypes.c_void_p
    variables = (library.metal_host_variables_begin() or 0, library.metal_host_variables_end() or 0)
    entry = ctypes.cast(library.metal_host_entry, ctypes.c_void_p).value
    return Variant(entry, variables, load_address(path), kernel, path, rejected)


def _load(path: Path, kernel: str, declared: Declarations) -> ctypes.CDLL:
    runtime()  # has the symbols that the library leaves undefined
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        id = lowering.unset_id(str(error))
        if id is None:
            raise
        name = next(constant.name for constant in declared.constants.values() if constant.id == id)
        raise MetalHostError(
            f"[run] constants must give a value for {id} ({name}), which kernel {kernel} uses; got none."
        ) from None


@functools.cache
def shim_text() -> str:
    """Every header that a compiled kernel depends on."""
    headers = [INCLUDE / "metal_host.h", *sorted((INCLUDE / "metal_host").glob("*.h"))]
    return "".join(header.read_text() for header in headers)


def load_address(path: Path) -> int:
    """Where a library was loaded: the lowest address that is mapped from it.

    Another process may have pruned the file since.
    """
    with open("/proc/self/maps") as maps:
        return min(
            int(line.split("-")[0], 16)
            for line in maps
            if line.rstrip().removesuffix(" (deleted)").endswith(str(path))
        )
