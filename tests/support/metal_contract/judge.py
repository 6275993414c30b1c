"""Whether dispatches are ordered where they must be, and registered as what they are."""

from dataclasses import dataclass

from metal_host import Program
from metal_host.result import Result
from paged_mlx._native import _ext


def is_loaded() -> bool:
    """Whether the native module of this process is built against the stand-in."""
    return hasattr(_ext, "contract_finish")


@dataclass(frozen=True)
class Access:
    """What one dispatch does with one buffer."""

    dispatch: int
    kernel: str
    index: int
    writes: bool
    encoder: int
    epoch: int
    concurrent: int

    def __str__(self) -> str:
        return f"{'writes' if self.writes else 'reads'} buffer {self.index} of {self.kernel}"


class Judge:
    """Collects the dispatches of a process; judges them once all is encoded.

    An instrumented dispatch tells what it read and wrote. Any other writes the outputs that its
    text does not declare const, and reads the rest.
    """

    def __init__(self):
        _ext.contract_finish()
        _ext.contract_errors()
        # By memory and stream, in the order of the dispatches: MLX orders streams by events.
        self._accesses: dict[tuple[int, int], list[Access]] = {}
        self.findings: list[str] = []
        self._count = 0

    def add(self, dispatch: dict, program: Program, result: Result | None) -> None:
        """One dispatch, the text that it ran, and what an instrument saw."""
        kernel = dispatch["kernel"]
        self._count += 1
        _, declaration = program.declared.resolve(kernel)
        written = {p.index: p.is_written for p in declaration.parameters if p.is_buffer}
        for index, (memory, is_output) in dispatch["bound"].items():
            if index not in written:
                continue
            writes = written[index] and is_output
            if result is not None and index in result.buffers:
                seen = result.buffers[index]
                if not seen.used:
                    continue
                writes = bool(seen.store_ops or seen.atomics)
            if writes and not is_output:
                self.findings.append(
                    f"{kernel} writes buffer {index}, which is not registered as an output"
                )
            access = Access(self._count, kernel, index, writes, *dispatch["order"])
            self._accesses.setdefault((memory, dispatch["stream"]), []).append(access)

    def finish(self) -> list[str]:
        """Everything that broke the contract."""
        waits = _ext.contract_finish()
        before = _closure(waits)
        for accesses in self._accesses.values():
            self._check(accesses, before)
        return _ext.contract_errors() + self.findings

    def _check(self, accesses: list[Access], before: dict[int, set[int]]) -> None:
        """The accesses of one allocation: each against the writers before it, a writer against
        the readers too, back to the last write that all others wait for."""
        open_accesses: list[Access] = []
        for access in accesses:
            for earlier in open_accesses:
                if (access.writes or earlier.writes) and not _ordered(earlier, access, before):
                    self.findings.append(f"nothing orders: {earlier}; then: {access}")
            if access.writes:
                open_accesses = [x for x in open_accesses if _may_run_at_once(x, access)]
            open_accesses.append(access)


def _may_run_at_once(earlier: Access, access: Access) -> bool:
    """Dispatches between start_concurrent and its end write different elements."""
    return earlier.writes and access.writes and 0 <= earlier.concurrent == access.concurrent


def _ordered(earlier: Access, access: Access, before: dict[int, set[int]]) -> bool:
    if earlier.dispatch == access.dispatch:  # one of its two parameters is not used
        return True
    if _may_run_at_once(earlier, access):
        return True
    if earlier.encoder == access.encoder:
        return earlier.epoch < access.epoch
    return earlier.encoder in before.get(access.encoder, ())


def _closure(waits: dict[int, list[int]]) -> dict[int, set[int]]:
    """For each encoder all that are done before it begins."""
    before: dict[int, set[int]] = {}
    for encoder in sorted(waits):
        before[encoder] = set(waits[encoder])
        for earlier in waits[encoder]:
            before[encoder] |= before.get(earlier, set())
    return before
