"""Pairwise designs: few rows in which every two values of two axes meet."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence

Axes = Mapping[str, Sequence]


def pairwise(axes: Axes, seed: int = 0, tries: int = 4) -> list[dict]:
    """Rows, one value per axis, such that every pair of values of two axes is in some row.

    Greedy: each row begins with a pair that is still missing and takes, axis by axis, the
    value that covers most of what is missing; the best of ``tries`` rows is kept.
    """
    rng = random.Random(seed)
    names = list(axes)
    missing = _all_pairs(axes, names)
    rows = []
    while missing:
        first = min(missing)
        best = max(
            (_row(axes, names, first, missing, rng) for _ in range(tries)),
            key=lambda row: len(_pairs_of(row) & missing),
        )
        missing -= _pairs_of(best)
        rows.append({names[axis]: axes[names[axis]][value] for axis, value in best})
    return rows


def product(axes: Axes) -> list[dict]:
    """Every combination."""
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def _all_pairs(axes: Axes, names: list[str]) -> set:
    """``((axis, value), (axis, value))`` by index, the smaller axis first."""
    cells = [[(i, j) for j in range(len(axes[name]))] for i, name in enumerate(names)]
    pairs = itertools.combinations(cells, 2)
    return set(itertools.chain.from_iterable(itertools.product(a, b) for a, b in pairs))


def _row(axes: Axes, names: list[str], first: tuple, missing: set, rng: random.Random):
    row = dict(first)
    rest = [i for i in range(len(names)) if i not in row]
    rng.shuffle(rest)
    for axis in rest:
        chosen = tuple(row.items())
        values = list(range(len(axes[names[axis]])))
        rng.shuffle(values)
        row[axis] = max(values, key=lambda v: sum(_pair((axis, v), c) in missing for c in chosen))
    return sorted(row.items())


def _pair(one: tuple, other: tuple) -> tuple:
    return (one, other) if one < other else (other, one)


def _pairs_of(row) -> set:
    return set(itertools.combinations(row, 2))
