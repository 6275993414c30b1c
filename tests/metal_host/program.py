"""Compile the kernels of a Metal source for the host and launch them."""

import ctypes
import functools
import re
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from . import lowering
from .buffers import DirectMemory, GuardedMemory, to_buffers
from .compiler import MetalHostError, build, digest, find_compiler
from .declarations import Declarations, Kernel
from .line_table import LineTable
from .native import MAX_THREADS, NUM_THREADGROUP_BUFFERS, runtime
from .paths import INCLUDE
from .result import THREADGROUP_MEMORY_LIMIT, BufferCounters, Counters, Result, describe, over_limit

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
class _Library:
    """A compiled variant of a kernel."""

    entry: int
    variables: tuple[int, int]
    base: int
    kernel: Kernel
    path: Path
    warnings: list[str]
    instrumented: bool
    _lines: LineTable | None = None

    def line_of(self, pc: int) -> str:
        """The source line of the instruction before `pc`, which is a return address."""
        if self._lines is None:
            self._lines = LineTable(self.path)
        return self._lines.find(pc - self.base - 1)


class Program:
    """A Metal source whose kernels can be launched.

    Args:
        source: Source text, a path, or a list of paths that are read one after another.
        include_dirs: Where its quoted includes are found.
        compiler: Name of a clang++; default: see `compiler.find_compiler`.

    Raises:
        ValueError: The text is not ASCII, or declares what cannot be understood.
        MetalHostError: It does not preprocess.
    """

    def __init__(self, source, include_dirs=(), compiler: str | None = None):
        self.compiler = find_compiler(compiler)
        text, name = read_source(source)
        preprocessed = lowering.preprocess(self.compiler, text, include_dirs, name)
        _require_ascii(text, name)
        _require_ascii(preprocessed, name)
        self.declared = Declarations(preprocessed)
        self._libraries: dict[tuple, _Library] = {}
        self._compiling = threading.Lock()

    @property
    def kernels(self) -> list[str]:
        """Host names, and names of kernels that have none."""
        return sorted(self.declared.instances)

    def compile(self, kernel: str, constants=None, *, instrument: bool = True, flags=()) -> _Library:
        """Compile one variant, or take it from memory or the cache.

        Raises:
            MetalHostError: It does not compile, or uses a function constant that has no value.
        """
        key = (kernel, tuple(sorted((constants or {}).items())), instrument, tuple(flags))
        with self._compiling:
            if key not in self._libraries:
                self._libraries[key] = self._compile(kernel, constants or {}, instrument, flags)
            return self._libraries[key]

    def _compile(self, name: str, constants: dict, instrument: bool, extra_flags) -> _Library:
        runtime()  # the library's undefined symbols are the runtime's
        expression, kernel = self.declared.resolve(name)
        body = lowering.lower(self.declared, constants)
        text = '#include "metal_host.h"\n' + body + lowering.entry_point(expression, kernel)
        flags = [*_FLAGS, *self.compiler.flags, *(_INSTRUMENT_FLAGS if instrument else ()), *extra_flags]

        def make(output: Path) -> str:
            arguments = [*flags, "-I", str(INCLUDE), "-shared", "-nostdlib", *self.compiler.link_flags]
            source = output.with_suffix(".cpp")
            source.write_text(text)
            try:
                return self.compiler.run([*arguments, "-o", str(output), str(source)], f"compiling {name}")[1]
            finally:
                source.unlink()

        path = build("kernel-" + digest(self.compiler.identity, _shim_text(), text, *flags), make)
        warnings = path.with_suffix(".log").read_text().splitlines()
        rejected = sorted({line for line in warnings if _REJECTED_CONVERSION.search(line)})
        library = self._load(path, name)
        library.metal_host_variables_begin.restype = ctypes.c_void_p
        library.metal_host_variables_end.restype = ctypes.c_void_p
        variables = (library.metal_host_variables_begin() or 0, library.metal_host_variables_end() or 0)
        entry = ctypes.cast(library.metal_host_entry, ctypes.c_void_p).value
        return _Library(entry, variables, _load_address(path), kernel, path, rejected, instrument)

    def _load(self, path: Path, kernel: str) -> ctypes.CDLL:
        try:
            return ctypes.CDLL(str(path))
        except OSError as error:
            id = lowering.unset_id(str(error))
            if id is None:
                raise
            name = next(c.name for c in self.declared.constants.values() if c.id == id)
            raise MetalHostError(
                f"[run] constants must give a value for {id} ({name}), which kernel {kernel} uses; got none."
            ) from None

    def run(
        self,
        kernel: str,
        buffers,
        *,
        grid=None,
        groups=None,
        group=(32, 1, 1),
        threadgroup_memory=(),
        constants=None,
        forbid=(),
        order="forward",
        instrument: bool = True,
        trace: bool = True,
        race: bool = True,
        check: bool = True,
        flush_denormals: bool = True,
        ulp: int = 0,
        flags=(),
    ) -> Result:
        """Launch a kernel once.

        Args:
            kernel: Host name, kernel name, or a template id such as ``"f<half, 64>"``.
            buffers: ``{index: value}`` or a list. A value is a numpy array, a scalar,
                bytes, or HostMemory. None leaves the index unbound.
            grid: Threads in each dimension (ragged edges allowed). Give this or `groups`.
            groups: Threadgroups in each dimension.
            group: Threads of a threadgroup in each dimension, at most 1024.
            threadgroup_memory: Bytes of each ``[[threadgroup(n)]]``, or one number.
            constants: Function constants by id.
            forbid: Bytes that no thread may touch: ``(index, begin, end)`` for loads, or with
                "load", "store" or "both" as a fourth item.
            order: How lanes and simdgroups take turns: "forward", "reverse", or a seed.
            instrument: Count and check device accesses. Without it, buffers are not copied into
                guarded memory, a wild access may crash, and only collectives are counted.
            trace: Align lanes into simdgroup-wide instructions.
            race: Watch threadgroup memory for races and uninitialised reads.
            check: Raise on a fatal finding.
            flush_denormals: As Apple GPUs do.
            ulp: Move the result of every transcendental function by up to this many ulp.
            flags: More compiler flags, such as ``-ffast-math``.

        Raises:
            ValueError: The arguments do not fit the kernel.
            MetalHostError: The kernel does not compile; or, with `check`, a finding is fatal.
        """
        library = self.compile(kernel, constants, instrument=instrument, flags=flags)
        threads, group = _thread_counts(library.kernel, grid, groups, group)
        bound = to_buffers(buffers)
        self._require_bound(library.kernel, bound, constants or {})
        arguments = dict(
            entry=library.entry, code_base=library.base,
            threadgroup_begin=library.variables[0], threadgroup_end=library.variables[1],
            order=_order(order), trace=trace, race=race, flush_denormals=flush_denormals, ulp=ulp,
        )  # fmt: skip
        for axis, total, size in zip("xyz", threads, group):
            arguments |= {f"grid_{axis}": total, f"group_{axis}": size}
        dynamic = _threadgroup_bytes(threadgroup_memory)
        arguments |= {f"threadgroup_bytes_{i}": nbytes for i, nbytes in enumerate(dynamic)}
        with runtime().lock:
            memory = (GuardedMemory if instrument else DirectMemory)(bound)
            memory.forbid(forbid)
            started = time.perf_counter()
            completed = runtime().launch(**arguments)
            seconds = time.perf_counter() - started
            result = _collect(library, memory, sum(dynamic))
        result.kernel, result.completed, result.seconds = kernel, completed, seconds
        if check and (result.fatal or not completed):
            raise MetalHostError(f"kernel {kernel}:\n{result}")
        return result

    def _require_bound(self, kernel: Kernel, bound: dict, constants: dict) -> None:
        for parameter in kernel.parameters:
            if not parameter.is_buffer or parameter.index in bound:
                continue
            condition = self.declared.constants.get(parameter.condition)
            if condition is None or constants.get(condition.id):
                raise ValueError(
                    f"[run] buffers must bind {parameter.index} ({parameter.name}), "
                    f"a parameter of kernel {kernel.name}; got {sorted(bound)}."
                )


