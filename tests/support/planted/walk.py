"""A small paged attention that spells out every key it reads, so that faults can be planted.

``Walk`` lists the keys of one sequence in reading order: page, slot, position, and for every
query token how often it counts the key (1 when all is well; 0 dropped, 2 read twice).
``attend`` turns walks into results. A fault changes a walk, the scores or the finish.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from paged_mlx.reference import dtypes
from paged_mlx.reference.problem import Problem

#: Keys of one partition; the walk knows where partitions meet.
PARTITION = 64


@dataclass
class Walk:
    """The keys of one sequence, in reading order."""

    sequence: int
    query_positions: np.ndarray  # [query_len]
    context_len: int
    page: np.ndarray  # [keys]
    slot: np.ndarray  # [keys]
    position: np.ndarray  # [keys]
    entry: np.ndarray  # [keys], column of the block table
    counts: np.ndarray  # [query_len, keys]
    kv_heads: np.ndarray  # [num_q_heads]
    shared_len: int  # tokens in pages that another sequence begins with too

    def first_key(self, window: int | None) -> np.ndarray:
        """First position that each query token may see."""
        if window is None:
            return np.zeros_like(self.query_positions)
        return np.maximum(0, self.query_positions - window + 1)

    def reread(self, keys: np.ndarray, source: np.ndarray) -> None:
        """Read ``keys`` from where ``source`` keys lie."""
        self.page[keys], self.slot[keys] = self.page[source], self.slot[source]


class Fault:
    """No fault: the hooks that a planted fault overrides.

    ``name`` says what goes wrong. A hook gets its own copy of what it changes.
    """

    name = "none"

    def walk(self, walk: Walk, problem: Problem) -> None:
        """Change which keys are read."""

    def options(self, problem: Problem) -> dict:
        """Options to use in place of the problem's."""
        return {}

    def scores(self, score: np.ndarray, walk: Walk, problem: Problem) -> np.ndarray:
        """Change ``[num_q_heads, query_len, keys]``, all options applied."""
        return score

    def values(self, values: np.ndarray, seen: np.ndarray) -> np.ndarray:
        """``[keys, num_kv_heads, v_head_dim]``; ``seen`` says which some row counts."""
        values[~seen] = 0
        return values

    def finish(self, state: State, walk: Walk, problem: Problem) -> None:
        """Change the softmax state before it becomes a result."""

    def result(self, out: np.ndarray, lse: np.ndarray, walk: Walk) -> tuple:
        """Change the rows of one sequence before they are rounded."""
        return out, lse


@dataclass
class State:
    """Softmax state of the rows of one sequence, ``[num_q_heads, query_len]`` and outputs."""

    largest: np.ndarray
    total: np.ndarray
    mixed: np.ndarray  # [num_q_heads, query_len, v_head_dim], unnormalised
    sinks: np.ndarray | None


def attend(problem: Problem, fault: Fault | None = None) -> tuple[np.ndarray, np.ndarray]:
    """``(out, lse)`` as float32, through the pages, with one fault planted."""
    fault = fault or Fault()
    tokens, num_q_heads, _ = problem.q.shape
    out = np.zeros((tokens, num_q_heads, problem.v_pages.shape[3]), np.float32)
    lse = np.full((tokens, num_q_heads), -np.inf, np.float32)
    bounds = problem.query_bounds
    with np.errstate(all="ignore"):
        for s in range(len(problem.context_lens)):
            if bounds[s] == bounds[s + 1]:
                continue
            walk = start(problem, s)
            fault.walk(walk, problem)
            rows = slice(bounds[s], bounds[s + 1])
            results = _sequence(problem, walk, rows, fault)
            out[rows], lse[rows] = fault.result(*results, walk)
    return dtypes.round_to(out, problem.dtype), lse


def start(problem: Problem, s: int) -> Walk:
    """The right walk of a sequence."""
    bounds, context_len = problem.query_bounds, int(problem.context_lens[s])
    query_positions = np.arange(context_len - (bounds[s + 1] - bounds[s]), context_len)
    page, slot, position, entry = _slots(problem, s, context_len)
    counts = _counts(problem, position, query_positions)
    used = counts.any(axis=0)
    num_q_heads, num_kv_heads = problem.q.shape[1], problem.k_pages.shape[1]
    return Walk(
        s,
        query_positions,
        context_len,
        page[used],
        slot[used],
        position[used],
        entry[used],
        counts[:, used].astype(np.float32),
        np.arange(num_q_heads) // (num_q_heads // num_kv_heads),
        _shared_len(problem, s),
    )


