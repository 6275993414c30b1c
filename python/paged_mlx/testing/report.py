"""A run as a table, rows groups and columns backends, and as JSON."""

from __future__ import annotations

import json
import math
import sys
import time

from .checks import Check
from .runner import Cell, Report

QUIET_SECONDS = 10.0  # between two lines where stderr is no terminal


def table(report: Report) -> str:
    """Cases, worst error over bound and seconds, for every group and backend."""
    names = list(dict.fromkeys(cell.backend for cell in report.cells))
    groups = list(dict.fromkeys(cell.group for cell in report.cells))
    rows = [["group", *(f"{name}: cases  worst  seconds" for name in names)]]
    for group in groups:
        rows.append([group, *(_cell(report.cell(group, name)) for name in names)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(text.ljust(w) for text, w in zip(row, widths)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(lines)


def failures(report: Report) -> str:
    """Why it failed, and the smallest failing case of each group, ready to paste."""
    parts = []
    for cell in report.cells:
        for failure in cell.failures:
            head = f"{cell.group} on {cell.backend}: {cell.failed} of {cell.cases} failed"
            parts.append(f"{head}\n{failure.reason.rstrip()}\n\n{failure.snippet}")
    return "\n\n".join(parts)


def to_json(report: Report, **about) -> str:
    """The same as a record; ``about`` says what was run and where."""
    cells = [
        {
            "group": cell.group,
            "backend": cell.backend,
            "cases": cell.cases,
            "skipped": cell.skipped,
            "failed": cell.failed,
            "worst_error_over_bound": cell.worst if math.isfinite(cell.worst) else None,
            "seconds": round(cell.seconds, 3),
            "failures": [{"reason": f.reason, "snippet": f.snippet} for f in cell.failures],
        }
        for cell in report.cells
    ]
    return json.dumps({**about, "right": report.right, "cells": cells}, indent=2)


def _cell(cell: Cell) -> str:
    if not cell.cases:
        return "not offered"
    count = f"{cell.cases}" if not cell.failed else f"{cell.cases} ({cell.failed} FAILED)"
    skipped = f" ({cell.skipped} not offered)" if cell.skipped else ""
    return f"{count}{skipped}  {cell.worst:.2f}  {cell.seconds:.1f}"


class ProgressLine:
    """Called before each check: a line on stderr that counts them, rewritten on a terminal, and
    elsewhere a line now and then.

    Args:
        total: Checks in all.
    """

    def __init__(self, total: int):
        self._total, self._done = total, 0
        self._shows = sys.stderr.isatty()
        self._said = time.monotonic()

    def __call__(self, cell: Cell, check: Check) -> None:
        self._done += 1
        text = f"{self._done}/{self._total}  {cell.group} on {cell.backend}"
        if self._shows and self._done % 10 == 1:
            print(f"\r{text}".ljust(72), end="", file=sys.stderr, flush=True)
        elif not self._shows and time.monotonic() - self._said > QUIET_SECONDS:
            self._said = time.monotonic()
            print(text, file=sys.stderr, flush=True)

    def end(self) -> None:
        """Take the line away."""
        if self._shows:
            print("\r" + " " * 72 + "\r", end="", file=sys.stderr, flush=True)
