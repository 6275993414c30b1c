"""Launch the kernels of a Metal source."""

import time
from pathlib import Path

from . import lowering
from .buffers import DirectMemory, GuardedMemory, to_buffers
from .compiler import MetalHostError, find_compiler
from .declarations import Declarations, Kernel, Parameter
from .native import MAX_THREADS, NUM_THREADGROUP_BUFFERS, runtime
from .result import THREADGROUP_MEMORY_LIMIT, BufferCounters, Counters, Result, Scene, over_limit
from .variant import Variant, compile_variant


class Program:
    """A Metal source whose kernels can be launched.

    Args:
        source: Source text, a path, or a list of paths that are read one after another.
        include_dirs: Where its quoted includes are found.
        defines: Macros and their values, as if `#define`d before the text.
        compiler: Name of a clang++; default: see `compiler.find_compiler`.

    Raises:
        ValueError: The text is not ASCII, or declares what cannot be understood.
        MetalHostError: It does not preprocess.
    """

    def __init__(self, source, include_dirs=(), defines=(), compiler: str | None = None):
        self.compiler = find_compiler(compiler)
        text, name = read_source(source)
        preprocessed = lowering.preprocess(self.compiler, text, include_dirs, defines, name)
        _require_ascii(text, name)
        _require_ascii(preprocessed, name)
        self.declared = Declarations(preprocessed)
        self._variants: dict[tuple, Variant] = {}

    @property
    def kernels(self) -> list[str]:
        """Host names, and names of kernels that have none."""
        return sorted(self.declared.instances)

    def compile(self, kernel: str, constants=None, *, instrument: bool = True, flags=()) -> Variant:
        """Compile one variant, or take it from memory or the cache. Threads may compile at once.

        Raises:
            MetalHostError: It does not compile, or uses a function constant that has no value.
        """
        key = (kernel, tuple(sorted((constants or {}).items())), instrument, tuple(flags))
        if key not in self._variants:
            self._variants[key] = compile_variant(
                self.declared, kernel, constants or {}, self.compiler, instrument, flags
            )
        return self._variants[key]

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
        variant = self.compile(kernel, constants, instrument=instrument, flags=flags)
        threads, group = _thread_counts(variant.kernel, grid, groups, group)
        bound = to_buffers(buffers)
        self._require_bound(variant.kernel, bound, constants or {})
        arguments = dict(
            entry=variant.entry, code_base=variant.base,
            threadgroup_begin=variant.variables[0], threadgroup_end=variant.variables[1],
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
            result = _collect(kernel, variant, memory, sum(dynamic))
        result.completed, result.seconds = completed, seconds
        if check and (result.fatal or not completed):
            raise MetalHostError(f"kernel {kernel}:\n{result}")
        return result

    def _require_bound(self, kernel: Kernel, bound: dict, constants: dict) -> None:
        for parameter in kernel.parameters:
            if not parameter.is_buffer or parameter.index in bound:
                continue
            if not self._is_optional(parameter, constants):
                raise ValueError(
                    f"[run] buffers must bind {parameter.index} ({parameter.name}), "
                    f"a parameter of kernel {kernel.name}; got {sorted(bound)}."
                )

    def _is_optional(self, parameter: Parameter, constants: dict) -> bool:
        """Whether the parameter depends on a function constant that is false, or on one derived from others."""
        constant = self.declared.constants.get(parameter.condition)
        if constant is None:
            return parameter.condition is not None
        return not constants.get(constant.id)


def run(source, buffers, **launch) -> Result:
    """Compile a source that has one kernel and launch it; see Program.run."""
    program = Program(source)
    (kernel,) = program.kernels
    return program.run(kernel, buffers, **launch)


def _collect(kernel: str, variant: Variant, memory, dynamic_bytes: int) -> Result:
    native = runtime()
    names = {p.index: p.name for p in variant.kernel.parameters if p.is_buffer}
    rows = native.table("buffers")
    counters = Counters(**native.table("launch")[0])
    counters.threadgroup_memory_bytes += dynamic_bytes
    by_slot = {
        slot: BufferCounters(**rows[slot], name=names.get(slot, "?"), nbytes=memory.sizes[slot])
        for slot in set(memory.slot_of.values())
    }
    scene = Scene(names, memory.sizes, variant.line_of)
    errors = [scene.describe(row, native.kinds[row["kind"]]) for row in native.table("findings")]
    if counters.threadgroup_memory_bytes > THREADGROUP_MEMORY_LIMIT:
        errors.append(over_limit(counters.threadgroup_memory_bytes))
    return Result(
        kernel,
        outputs=memory.read_back(),
        buffers={index: by_slot[slot] for index, slot in memory.slot_of.items()},
        counters=counters,
        errors=errors,
        compile_warnings=variant.warnings,
        _places=native.table("places"),
        _line_of=variant.line_of,
    )


def read_source(source) -> tuple[str, str]:
    """Source text and the file name that findings give it."""
    if isinstance(source, (list, tuple)):
        return "\n".join(f'# 1 "{path}"\n{Path(path).read_text()}' for path in source), str(
            source[0]
        )
    if isinstance(source, Path) or "\n" not in source:
        return Path(source).read_text(), str(source)
    return source, "kernel.metal"


def _require_ascii(text: str, name: str) -> None:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.isascii():
            raise ValueError(
                f"[Program] {name} must be ASCII, since the OS compiles it; got line {number}: {line!r}."
            )


def _three(sizes) -> tuple[int, int, int]:
    sizes = tuple(sizes) if hasattr(sizes, "__len__") else (sizes,)
    return tuple(int(size) for size in (*sizes, 1, 1)[:3])


def _thread_counts(kernel: Kernel, grid, groups, group) -> tuple[tuple, tuple]:
    """Threads of the whole grid and of a threadgroup, in three dimensions."""
    group = _three(group)
    if (grid is None) == (groups is None):
        raise ValueError(
            "[run] exactly one of grid and groups must be given, in threads or in threadgroups."
        )
    limit = min(kernel.max_threads or MAX_THREADS, MAX_THREADS)
    if not 0 < group[0] * group[1] * group[2] <= limit:
        raise ValueError(
            f"[run] group must have 1 to {limit} threads, the limit of kernel {kernel.name}; got {group}."
        )
    threads = (
        _three(grid) if grid is not None else tuple(a * b for a, b in zip(_three(groups), group))
    )
    if min(threads) < 1:
        raise ValueError(
            f"[run] grid must have a thread in each dimension, as Metal demands; got {threads}."
        )
    return threads, group


def _threadgroup_bytes(sizes) -> list[int]:
    sizes = list(sizes) if hasattr(sizes, "__len__") else [sizes]
    if len(sizes) > NUM_THREADGROUP_BUFFERS:
        raise ValueError(
            f"[run] threadgroup_memory must have at most {NUM_THREADGROUP_BUFFERS} sizes; got {sizes}."
        )
    if any(size % 16 for size in sizes):
        raise ValueError(
            f"[run] threadgroup_memory must be in multiples of 16 B, as Metal demands; got {sizes}."
        )
    return [int(size) for size in sizes]


def _order(order) -> int:
    """The runtime's number for an order; see runtime/options.h."""
    return {"forward": 0, "reverse": 1}[order] if isinstance(order, str) else 2 + int(order)
