"""The suite for backends that are slow, such as kernels run by an interpreter.

Every group and every option of the quick run, at shapes of a few thousand products: tens of
keys, a handful of rows. What it cannot see is what needs length: many pages, long merges.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import cache

from paged_mlx.reference import dtypes
from paged_mlx.reference.call import MASKS
from paged_mlx.reference.case import Case

from .checks import Check
from .pairwise import pairwise

_SHAPE = {
    "dtype": dtypes.NAMES,
    "heads": ((1, 1), (4, 2), (7, 1), (6, 2)),
    "head_dim": (16, 64, 80),
    "page_size": (1, 8, 16, 24),
    "prefixes": ((), ((0, 3, 16),)),
    "ragged": (False, True),
    "sliding_window": (None, 9, 16),
}
_SEQUENCES = (
    ((1, 33), (1, 16), (1, 24)),
    ((3, 20), (1, 17), (2, 0)),
    ((9, 40), (1, 1), (0, 16)),
)
_OPTIONS = {
    "v_head_dim": (None, 24),
    "causal": (True, False),
    "softcap": (None, 4.0),
    "alibi": (0.0, 1.0),
    "sinks": (None, "random"),
    "mask": MASKS,
}


@cache
def checks() -> tuple[Check, ...]:
    """About 150 checks, the cheapest of each kind."""
    return tuple(
        itertools.chain(
            _needles(), _poison(), _numbers(), _grid(), _formats(), _invariance(), _pages()
        )
    )


def _cases(axes: dict, **fixed) -> Iterator[Case]:
    for i, row in enumerate(pairwise(axes)):
        heads = row.pop("heads")
        yield Case(num_q_heads=heads[0], num_kv_heads=heads[1], seed=i, **row, **fixed)


def _grid() -> Iterator[Check]:
    for case in _cases({**_SHAPE, **_OPTIONS, "sequences": _SEQUENCES}):
        yield Check("grid", case)


def _formats() -> Iterator[Check]:
    for i, pair in enumerate((("q8", "q8"), ("q8", "q4"), ("q4", "q4"), (None, "q4"))):
        for heads, ask in ((2, "oracle"), (8, "poison")):
            case = Case(
                dtype=dtypes.NAMES[i % 3], num_q_heads=heads, num_kv_heads=2, seed=i,
                k_format=pair[0], v_format=pair[1], sequences=((1, 50), (3, 40), (2, 0)),
            )  # fmt: skip
            yield Check("formats", case, ask)


def _needles() -> Iterator[Check]:
    sequences = (((1, 70),), ((5, 65), (1, 130)), ((1, 40), (1, 66), (3, 30)))
    for case in _cases({**_SHAPE, "sequences": sequences}, values="needles"):
        yield Check("needles", case.replace(num_q_heads=4 * case.num_kv_heads))
    alibi = Case(values="needles", num_q_heads=4, sequences=((2, 90),), alibi=1 / 16)
    yield Check("needles", alibi)


def _poison() -> Iterator[Check]:
    axes = {**_SHAPE, "sequences": _SEQUENCES, "poison": ("nan", "inf", "huge", "denormal")}
    for case in _cases(axes):
        yield Check("poison", case, "poison")


def _numbers() -> Iterator[Check]:
    for dtype in dtypes.NAMES:
        case = Case(dtype=dtype, sequences=((1, 37), (3, 20)))
        for shift in (-60.0, 60.0):
            yield Check("numbers", case.replace(shift=shift))
            yield Check("numbers", case.replace(shift=shift, sliding_window=9))
        yield Check("numbers", case.replace(spread=300.0))
        yield Check("numbers", case.replace(spread=400.0, softcap=2.0))
        for sink in (float("-inf"), 60.0):
            yield Check("numbers", case.replace(sinks=sink))
        yield Check("numbers", case.replace(mask="boolean", mask_density=0.97, sinks=5.0))
        yield Check("numbers", case.replace(sequences=((1, 0), (2, 0))))
        yield Check("numbers", case.replace(sequences=((1, 1),) * 3), "exact")
        yield Check("numbers", case.replace(sequences=((1, 130), (1, 1), (1, 0))), "merge")
        yield Check("numbers", case.replace(sequences=((1, 200), (2, 90)), sinks=0.0))

    axes = {
        "dtype": dtypes.NAMES,
        "heads": ((1, 1), (4, 2), (6, 2)),
        "page_size": (1, 8, 16, 24),
        "ragged": (False, True),
        "sliding_window": (None, 3),
        "mask": MASKS,
        "sequences": (((2, 37), (3, 20), (1, 9)), ((40, 90), (7, 30))),
    }
    for case in _cases(axes):
        yield Check("numbers", case, "not finite")


def _invariance() -> Iterator[Check]:
    for dtype, ask in itertools.product(dtypes.NAMES, ("layout", "again", "neighbours")):
        case = Case(dtype=dtype, sequences=((1, 70), (1, 20), (5, 40)), prefixes=((0, 2, 16),))
        yield Check("invariance", case, ask)


def _pages() -> Iterator[Check]:
    for dtype, ask in itertools.product(dtypes.NAMES, ("write", "copy", "gather")):
        case = Case(dtype=dtype, num_q_heads=4, num_kv_heads=2, v_head_dim=24, page_size=8)
        yield Check("pages", case.replace(sequences=((1, 20), (1, 0), (1, 9))), ask)
        yield Check("pages", case.replace(ragged=True, page_size=3, head_dim=80), ask)
