"""A ``Check`` is a case and what is asked of the result; ``run`` asks it of a backend."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from paged_mlx.reference import moves, needle
from paged_mlx.reference.arrays import assemble, draw_contexts, draw_queries, share_prefixes
from paged_mlx.reference.case import Case
from paged_mlx.reference.problem import Problem

from . import graph, large
from .backends import Backend
from .outcome import Outcome


@dataclass(frozen=True)
class Check:
    """One row of work. ``ask`` names a function of ``ASKS``."""

    group: str
    case: Case
    ask: str = "oracle"

    def __repr__(self):
        return f"Check({self.group!r}, {self.case!r}, {self.ask!r})"


def run(check: Check, backend: Backend) -> Outcome:
    """Ask one check of one backend. An exception of the backend is a failure of the check."""
    if not backend.offers(check.case) or not _can(check.ask, backend):
        return Outcome(True, skipped=True)
    try:
        return ASKS[check.ask](check.case, backend)
    except Exception:
        return Outcome(False, np.inf, traceback.format_exc(limit=-3))


def _can(ask: str, backend: Backend) -> bool:
    return all(getattr(backend, name) is not None for name in NEEDS.get(ask, ()))


def _judged(problem: Problem, backend: Backend) -> Outcome:
    verdict = problem.judge(*backend.attend(problem))
    return Outcome(verdict.right, verdict.ratio, verdict.reason)


def _oracle(case: Case, backend: Backend) -> Outcome:
    """As close to the oracle as the yardstick allows; every round of a needle case."""
    problems = needle.build(case) if case.values == "needles" else [case.build()]
    worst = Outcome(True)
    for problem in problems:
        outcome = _judged(problem, backend)
        if not outcome.right:
            return outcome
        worst = max(worst, outcome, key=lambda o: o.ratio)
    return worst


def _same_bits(one, other, what: str) -> Outcome:
    for name, a, b in zip(("out", "lse"), one, other, strict=True):
        if a is None and b is None:
            continue
        a, b = (np.ascontiguousarray(x, np.float32).view(np.uint32) for x in (a, b))
        if a.shape != b.shape or (a != b).any():
            count = (a != b).sum() if a.shape == b.shape else "all"
            return Outcome(False, np.inf, f"{count} values of {name} depend on {what}")
    return Outcome(True)


def _poison(case: Case, backend: Backend) -> Outcome:
    """No bit depends on what lies outside the contexts or in the padding."""
    one, clean = (backend.attend(c.build()) for c in (case, case.replace(poison="zero")))
    outcome = _same_bits(one, clean, f"slots outside the contexts ({case.poison})")
    return outcome if not outcome.right else _judged(case.build(), backend)


def _not_finite(case: Case, backend: Backend) -> Outcome:
    """NaN and infinities in q, K and V reach what sees them, and no other bit."""
    clean, spoilt = case.build(), _spoilt(case)
    before, found = backend.attend(clean), backend.attend(spoilt)
    for name, was, got, old, exact in zip(("out", "lse"), before, found, clean.exact, spoilt.exact):
        if got is None:
            continue
        got = np.asarray(got, np.float64)
        if not np.array_equal(_kinds(got), _kinds(exact)):
            at = tuple(int(i) for i in np.argwhere(_kinds(got) != _kinds(exact))[0])
            reason = f"{name}: {got[at]} at {at} where {exact[at]:.6g} is right"
            return Outcome(False, np.inf, reason)
        same = (old == exact) & np.isfinite(exact)
        if (got[same] != np.asarray(was, np.float64)[same]).any():
            return Outcome(False, np.inf, f"{name} depends on numbers that it does not see")
    return Outcome(True)


def _kinds(x: np.ndarray) -> np.ndarray:
    """0 for what is finite; infinities and NaN apart."""
    return np.where(np.isnan(x), 2, np.where(np.isinf(x), np.sign(x), 0))


def _spoilt(case: Case) -> Problem:
    """The case's arrays with NaN and infinities in q and at some positions of K and V."""
    rng, dice = np.random.default_rng([case.seed, 1]), np.random.default_rng([case.seed, 8])
    keys, values = draw_contexts(case, rng)
    q = draw_queries(case, rng)
    if len(q) > 2:
        q[dice.integers(len(q)), dice.integers(case.num_q_heads), 0] = np.nan
    for s, (query_len, context_len) in enumerate(case.sequences):
        late = range(max(0, context_len - query_len), context_len)  # seen by some of the rows
        for array, numbers in ((keys[s], [np.nan, np.inf]), (values[s], [np.nan, np.inf, -np.inf])):
            for number in numbers:
                if late and dice.random() < 0.5:
                    at = int(dice.choice(late)), dice.integers(case.num_kv_heads), dice.integers(8)
                    array[at] = number
        if context_len > 8 and dice.random() < 0.5:
            values[s][dice.integers(context_len), 0, -1] = np.nan
    for s in range(len(case.sequences)):
        share_prefixes(case, s, keys)
        share_prefixes(case, s, values)
    return assemble(case, q, keys, values)


