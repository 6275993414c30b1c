"""What a launch returns: outputs, counters, findings, and traffic by source line."""

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np

from .native import FindingKind

THREADGROUP_MEMORY_LIMIT = 32768
_COLLECTIVES = (
    "reduces",
    "shuffles",
    "scans",
    "ballots",
    "matrix_multiplies",
    "quad_reduces",
    "quad_shuffles",
)


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
    _line_of: Callable[[int], str] | None = field(default=None, repr=False)

    @property
    def fatal(self) -> list[Finding]:
        return [error for error in self.errors if error.fatal]

    @property
    def collectives(self) -> dict[str, int]:
        """How often a simdgroup met in each kind of function."""
        return {
            name: getattr(self.counters, name)
            for name in _COLLECTIVES
            if getattr(self.counters, name)
        }

    @property
    def lines(self) -> list[LineTraffic]:
        """Device traffic by source line, heaviest first."""
        rows = []
        for place in self._places:
            fields = {
                name: value for name, value in place.items() if name not in ("pc", "is_store")
            }
            rows.append(
                LineTraffic(self._line_of(place["pc"]), is_store=bool(place["is_store"]), **fields)
            )
        return sorted(rows, key=lambda row: -row.bytes)

    def __str__(self) -> str:
        return "\n".join(
            [*self._summary(), *self._traffic(), *(f"  ! {error}" for error in self.errors)]
        )

    def _summary(self):
        c = self.counters
        per_group, per_simdgroup = max(1, c.threadgroups), max(1, c.simdgroups)
        met = (
            ", ".join(f"{n / per_simdgroup:.1f} {kind}" for kind, n in self.collectives.items())
            or "no collectives"
        )
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


@dataclass(frozen=True)
class Scene:
    """What a finding's row refers to: names and sizes of buffers, and lines of addresses."""

    names: dict[int, str]
    sizes: dict[int, int]
    line_of: Callable[[int], str]

    def describe(self, row: dict[str, int], kind: FindingKind) -> Finding:
        where = self.line_of(row["pc"]) if row["pc"] else "?"
        group = tuple(row[f"threadgroup_{axis}"] for axis in "xyz")
        text = (
            f"{kind.text}{self._detail(row, kind.about)}; threadgroup {group} thread {row['thread']}; "
            f"{where}; {row['count']} times"
        )
        buffer = row["buffer"] if kind.about == "device" else None
        return Finding(
            kind.text, kind.fatal, text, where, buffer, _signed(row["offset"]), row["count"]
        )

    def _detail(self, row: dict[str, int], about: str) -> str:
        offset, nbytes, other = _signed(row["offset"]), row["bytes"], row["other"]
        if about == "device":
            buffer = row["buffer"]
            size = self.sizes.get(buffer, 0)
            return f" of {nbytes} B at byte {offset} of buffer {buffer} {self.names.get(buffer, '')} ({size} B)"
        if about == "race":
            writer = (
                f", which wrote it at {self.line_of(row['other_pc'])}" if row["other_pc"] else ""
            )
            return f" at threadgroup byte {offset} with thread {other}{writer}"
        if about == "threadgroup":
            return f": {nbytes} B at threadgroup byte {offset}"
        if about == "lanes":
            return f": lanes {row['offset']:08x} of {other:08x}"
        if about == "count":
            return f": {offset} of them"
        if about == "address":
            return f" at address {row['offset']:#x}"
        return ""


def over_limit(nbytes: int) -> Finding:
    text = f"threadgroup memory over 32 KiB: {nbytes} B where an Apple GPU has {THREADGROUP_MEMORY_LIMIT} B"
    return Finding("threadgroup memory over 32 KiB", True, text, "?", None, 0, 1)


def _signed(offset: int) -> int:
    return offset - (1 << 64) if offset >= 1 << 63 else offset
