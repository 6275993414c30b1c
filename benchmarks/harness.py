"""Records of benchmarks: what ``paged_mlx.machine.bench.measure`` measures, with the commit, as JSON."""

import json
import subprocess
from collections.abc import Iterable
from pathlib import Path

from paged_mlx.machine.bench import measure as measuring
from paged_mlx.machine.bench.measure import Candidate, Case, LeftOut, format_case, measure, ratio
from paged_mlx.machine.cache import write_whole

__all__ = [
    "Candidate",
    "Case",
    "LeftOut",
    "environment",
    "format_case",
    "measure",
    "ratio",
    "run",
    "save",
]

RESULTS = Path(__file__).parent / "results"  # of this checkout: documents quote them
_folder = RESULTS


def write_to(folder: Path) -> None:
    """Have records written there from now on."""
    global _folder
    _folder = folder


def save(record: dict) -> None:
    """Write a record as ``<question>.json``, whole or not at all."""
    _folder.mkdir(parents=True, exist_ok=True)
    write_whole(_folder / f"{record['question']}.json", json.dumps(record, indent=1) + "\n")


def run(question: str, cases: Iterable[Case]) -> dict:
    """Measure all cases, print a table, and save the record.

    Cases may come from a generator, so that only one holds its K and V at a time.
    """
    record = {"question": question, **environment(), "cases": []}
    for case in cases:
        result = measure(case)
        record["cases"].append(result)
        print(format_case(result), flush=True)
    save(record)
    return record


def environment() -> dict:
    """Where and with what a record was made."""
    return {
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        **measuring.environment(),
    }


def _git(*words: str) -> str:
    done = subprocess.run(
        ["git", *words], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return done.stdout.strip()
