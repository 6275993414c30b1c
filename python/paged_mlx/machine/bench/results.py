"""Results as a table in Markdown, as JSON with the raw samples, and as CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import asdict
from statistics import fmean, stdev
from typing import Any

from paged_mlx.machine.bench.trials import FIELDS


def record(about: dict[str, Any], results: list[dict], routes: dict[str, Any]) -> dict[str, Any]:
    """Everything about a run, as JSON can hold it.

    Args:
        about: Machine, versions, and what was measured.
        results: Of ``measure``, a trial in each ``about``.
        routes: Which kernels served.
    """
    trials = []
    for result in results:
        trial = result["about"]["trial"]
        candidates = [
            candidate | _speeds(trial.tokens, candidate["seconds"])
            for candidate in result["candidates"]
        ]
        told = {"test": trial.name, "tokens": trial.tokens, **asdict(trial)}
        trials.append(told | {"order": result["order"], "candidates": candidates})
    return {**about, "tests": trials, "routes": routes}


def _speeds(tokens: int, seconds: list[float]) -> dict[str, float]:
    """Tokens a second: the mean of the runs and their standard deviation, as llama-bench has it."""
    speeds = [tokens / s for s in seconds]
    spread = stdev(speeds) if len(speeds) > 1 else 0.0
    return {"tokens_per_second": fmean(speeds), "tokens_per_second_sd": spread}


def to_json(found: dict[str, Any]) -> str:
    return json.dumps(found, indent=1)


def to_csv(found: dict[str, Any]) -> str:
    """A row for each test and candidate."""
    out = io.StringIO()
    columns = ["test", *FIELDS, "candidate", "tokens_per_second", "tokens_per_second_sd"]
    columns += ["mean_seconds", "sd_seconds", "runs"]
    rows = csv.writer(out, lineterminator="\n")
    rows.writerow(columns)
    for test in found["tests"]:
        for c in test["candidates"]:
            speeds = c["tokens_per_second"], c["tokens_per_second_sd"], c["mean"], c["sd"]
            known = [test["test"], *(test[name] for name in FIELDS), c["name"]]
            rows.writerow([*known, *(f"{value:.6g}" for value in speeds), len(c["seconds"])])
    return out.getvalue().rstrip("\n")


def to_markdown(found: dict[str, Any]) -> str:
    """The rows as a table."""
    head, *body = ("| " + " | ".join(row) + " |" for row in rows(found))
    return "\n".join([head, "|---|" + "---:|" * (head.count("|") - 2), *body])


def rows(found: dict[str, Any]) -> Iterator[list[str]]:
    """What the columns are; then of each test the first candidate's figure, and how the others compare."""
    of_model = found["measured"] == "model"
    names = list(dict.fromkeys(c["name"] for t in found["tests"] for c in t["candidates"]))
    yield ["test", *(f"{name} {'t/s' if of_model else 'ms'}" for name in names)]
    for test in found["tests"]:
        by_name = {c["name"]: c for c in test["candidates"]}
        first = by_name[names[0]]
        yield [test["test"], *(_cell(by_name.get(name), first, of_model) for name in names)]


def _cell(candidate: dict | None, first: dict, of_model: bool) -> str:
    if candidate is None:
        return ""
    if of_model:
        value = f"{candidate['tokens_per_second']:.2f} ± {candidate['tokens_per_second_sd']:.2f}"
    else:
        value = f"{candidate['mean'] * 1e3:.3f} ± {candidate['sd'] * 1e3:.3f}"
    if candidate is first:
        if not of_model and candidate["nbytes"]:
            return f"{value}, {candidate['nbytes'] / candidate['mean'] / 1e9:.1f} GB/s"
        return value
    return f"{value} ({candidate['mean'] / first['mean']:.2f}x the time)"
