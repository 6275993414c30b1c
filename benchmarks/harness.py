"""Records of benchmarks: what ``paged_mlx.bench.measure`` measures, with the commit, as JSON."""

import json
import subprocess
from collections.abc import Iterable
from pathlib import Path

from paged_mlx.bench import measure as measuring
from paged_mlx.bench.measure import Candidate, Case, LeftOut, format_case, measure, ratio

__all__ = ["Candidate", "Case", "LeftOut", "environment", "format_case", "measure", "ratio", "run"]

RESULTS = Path(__file__).parent / "results"


def run(question: str, cases: Iterable[Case], save: bool = True) -> dict:
    """Measure all cases, print a table, and save the record as ``results/<question>.json``.

    Cases may come from a generator, so that only one holds its K and V at a time.
    """
    record = {"question": question, **environment(), "cases": []}
    for case in cases:
        result = measure(case)
        record["cases"].append(result)
        print(format_case(result), flush=True)
    if save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{question}.json").write_text(json.dumps(record, indent=1) + "\n")
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