def _layout(case: Case, backend: Backend) -> Outcome:
    """No bit depends on which physical pages hold the tokens."""
    one, other = (case.replace(layout=case.layout + i) for i in range(2))
    return _same_bits(backend.attend(one.build()), backend.attend(other.build()), "page ids")


def _again(case: Case, backend: Backend) -> Outcome:
    """The same call gives the same bits."""
    problem = case.build()
    return _same_bits(backend.attend(problem), backend.attend(problem), "the run")


def _exact(case: Case, backend: Backend) -> Outcome:
    """One key: the output is its value, bit for bit."""
    problem = case.build()
    out, _ = backend.attend(problem)
    expected = np.zeros_like(out)
    for s, begin in enumerate(problem.query_bounds[:-1]):
        if problem.query_bounds[s + 1] > begin and len(problem.values[s]):
            expected[begin] = np.repeat(problem.values[s][0], case.gqa_factor, axis=0)
    return _same_bits((out, None), (expected, None), "more than the one key")


def _neighbours(case: Case, backend: Backend) -> Outcome:
    """With fixed partitions no bit depends on the rest of the batch."""
    problem = case.build()
    out, lse = backend.attend_fixed(problem)
    for s in range(len(case.sequences)):
        rows = slice(*problem.query_bounds[s : s + 2])
        alone = backend.attend_fixed(_alone(problem, s))
        outcome = _same_bits((out[rows], lse[rows]), alone, f"the neighbours of sequence {s}")
        if not outcome.right:
            return outcome
    verdict = problem.judge(out, lse)
    return Outcome(verdict.right, verdict.ratio, verdict.reason)


def _alone(problem: Problem, s: int) -> Problem:
    """The call with one sequence of the batch and the same pages."""
    from dataclasses import replace

    rows = slice(*problem.query_bounds[s : s + 2])
    row = slice(s, s + 1)
    return replace(
        problem,
        q=problem.q[rows],
        block_tables=problem.block_tables[row],
        context_lens=problem.context_lens[row],
        cu_seqlens_q=np.array([0, rows.stop - rows.start], np.int32),
        page_starts=None if problem.page_starts is None else problem.page_starts[row],
        page_lens=None if problem.page_lens is None else problem.page_lens[row],
        mask=None if problem.mask is None else problem.mask[..., rows, :],
        keys=problem.keys[row],
        values=problem.values[row],
    )


def _merge(case: Case, backend: Backend) -> Outcome:
    """Parts of a context, empty ones among them, merge to the whole."""
    merge = moves.Merge(case)
    verdict = merge.judge(*backend.merge(merge.outs, merge.lses, case.dtype))
    return Outcome(verdict.right, verdict.ratio, verdict.reason)


def _write(case: Case, backend: Backend) -> Outcome:
    """New tokens land in their slots, bit for bit; nothing else changes; -1 skips."""
    arguments, expected = moves.write(case)
    return _same_stored(backend.write(*arguments, case.dtype), expected, "write_pages")


def _copy(case: Case, backend: Backend) -> Outcome:
    """Every named page is copied in every array, bit for bit; nothing else changes."""
    arguments, expected = moves.copy(case)
    return _same_stored(backend.copy(*arguments, case.dtype), expected, "copy_pages")


def _gather(case: Case, backend: Backend) -> Outcome:
    """Each context, contiguous, and zeros after it."""
    problem, expected = moves.gather(case)
    return _same_stored(backend.gather(problem), expected, "gather_pages")


def _same_stored(found, expected, what: str) -> Outcome:
    fault = moves.difference(found, expected)
    return Outcome(True) if fault is None else Outcome(False, np.inf, f"{what}: {fault}")


def _graph(case: Case, backend: Backend) -> Outcome:
    """Random programs over a pool give what each moment's tokens give."""
    return graph.run(case, backend.stream)


def _large(case: Case, backend: Backend) -> Outcome:
    """Pages behind the 2^31st element of the pool."""
    return _judged(large.build(case), backend)


ASKS: dict[str, Callable[[Case, Backend], Outcome]] = {
    "oracle": _oracle,
    "poison": _poison,
    "not finite": _not_finite,
    "layout": _layout,
    "again": _again,
    "exact": _exact,
    "neighbours": _neighbours,
    "merge": _merge,
    "write": _write,
    "copy": _copy,
    "gather": _gather,
    "graph": _graph,
    "large": _large,
}

#: Optional functions of a backend that an ask needs.
NEEDS: dict[str, tuple[str, ...]] = {
    "neighbours": ("attend_fixed",),
    "merge": ("merge",),
    "write": ("write",),
    "copy": ("copy",),
    "gather": ("gather",),
    "graph": ("stream",),
}
