"""Random programs over a pool in a lazy graph.

A program appends, forks, truncates, releases and attends on a small pool, so that pages are
freed and taken again while work on them is pending. It evaluates now and then, everything or
one output or the pool, now or asynchronously, on two streams, and takes some steps through
``mx.compile``. Every output must be what the tokens of that moment give, whenever it is
evaluated; fresh pages are NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from paged_mlx.reference import dtypes, oracle, yardstick
from paged_mlx.reference.case import Case

from .backends import from_mlx, to_mlx
from .outcome import Outcome

NUM_LAYERS = 2
MOST_SEQUENCES = 5


@dataclass
class Sequence:
    """A page table, and its tokens' K and V of every layer as float32 arrays."""

    table: Any
    keys: list[np.ndarray]
    values: list[np.ndarray]


@dataclass
class Pending:
    """An output that may not be evaluated yet, and what it must be."""

    out: mx.array
    exact: np.ndarray
    own: np.ndarray
    step: int


class Program:
    """One random program; ``run`` plays it and judges every output."""

    def __init__(self, case: Case, stream):
        from paged_mlx import PageAllocator, PagePool

        self.case, self.rng = case, np.random.default_rng([case.seed, 10])
        self.allocator = PageAllocator(24, case.page_size)
        self.pool = PagePool(
            NUM_LAYERS,
            24,
            case.page_size,
            case.num_kv_heads,
            case.head_dim,
            getattr(mx, case.dtype),
            case.value_dim,
            allocator=self.allocator,
            fill=float("nan"),
            stream=stream,
        )
        self.streams = [mx.new_stream(stream), mx.new_stream(stream)]
        self.sequences: list[Sequence] = []
        self.pending: list[Pending] = []
        self.compiled = [self._compile(layer) for layer in range(NUM_LAYERS)]

    def run(self, steps: int) -> Outcome:
        actions = [self.append] * 6 + [self.attend] * 6 + [self.evaluate] * 2
        actions += [self.fork, self.truncate, self.release, self.switch_stream]
        for step in range(steps):
            self.step = step
            actions[self.rng.integers(len(actions))]()
        order = self.rng.permutation(len(self.pending))
        outcomes = [self.judge(self.pending[i]) for i in order]
        self.pool.check()
        worst = max(outcomes, key=lambda o: o.ratio, default=Outcome(True))
        return next((o for o in outcomes if not o.right), worst)

    def judge(self, pending: Pending) -> Outcome:
        out = dtypes.decode(from_mlx(pending.out), self.case.dtype)
        verdict = yardstick.judge(out, pending.exact, pending.own, self.case.dtype)
        reason = f"output of step {pending.step}: {verdict.reason}"
        return Outcome(verdict.right, verdict.ratio, reason)

    # What a program does

    def append(self) -> None:
        """Write new tokens of a sequence in every layer; with no page left, release one."""
        from paged_mlx import OutOfPages, PageTable

        if not self.sequences or (len(self.sequences) < MOST_SEQUENCES and self._chance(0.3)):
            empty = [self._draw(0, dim) for dim in self._dims for _ in range(NUM_LAYERS)]
            layers = empty[:NUM_LAYERS], empty[NUM_LAYERS:]
            self.sequences.append(Sequence(PageTable(self.case.page_size), *layers))
        sequence = self._pick()
        count = int(self.rng.integers(1, 2 * self.case.page_size))
        try:
            plan = sequence.table.append_tokens(count, self.allocator)
        except OutOfPages:
            self.release()
            return
        for layer in range(NUM_LAYERS):
            k, v = (self._draw(count, dim) for dim in self._dims)
            sequence.keys[layer] = np.concatenate([sequence.keys[layer], k])
            sequence.values[layer] = np.concatenate([sequence.values[layer], v])
            self._write(layer, k, v, plan.slots)

    def attend(self) -> None:
        """Attend the newest tokens of some sequences in one layer; keep what it must give."""
        chosen = [s for s in self.sequences if s.table.num_tokens and self._chance(0.7)]
        if not chosen:
            return
        layer = int(self.rng.integers(NUM_LAYERS))
        lens = [int(self.rng.integers(1, min(4, s.table.num_tokens) + 1)) for s in chosen]
        q = self._round(
            self.rng.standard_normal((sum(lens), self.case.num_q_heads, self.case.head_dim))
        )
        plan = self._plan(chosen, lens)
        arguments = to_mlx(dtypes.encode(q, self.case.dtype), self.case.dtype), plan.array
        if self._chance(0.3):
            out = self.compiled[layer](*arguments)
        else:
            out = self.pool[layer].attend(*arguments)
        exact, own = self._expected(chosen, layer, lens, q)
        self.pending.append(Pending(out, exact, own, self.step))

    def fork(self) -> None:
        if self.sequences and len(self.sequences) < MOST_SEQUENCES:
            source = self._pick()
            twin = Sequence(source.table.fork(), list(source.keys), list(source.values))
            self.sequences.append(twin)

    def truncate(self) -> None:
        if self.sequences:
            sequence = self._pick()
            length = int(self.rng.integers(0, sequence.table.num_tokens + 1))
            sequence.table.truncate(length)
            sequence.keys = [k[:length] for k in sequence.keys]
            sequence.values = [v[:length] for v in sequence.values]

    def release(self) -> None:
        if self.sequences:
            sequence = self._pick()
            sequence.table.release()
            self.sequences = [s for s in self.sequences if s is not sequence]

    def switch_stream(self) -> None:
        self.pool.stream = self.streams[self.rng.integers(2)]

    def evaluate(self) -> None:
        """Evaluate the pool, some outputs in any order, or both; now or soon."""
        outs = [p.out for p in self.pending[-4:]]
        self.rng.shuffle(outs)
        outs = outs[: self.rng.integers(len(outs) + 1)]
        state = self.pool.state if self._chance(0.5) else []
        (mx.async_eval if self._chance(0.6) else mx.eval)(*outs, *state)

    # Pieces

    @property
    def _dims(self) -> tuple[int, int]:
        return self.case.head_dim, self.case.value_dim

    def _chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def _pick(self) -> Sequence:
        return self.sequences[self.rng.integers(len(self.sequences))]

    def _round(self, values: np.ndarray) -> np.ndarray:
        return dtypes.round_to(values, self.case.dtype)

    def _draw(self, count: int, dim: int) -> np.ndarray:
        return self._round(self.rng.standard_normal((count, self.case.num_kv_heads, dim)))

    def _write(self, layer: int, k: np.ndarray, v: np.ndarray, slots: np.ndarray) -> None:
        stored = [to_mlx(dtypes.encode(a, self.case.dtype), self.case.dtype) for a in (k, v)]
        self.pool.write(layer, stored[0], stored[1], slots)

    def _compile(self, layer: int):
        @partial(mx.compile, inputs=self.pool.state, outputs=self.pool.state)
        def step(q, words):
            return self.pool[layer].attend(q, words)

        return step

    def _plan(self, chosen: list[Sequence], query_lens: list[int]):
        from paged_mlx import fast
        from paged_mlx.pages.block_table import pack

        tables = pack([s.table for s in chosen])
        return fast.plan(
            tables.block_tables,
            tables.context_lens,
            num_q_heads=self.case.num_q_heads,
            num_kv_heads=self.case.num_kv_heads,
            page_size=self.case.page_size,
            cu_seqlens_q=np.cumsum([0, *query_lens]).astype(np.int32),
            page_starts=tables.page_starts,
            page_lens=tables.page_lens,
            num_pages=self.pool.num_pages,
        )

    def _expected(self, chosen, layer: int, query_lens, q):
        """The oracle's and the yardstick's output of one step."""
        exact, own, begin = [], [], 0
        for s, length in zip(chosen, query_lens, strict=True):
            rows = q[begin : begin + length], s.keys[layer], s.values[layer]
            exact.append(oracle.attention(*rows)[0])
            own.append(yardstick.attention(*rows, self.case.dtype)[0])
            begin += length
        return np.concatenate(exact), np.concatenate(own)


def run(case: Case, stream, steps: int = 120) -> Outcome:
    """Play the program that ``case.seed`` makes, with the case's heads, dims and page size."""
    return Program(case, stream).run(steps)