def run(source, buffers, **launch) -> Result:
    """Compile a source that has one kernel and launch it; see Program.run."""
    program = Program(source)
    (kernel,) = program.kernels
    return program.run(kernel, buffers, **launch)


def _collect(library: _Library, memory, dynamic_bytes: int) -> Result:
    native = runtime()
    names = {p.index: p.name for p in library.kernel.parameters if p.is_buffer}
    rows = native.table("buffers")
    counters = Counters(**native.table("launch")[0])
    counters.threadgroup_memory_bytes += dynamic_bytes
    by_slot = {
        slot: BufferCounters(**rows[slot], name=names.get(slot, "?"), nbytes=memory.sizes[slot])
        for slot in set(memory.slot_of.values())
    }
    errors = [
        describe(row, *native.findings[row["kind"]], names, memory.sizes, library.line_of)
        for row in native.table("findings")
    ]
    if counters.threadgroup_memory_bytes > THREADGROUP_MEMORY_LIMIT:
        errors.append(over_limit(counters.threadgroup_memory_bytes))
    return Result(
        library.kernel.name,
        outputs=memory.read_back(),
        buffers={index: by_slot[slot] for index, slot in memory.slot_of.items()},
        counters=counters,
        errors=errors,
        compile_warnings=library.warnings,
        _places=native.table("places"),
        _line_of=library.line_of,
    )