def _slots(problem: Problem, s: int, context_len: int):
    page_size = problem.k_pages.shape[2]
    columns = np.arange(problem.block_tables.shape[1])
    starts = columns * page_size if problem.page_starts is None else problem.page_starts[s]
    lens = np.full(len(columns), page_size) if problem.page_lens is None else problem.page_lens[s]
    parts = []
    for i in columns:
        length = min(int(lens[i]), context_len - int(starts[i]))
        if length > 0 and (i == 0 or starts[i] > starts[i - 1]):
            offsets = np.arange(length)
            pages = np.full(length, problem.block_tables[s, i])
            parts.append((pages, offsets, offsets + starts[i], np.full(length, i)))
    if not parts:
        return (np.zeros(0, np.int64),) * 4
    return tuple(np.concatenate(p).astype(np.int64) for p in zip(*parts, strict=True))


def _counts(problem: Problem, position, query_positions):
    key, query = position[None, :], query_positions[:, None]
    seen = key <= query if problem.causal else np.ones((len(query), position.size), bool)
    if problem.sliding_window is not None:
        seen = seen & (key > query - problem.sliding_window)
    return seen


def _shared_len(problem: Problem, s: int) -> int:
    tables, page_size = problem.block_tables, problem.k_pages.shape[2]
    equal = (tables == tables[s]) & (tables[s] >= 0)
    equal[s] = False
    return int(np.cumprod(equal, axis=1).sum(axis=1).max(initial=0)) * page_size


def _sequence(problem: Problem, walk: Walk, rows: slice, fault: Fault):
    seen = walk.counts.any(axis=0)
    page = np.clip(walk.page, 0, len(problem.k_pages) - 1)
    keys = dtypes.decode(problem.k_pages[page, :, walk.slot], problem.dtype)
    values = dtypes.decode(problem.v_pages[page, :, walk.slot], problem.dtype)
    values = fault.values(values.copy(), seen)
    options = {**problem.options, **fault.options(problem)}
    score = _scores(problem.queries[rows], keys, options, walk, rows)
    score = fault.scores(score, walk, problem)
    score = np.where(walk.counts[None] > 0, score, -np.inf).astype(np.float32)
    largest = score.max(axis=2, initial=-np.inf)
    weights = np.exp(score - np.where(largest == -np.inf, 0, largest)[..., None]) * walk.counts
    hidden = (score == -np.inf) & seen
    mixed = np.stack(
        [
            _mixed(w, values[:, h], unseen)
            for w, h, unseen in zip(weights, walk.kv_heads, hidden, strict=True)
        ]
    )
    state = State(largest, weights.sum(axis=2), mixed, options.get("sinks"))
    fault.finish(state, walk, problem)
    return _result(state)


def _mixed(weights, values, hidden):
    """Values mixed by weights; what a row may not see has no part, be it NaN."""
    finite = np.isfinite(values)
    mixed = weights @ np.where(finite, values, 0)
    if finite.all():
        return mixed
    rest = weights[..., None] * np.where(finite, 0, values)
    return mixed + np.where(hidden[..., None] | finite, 0, rest).sum(axis=1)


def _scores(q, keys, options, walk: Walk, rows: slice):
    scale = np.float32(options.get("scale", q.shape[2] ** -0.5))
    score = np.stack([q[:, i] @ keys[:, h].T for i, h in enumerate(walk.kv_heads)]) * scale
    if options.get("softcap"):
        cap = np.float32(options["softcap"])
        score = cap * np.tanh(score / cap)
    if options.get("alibi_slopes") is not None:
        distance = walk.position[None, :] - walk.query_positions[:, None]
        score = score + options["alibi_slopes"][:, None, None] * distance.astype(np.float32)
    if options.get("mask") is not None:
        mask = options["mask"] if options["mask"].ndim == 3 else options["mask"][None]
        part = mask[:, rows][:, :, np.clip(walk.position, 0, mask.shape[2] - 1)]
        hidden = ~part if part.dtype == bool else part == -np.inf
        score = np.where(hidden, -np.inf, score if part.dtype == bool else score + part)
    return score


def _result(state: State):
    empty = ~(state.largest > -np.inf) & ~np.isnan(state.largest)
    total, mixed, largest = state.total, state.mixed, state.largest
    if state.sinks is not None:
        sink = state.sinks[:, None]
        new = np.maximum(largest, sink)
        decay = np.exp(largest - new)
        total, mixed = total * decay + np.exp(sink - new), mixed * decay[..., None]
        largest = new
    out = np.where(empty[..., None], 0, mixed / total[..., None])
    lse = np.where(empty, -np.inf, largest + np.log(total))
    return np.moveaxis(out, 0, 1), lse.T
