"""Operations that move or merge, on a case: their arguments and what must come out.

Arrays are stored (see ``dtypes``): moved values are compared bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from . import dtypes, yardstick
from .case import Case
from .problem import Problem
from .yardstick import Verdict


def write(case: Case) -> tuple[tuple, list[np.ndarray]]:
    """``(k, v, k_pages, v_pages, slots)`` of new tokens, some skipped, and the pages after it."""
    problem, rng = case.build(), np.random.default_rng([case.seed, 6])
    num_slots = problem.k_pages.shape[0] * case.page_size
    slots = rng.permutation(num_slots)[: max(1, num_slots // 3)].astype(np.int32)
    slots[rng.random(len(slots)) < 0.2] = -1
    dims = (case.head_dim, case.value_dim)
    new = [rng.standard_normal((len(slots), case.num_kv_heads, d), np.float32) for d in dims]
    new = [dtypes.encode(a, case.dtype) for a in new]
    pages = [problem.k_pages.copy(), problem.v_pages.copy()]
    expected = [p.copy() for p in pages]
    for target, tokens in zip(expected, new, strict=True):
        kept = slots >= 0
        target[slots[kept] // case.page_size, :, slots[kept] % case.page_size] = tokens[kept]
    return (*new, *pages, slots), expected


def copy(case: Case) -> tuple[tuple, list[np.ndarray]]:
    """``(pools, pairs)`` of whole pages, and the pools after it."""
    problem, rng = case.build(), np.random.default_rng([case.seed, 7])
    order = rng.permutation(len(problem.k_pages))
    count = max(1, len(order) // 3)
    sources = order[rng.integers(0, count, count)]  # a page may be the source of several
    pairs = np.stack([sources, order[-count:]], axis=1).astype(np.int32)
    pools = [problem.k_pages, problem.v_pages, problem.k_pages[..., ::-1].copy()]
    expected = [p.copy() for p in pools]
    for pool, target in zip(pools, expected, strict=True):
        target[pairs[:, 1]] = pool[pairs[:, 0]]
    return (pools, pairs), expected


def gather(case: Case) -> tuple[Problem, list[np.ndarray]]:
    """A problem, and the K and V of its contexts, contiguous, with zeros after each."""
    problem = case.build()
    longest = max(len(k) for k in problem.keys)
    expected = []
    for contexts in (problem.keys, problem.values):
        shape = (len(contexts), case.num_kv_heads, longest, contexts[0].shape[2])
        whole = np.zeros(shape, np.float32)
        for s, context in enumerate(contexts):
            whole[s, :, : len(context)] = np.moveaxis(context, 0, 1)
        expected.append(dtypes.encode(whole, case.dtype))
    return problem, expected


class Merge:
    """Parts of contexts, empty ones among them, that merge to the whole.

    Attributes:
        outs, lses: Of each part: stored, and float32.
    """

    def __init__(self, case: Case):
        problem = case.build()
        num_keys = [len(k) for k in problem.keys]
        cuts = np.array([[0, n // 3, n // 3, n // 2, n] for n in num_keys])  # the second is empty
        parts = (_part(problem, cuts[:, i], cuts[:, i + 1]) for i in range(4))
        outs, lses = zip(*parts, strict=True)
        self.dtype = case.dtype
        self.outs = [dtypes.encode(out, case.dtype) for out in outs]
        self.lses = [part.astype(np.float32) for part in lses]

    def judge(self, out: np.ndarray, lse: np.ndarray) -> Verdict:
        """The worse verdict on out (decoded) and lse."""
        exact = _merged([dtypes.decode(o, self.dtype) for o in self.outs], self.lses)
        rounded = dtypes.round_to(exact[0], self.dtype)
        verdicts = (
            yardstick.judge(out, exact[0], rounded, self.dtype),
            yardstick.judge_lse(lse, exact[1], exact[1].astype(np.float32)),
        )
        return max(verdicts, key=lambda v: v.ratio)


def _part(problem: Problem, begins, ends):
    """Yardstick state of decode rows over the keys ``[begin, end)`` of each sequence."""
    states = [
        yardstick.attention(problem.queries[s : s + 1], k[b:e], v[b:e], problem.dtype)
        for s, (k, v, b, e) in enumerate(
            zip(problem.keys, problem.values, begins, ends, strict=True)
        )
    ]
    return tuple(np.concatenate(parts) for parts in zip(*states, strict=True))


def _merged(outs, lses):
    """The merge from its definition, float64."""
    lses = np.stack([np.asarray(lse, np.float32).astype(np.float64) for lse in lses])
    largest = lses.max(axis=0)
    largest = np.where(np.isneginf(largest), 0, largest)
    weights = np.exp(lses - largest)
    total = weights.sum(axis=0)
    mixed = (np.stack(outs).astype(np.float64) * weights[..., None]).sum(axis=0)
    with np.errstate(divide="ignore"):
        lse = largest + np.log(total)
    return mixed / np.where(total > 0, total, 1)[..., None], lse


def difference(found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> str | None:
    """The first difference of stored arrays in words; None if every bit is equal."""
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        if a.shape != b.shape:
            return f"array {i} has shape {a.shape}, not {b.shape}"
        unsigned = np.uint32 if b.dtype.itemsize == 4 else np.uint16
        different = a.view(unsigned) != np.ascontiguousarray(b).view(unsigned)
        if different.any():
            at = tuple(int(x) for x in np.argwhere(different)[0])
            return f"{different.sum()} values wrong, first at {at}"
    return None
