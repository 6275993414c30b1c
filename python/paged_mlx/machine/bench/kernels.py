"""Trials of the kernels: one layer's attention on pages, on contiguous K and V, and gathered."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import mlx.core as mx

from paged_mlx.formats.page_format import PageFormats
from paged_mlx.machine.bench.measure import Candidate, Case, check_close
from paged_mlx.machine.bench.trials import Trial
from paged_mlx.machine.bench.workload import DTYPES, Geometry, Workload
from paged_mlx.pages.table import PageTable
from paged_mlx.pool import PagePool

PAGED, CONTIGUOUS, GATHER = "paged", "mx.fast on contiguous K and V", "gather, then mx.fast"
CLOSE, COARSE = 0.02, 0.5  # of the largest output: other orders of summation; K and V in few bits


def cases(
    trials: Iterator[Trial], geometry: Geometry, rounds: int, formats: Sequence[PageFormats] = ()
) -> Iterator[Case]:
    """The cases of trials; a trial of generation is one decode step, planned anew.

    The plan, the graph and its evaluation are inside the time.

    Args:
        formats: Of pages, a candidate each besides.
    """
    for trial in trials:
        geometry = replace(geometry, page_size=trial.page_size)
        new = trial.prompt or 1
        lengths = [depth + new for depth in trial.depths]
        work = Workload(lengths, geometry, [new] * trial.batch, trial.shared)
        k, v = work.contiguous_kv()
        candidates = [
            Candidate(PAGED, work.paged, _read_once(trial, work.nbytes, work.g)),
            Candidate(CONTIGUOUS, partial(work.contiguous, k, v), work.nbytes),
            Candidate(GATHER, work.naive_gather, work.nbytes),
        ]
        for each in formats:
            held = InFormat(work, each, trial.shared, k, v)
            candidates.append(Candidate(f"{PAGED}, {each}", held.attend, held.nbytes))
        yield Case(trial.name, candidates, close, rounds, about={"trial": trial})


def close(outputs: dict[str, Any]) -> None:
    """All outputs are those of the first, up to rounding; on quantised pages, roughly."""
    check_close(
        outputs,
        "outputs",
        CLOSE,
        {name: COARSE for name in outputs if name.startswith(f"{PAGED},")},
    )


def _read_once(trial: Trial, nbytes: int, geometry: Geometry) -> int:
    """Bytes of K and V that must be read: what is shared, once."""
    whole_pages = trial.shared // geometry.page_size * geometry.page_size
    return nbytes - (trial.batch - 1) * whole_pages * geometry.bytes_per_token


class InFormat:
    """The K and V of a workload in pages of another format.

    Args:
        work: The workload.
        formats: Of K and of V.
        shared: Tokens that all sequences begin with.
        k, v: Its K and V, contiguous.

    Attributes:
        nbytes: Bytes of the pages that are in use.
    """

    def __init__(self, work: Workload, formats: PageFormats, shared: int, k: mx.array, v: mx.array):
        g = work.g
        size = max(g.page_size, formats.default_page_size or 0)
        pages = sum(-(-length // size) for length in work.lengths) + len(work.lengths)
        self._pool = PagePool(
            1, pages, size, g.num_kv_heads, g.head_dim, DTYPES[g.dtype],
            k_format=formats.k, v_format=formats.v,
        )  # fmt: skip
        self._q, self._query_lens, self._num_q_heads = work.q, work.query_lens, g.num_q_heads
        common = shared // size * size
        first = PageTable(size)
        self._write(first, common, k[0], v[0], 0)
        self._tables = [first.fork() for _ in work.lengths]
        first.release()
        for row, (table, length) in enumerate(zip(self._tables, work.lengths)):
            self._write(table, length - common, k[row], v[row], common)
        self.nbytes = self._pool.page_nbytes * self._pool.allocator.num_used

    def _write(self, table: PageTable, count: int, k, v, start: int) -> None:
        """Append tokens from ``start`` on of a sequence's K and V, ``[heads, tokens, dim]``."""
        if count:
            slots = table.append_tokens(count, self._pool.allocator).slots
            own_k, own_v = (x[:, start : start + count].swapaxes(0, 1) for x in (k, v))
            self._pool[0].write(own_k, own_v, slots)
            mx.eval(self._pool.state)

    def attend(self) -> mx.array:
        plan = self._pool.plan(
            self._tables, num_q_heads=self._num_q_heads, query_lens=self._query_lens
        )
        out = self._pool[0].attend(self._q, plan)
        mx.eval(out)
        return out
