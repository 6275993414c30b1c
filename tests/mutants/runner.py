"""Try mutants, several at a time, and say who saw each."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from . import native
from .mutant import ROOT, Mutant

_SECONDS = 600  # of a fault that never ends; far more than a trial takes on a busy machine


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant.

    Attributes:
        case: The case that saw it; None if it survived.
        reason: How it showed, or why it could not be tried.
    """

    mutant: Mutant
    case: str | None
    reason: str

    @property
    def caught(self) -> bool:
        return self.case is not None

    def __str__(self) -> str:
        seen = self.case if self.caught else "SURVIVED"
        return f"{self.mutant.layer:<8} {self.mutant.name:<72} {seen:<24} {_line(self.reason)}"


def _line(text: str) -> str:
    """The last line that says something, short."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (lines[-1] if lines else "")[:100]


def attempt(mutant: Mutant) -> Verdict:
    """Run a mutant's suite until a case sees it."""
    try:
        mutant.text
    except ValueError as error:
        return Verdict(mutant, None, f"does not apply: {error}")
    command = [sys.executable, "-m", "mutants.trial", mutant.name]
    if mutant.layer not in ("kernels", "python"):
        try:
            command.append(str(_module(mutant)))
        except native.BuildError as error:
            return Verdict(mutant, None, f"does not build: {error}")
    paths = [
        str(ROOT / "tests"),
        str(ROOT / "tests/support"),
        str(ROOT / "python"),
        os.environ.get("PYTHONPATH", ""),
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in paths if p)}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=_SECONDS
        )
    except subprocess.TimeoutExpired:
        return Verdict(mutant, mutant.seen_by, f"no end after {_SECONDS} s")
    if done.returncode < 0:
        return Verdict(mutant, mutant.seen_by, f"crash, signal {-done.returncode}")
    if done.returncode:
        return Verdict(mutant, None, f"the suite did not run: {done.stderr[-2000:]}")
    verdict = json.loads(done.stdout.splitlines()[-1])
    return Verdict(mutant, verdict["case"], verdict["reason"] or "every case passes")


def _module(mutant: Mutant) -> Path:
    """The native module with the fault; over the stand-in for MLX's device where that is judged."""
    if mutant.layer == "contract":
        from metal_contract.build import build

        return build(mutant)
    return native.build(mutant)


def attempt_all(
    mutants: Iterable[Mutant], jobs: int, progress: Callable[[Verdict], None] = lambda verdict: None
) -> list[Verdict]:
    """Try every mutant; verdicts in the order of the list."""
    with ThreadPoolExecutor(jobs) as pool:
        verdicts = []
        for verdict in pool.map(attempt, mutants):
            progress(verdict)
            verdicts.append(verdict)
    return verdicts


def table(verdicts: list[Verdict]) -> str:
    """One line a layer."""
    lines = [f"{'layer':<8} {'mutants':>8} {'caught':>8}"]
    for layer in dict.fromkeys(v.mutant.layer for v in verdicts):
        own = [v for v in verdicts if v.mutant.layer == layer]
        lines.append(f"{layer:<8} {len(own):>8} {sum(v.caught for v in own):>8}")
    lines.append(f"{'all':<8} {len(verdicts):>8} {sum(v.caught for v in verdicts):>8}")
    return "\n".join(lines)
