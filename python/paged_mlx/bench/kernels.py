"""Trials of the kernels: one layer's attention on pages, on contiguous K and V, and gathered."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from paged_mlx.bench.measure import Candidate, Case
from paged_mlx.bench.trials import Trial
from paged_mlx.bench.workload import Geometry, Workload, agree

PAGED, CONTIGUOUS, GATHER = "paged", "mx.fast on contiguous K and V", "gather, then mx.fast"


def cases(trials: Iterator[Trial], geometry: Geometry, rounds: int) -> Iterator[Case]:
    """The cases of trials; a trial of generation is one decode step, planned anew.

    The plan, the graph and its evaluation are inside the time.
    """
    for trial in trials:
        new = trial.prompt or 1
        lengths = [depth + new for depth in trial.depths]
        work = Workload(lengths, geometry, [new] * trial.batch, trial.shared)
        k, v = work.contiguous_kv()
        candidates = [
            Candidate(PAGED, work.paged, _bytes(trial, work)),
            Candidate(CONTIGUOUS, partial(work.contiguous, k, v), work.nbytes),
            Candidate(GATHER, work.naive_gather, work.nbytes),
        ]
        yield Case(trial.name, candidates, agree, rounds, about={"trial": trial})


def _bytes(trial: Trial, work: Workload) -> int:
    """Bytes of K and V that must be read: what is shared, once."""
    page = work.g.page_size
    again = (trial.batch - 1) * (trial.shared // page * page)
    return work.nbytes - again * work.g.bytes_per_token
