"""What a launch returns: outputs, counters, findings, and traffic by source line."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np

FIRST_THREADGROUP_SLOT = 31
THREADGROUP_MEMORY_LIMIT = 32768
_COLLECTIVES = ("reduces", "shuffles", "scans", "ballots", "matrix_multiplies", "quad_reduces", "quad_shuffles")


class Counters(SimpleNamespace):
    """Named numbers; the names are listed in runtime/tables.h."""


class BufferCounters(Counters):
    """Traffic of one buffer, with its `name` in the kernel and its `nbytes`."""

    @property
    def used(self) -> bool:
        return bool(self.load_ops or self.store_ops or self.atomics)

    @property
    def reread(self) -> float:
        """Bytes loaded over distinct bytes loaded."""
        return self.load_bytes / max(1, self.unique_load_bytes)

    @property
    def load_coalescing(self) -> float:
        """Bytes asked for over bytes of the 32-byte segments touched, loads as written."""
        return self.load_bytes / max(1, 32 * self.load_segments_32)

    @property
    def merged_load_coalescing(self) -> float:
        """The same after merging each lane's adjacent loads up to 16 bytes."""
        return self.load_bytes / max(1, 32 * self.merged_load_segments_32)


@dataclass(frozen=True)
class Finding:
    """A defect.

    Attributes:
        kind: What it is, as runtime/tables.h calls it.
        fatal: Whether the kernel is wrong beyond doubt.
        text: The whole message: what, where in memory, which thread, which line.
        where: `file:line` in the kernel.
        buffer: Index of the device buffer it concerns, or None.
        offset: Byte offset there.
        count: How often it happened.
    """

    kind: str
    fatal: bool
    text: str
    where: str
    buffer: int | None
    offset: int
    count: int

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class LineTraffic:
    """Device traffic of one source line's access to one buffer."""

    where: str
    buffer: int
    is_store: bool
    bytes: int
    ops: int
    simdgroup_ops: int
    segments_32: int
    segments_128: int


@dataclass
class Result:
    """One launch.

    Attributes:
        kernel: Its name.
        outputs: Array of every buffer by index; copies of those that were stored to.
        buffers: BufferCounters by index. Buffers that share memory share them.
        counters: LaunchCounters: threadgroups, barriers, collectives, and so on.
        errors: Every finding, fatal or not.
        completed: False when a finding cut the launch short.
        seconds: Time of the launch alone.
        compile_warnings: Conversions that Metal rejects, from the compiler.
    """

    kernel: str
    outputs: dict[int, np.ndarray] = field(default_factory=dict)
    buffers: dict[int, BufferCounters] = field(default_factory=dict)
    counters: Counters = field(default_factory=Counters)
    errors: list[Finding] = field(default_factory=list)
    completed: bool = True
    seconds: float = 0.0
    compile_warnings: list[str] = field(default_factory=list)
    _places: list[dict[str, int]] = field(default_factory=list, repr=False)
    _line_of: object = field(default=None, repr=False)

    @property
    def fatal(self) -> list[Finding]:
        return [error for error in self.errors if error.fatal]

    @property
    def collectives(self) -> dict[str, int]:
        """How often a simdgroup met in each kind of function."""
        return {name: getattr(self.counters, name) for name in _COLLECTIVES if getattr(self.counters, name)}

    @property
    def lines(self) -> list[LineTraffic]:
        """Device traffic by source line, heaviest first."""
        rows = [
            LineTraffic(self._line_of(row["pc"]), **{k: v for k, v in row.items() if k not in ("pc", "is_store")},
                        is_store=bool(row["is_store"]))
            for row in self._places
        ]
        return sorted(rows, key=lambda row: -row.bytes)

    def __str__(self) -> str:
        return "\n".join([*self._summary(), *self._traffic(), *(f"  ! {error}" for error in self.errors)])

    def _summary(self):
        c = self.counters
        per_group, per_simdgroup = max(1, c.threadgroups), max(1, c.simdgroups)
        met = ", ".join(f"{n / per_simdgroup:.1f} {kind}" for kind, n in self.collectives.items()) or "no collectives"
        yield f"{self.kernel}: {c.threadgroups} threadgroups, {c.simdgroups} simdgroups, {c.threads} threads"
        yield (
            f"per threadgroup {c.threadgroup_barriers / per_group:.1f} barriers; "
            f"per simdgroup {c.simdgroup_barriers / per_simdgroup:.1f} barriers, {met}"
        )
        yield (
            f"threadgroup memory {c.threadgroup_memory_bytes} B, "
            f"{c.threadgroup_load_bytes} B loaded, {c.threadgroup_store_bytes} B stored"
        )

    def _traffic(self):
        for index, b in sorted(self.buffers.items()):
            if b.used:
                yield (
                    f"  buffer {index} {b.name}: loads {b.load_bytes} B, {b.reread:.2f} times each, "
                    f"{b.simdgroup_loads} simdgroup loads ({100 * b.load_coalescing:.0f}% of 32 B segments used), "
                    f"merged {b.merged_loads} ({100 * b.merged_load_coalescing:.0f}%); stores {b.store_bytes} B"
                )


def describe(row: dict[str, int], text: str, fatal: bool, names: dict[int, str], sizes: dict[int, int], line_of) -> Finding:
    """A row of the runtime's findings as a Finding."""
    where = line_of(row["pc"]) if row["pc"] else "?"
    group = tuple(row[f"threadgroup_{axis}"] for axis in "xyz")
    message = (
        f"{text}{_detail(row, text, names, sizes, line_of)}; threadgroup {group} thread {row['thread']}; "
        f"{where}; {row['count']} times"
    )
    in_device = text.split()[0] in ("out-of-range", "forbidden", "two")
    return Finding(text, fatal, message, where, row["buffer"] if in_device else None, _signed(row["offset"]), row["count"])


def over_limit(nbytes: int) -> Finding:
    text = f"threadgroup memory over 32 KiB: {nbytes} B where an Apple GPU has {THREADGROUP_MEMORY_LIMIT} B"
    return Finding("threadgroup memory over 32 KiB", True, text, "?", None, 0, 1)


def _signed(offset: int) -> int:
    return offset - (1 << 64) if offset >= 1 << 63 else offset


def _detail(row, text, names, sizes, line_of) -> str:
    if text.startswith(("out-of-range", "forbidden", "two threadgroups")):
        buffer = row["buffer"]
        return (
            f" of {row['bytes']} B at byte {_signed(row['offset'])} of buffer {buffer} "
            f"{names.get(buffer, '')} ({sizes.get(buffer, 0)} B)"
        )
    if "race" in text:
        writer = f", which wrote it at {line_of(row['other_pc'])}" if row["other_pc"] else ""
        return f" at threadgroup byte {row['offset']} with thread {row['other']}{writer}"
    if text.startswith(("read of uninitialised", "threadgroup memory")):
        return f": {row['bytes']} B at threadgroup byte {_signed(row['offset'])}"
    if text.startswith("simdgroup function"):
        return f": lanes {row['offset']:08x} of {row['other']:08x}"
    if text.endswith("threads returned"):
        return f": {row['offset']} of them"
    if text in ("wild access", "thread stack overflow"):
        return f" at address {row['offset']:#x}"
    return ""