def read_source(source) -> tuple[str, str]:
    """Source text and the file name that findings give it."""
    if isinstance(source, (list, tuple)):
        return "\n".join(f'# 1 "{path}"\n{Path(path).read_text()}' for path in source), str(source[0])
    if isinstance(source, Path) or "\n" not in source:
        return Path(source).read_text(), str(source)
    return source, "kernel.metal"


def _require_ascii(text: str, name: str) -> None:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.isascii():
            raise ValueError(f"[Program] {name} must be ASCII, since the OS compiles it; got line {number}: {line!r}.")


@functools.cache
def _shim_text() -> str:
    """Every header that a compiled kernel depends on."""
    headers = [INCLUDE / "metal_host.h", *sorted((INCLUDE / "metal_host").glob("*.h"))]
    return "".join(header.read_text() for header in headers)


def _load_address(path: Path) -> int:
    """Where a library was loaded: the lowest address that is mapped from it."""
    with open("/proc/self/maps") as maps:
        return min(int(line.split("-")[0], 16) for line in maps if line.rstrip().endswith(str(path)))


def _three(sizes) -> tuple[int, int, int]:
    sizes = tuple(sizes) if hasattr(sizes, "__len__") else (sizes,)
    return tuple(int(size) for size in (*sizes, 1, 1)[:3])


def _thread_counts(kernel: Kernel, grid, groups, group) -> tuple[tuple, tuple]:
    """Threads of the whole grid and of a threadgroup, in three dimensions."""
    group = _three(group)
    if (grid is None) == (groups is None):
        raise ValueError("[run] exactly one of grid and groups must be given, in threads or in threadgroups.")
    limit = min(kernel.max_threads or MAX_THREADS, MAX_THREADS)
    if not 0 < group[0] * group[1] * group[2] <= limit:
        raise ValueError(f"[run] group must have 1 to {limit} threads, the limit of kernel {kernel.name}; got {group}.")
    threads = _three(grid) if grid is not None else tuple(a * b for a, b in zip(_three(groups), group))
    return threads, group


def _threadgroup_bytes(sizes) -> list[int]:
    sizes = list(sizes) if hasattr(sizes, "__len__") else [sizes]
    if len(sizes) > NUM_THREADGROUP_BUFFERS:
        raise ValueError(f"[run] threadgroup_memory must have at most {NUM_THREADGROUP_BUFFERS} sizes; got {sizes}.")
    return [int(size) for size in sizes]


def _order(order) -> int:
    """The runtime's number for an order; see runtime/options.h."""
    return {"forward": 0, "reverse": 1}[order] if isinstance(order, str) else 2 + int(order)
