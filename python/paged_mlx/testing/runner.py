"""Run checks on backends and remember what matters: counts, the worst ratio, the failures."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from .backends import Backend
from .checks import Check, run
from .outcome import Outcome
from .shrink import shrink, snippet


@dataclass
class Failure:
    """A check that failed, and the smallest one like it."""

    check: Check
    reason: str
    smallest: Check
    snippet: str


@dataclass
class Cell:
    """One group on one backend."""

    group: str
    backend: str
    cases: int = 0
    skipped: int = 0
    failed: int = 0
    worst: float = 0.0  # error over bound
    seconds: float = 0.0
    failures: list[Failure] = field(default_factory=list)

    def add(self, outcome: Outcome) -> None:
        if outcome.skipped:
            self.skipped += 1
            return
        self.cases += 1
        self.failed += not outcome.right
        self.worst = max(self.worst, outcome.ratio)


@dataclass
class Report:
    """Every cell of a run, in order."""

    cells: list[Cell] = field(default_factory=list)

    @property
    def right(self) -> bool:
        return not any(cell.failed for cell in self.cells)

    def cell(self, group: str, backend: str) -> Cell:
        for cell in self.cells:
            if (cell.group, cell.backend) == (group, backend):
                return cell
        self.cells.append(Cell(group, backend))
        return self.cells[-1]


Progress = Callable[[Cell, Check], None]


def run_suite(
    checks: Iterable[Check],
    backends: Iterable[Backend],
    *,
    shrink_seconds: float = 10.0,
    most_failures: int = 1,
    progress: Progress = lambda cell, check: None,
) -> Report:
    """Run every check on every backend.

    Args:
        shrink_seconds: Time to spend on making each shown failure smaller.
        most_failures: Failures of one group and backend that are shrunk and shown.
        progress: Called before each check.
    """
    report = Report()
    checks, backends = list(checks), list(backends)
    for check in checks:
        for backend in backends:
            cell = report.cell(check.group, backend.name)
            progress(cell, check)
            _run_one(check, backend, cell, shrink_seconds, most_failures)
    return report


def _run_one(check: Check, backend: Backend, cell: Cell, shrink_seconds, most_failures) -> None:
    begin = time.perf_counter()
    outcome = run(check, backend)
    cell.seconds += time.perf_counter() - begin
    cell.add(outcome)
    if outcome.right or len(cell.failures) >= most_failures:
        return
    smallest = shrink(check, backend, shrink_seconds)
    cell.failures.append(Failure(check, outcome.reason, smallest, snippet(smallest, backend)))


def first_failure(checks: Iterable[Check], backend: Backend) -> tuple[Check, Outcome] | None:
    """The first check that fails; None if all pass."""
    for check in checks:
        outcome = run(check, backend)
        if not outcome.right:
            return check, outcome
    return None
