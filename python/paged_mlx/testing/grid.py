"""The cases of the suite: ``quick()`` in well under a minute, ``long()`` for as long as it takes.

Groups are named after what they prove. In the quick run the axes of the grid are combined
pairwise; in the long run the geometry is a full product and the options go round with it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import cache
from typing import Any

from paged_mlx.reference import dtypes
from paged_mlx.reference.call import FORMATS, MASKS
from paged_mlx.reference.case import Case

from .checks import Check
from .pairwise import pairwise, product

#: Groups of checks, in the order of the report.
GROUPS = (
    "needles", "poison", "numbers", "grid", "formats", "invariance", "pages", "graph", "large"
)  # fmt: skip

HEADS = ((1, 1), (4, 4), (8, 2), (16, 8), (24, 4), (28, 4), (40, 8), (64, 8), (8, 1), (71, 1))
HEAD_DIMS = (*range(8, 257, 8), 512)
PAGE_SIZES = (1, 3, 8, 16, 24, 32, 64, 128, 256)

#: A context length: a number, or one near a boundary, ``("page", 1)`` for one past a page.
CONTEXTS = (
    *itertools.product(("page", "2 pages", "partition"), (-1, 0, 1)),
    *((length, 0) for length in (1, 31, 33, 130, 257, 523)),
)

#: Products of one case of the grid.
_MOST_WORK = 1 << 28

_GEOMETRY: dict[str, tuple] = {
    "dtype": dtypes.NAMES,
    "heads": HEADS,
    "head_dim": (8, 32, 64, 72, 80, 96, 112, 120, 128, 192, 256, 512),
    "v_head_dim": (None, 8, 40, 128),
    "page_size": PAGE_SIZES,
}
_BATCH: dict[str, tuple] = {
    "context": CONTEXTS,
    "query": (1, 2, 3, 5, 8, 16, 17, 40, 130),
    "batch": ("one", "decode", "mixed", "empty"),
    "prefix": (None, "all", "nested"),
    "ragged": (False, True),
}
_OPTIONS: dict[str, tuple] = {
    "causal": (True, False),
    "window": (None, 1, 12, "page", "page+1", "context"),
    "softcap": (None, 30.0, 4.0),
    "alibi": (0.0, 1.0),
    "sinks": (None, "random"),
    "mask": MASKS,
    "spread": (1.5, 6.0),
}


@cache
def quick() -> tuple[Check, ...]:
    """The run that belongs to every build."""
    return tuple(
        itertools.chain(
            _needles(),
            _poison(),
            _numbers(),
            _grid(),
            _formats(),
            _invariance(),
            _pages(),
            _graph(24),
        )
    )


@cache
def long() -> tuple[Check, ...]:
    """Everything: the quick run, the full product of geometry, long prompts, long contexts."""
    return tuple(
        itertools.chain(quick(), _long_needles(), _long_grid(), _long_prompts(), _graph(2000))
    )


def large() -> tuple[Check, ...]:
    """Pools beyond 2^31 elements; about 5 GiB of memory while one runs."""
    case = Case(
        dtype="float16",
        num_q_heads=16,
        num_kv_heads=8,
        head_dim=128,
        v_head_dim=8,
        page_size=256,
        sequences=((1, 1500), (3, 700)),
        poison="zero",
    )
    return (Check("large", case, "large"), Check("large", case.replace(dtype="bfloat16"), "large"))


def make_case(row: dict, seed: int = 0) -> Case:
    """The case that a row of the design describes."""
    context = _context_len(row["context"], row["page_size"])
    query = min(row["query"], context, _most_queries(row, context))
    sequences = _sequences(row["batch"], query, context, row["page_size"])
    return Case(
        dtype=row["dtype"],
        num_q_heads=row["heads"][0],
        num_kv_heads=row["heads"][1],
        head_dim=row["head_dim"],
        v_head_dim=row["v_head_dim"],
        page_size=row["page_size"],
        sequences=sequences,
        prefixes=_prefixes(row["prefix"], len(sequences), context),
        ragged=row["ragged"],
        causal=row["causal"],
        sliding_window=_window(row["window"], row["page_size"], context),
        softcap=row["softcap"],
        alibi=row["alibi"],
        sinks=row["sinks"],
        mask=row["mask"],
        spread=row["spread"],
        k_format=row.get("k_format"),
        v_format=row.get("v_format"),
        seed=seed,
    )


def _most_queries(row: dict, context: int) -> int:
    """A query length at which the oracle is done in a blink."""
    return max(2, _MOST_WORK // (context * row["heads"][0] * row["head_dim"]))


def _context_len(context: tuple, page_size: int) -> int:
    base, shift = context
    tokens = {"page": page_size, "2 pages": 2 * page_size, "partition": 256}.get(base, base)
    return max(1, tokens + shift)


def _sequences(batch: str, query: int, context: int, page_size: int):
    return {
        "one": ((query, context),),
        "decode": ((1, context), (1, max(1, context - 1)), (1, context + page_size), (1, 1)),
        "mixed": ((query, context), (1, context + 1), (min(2, context), context)),
        "empty": ((1, 0), (query, context), (0, context), (2, 0)),
    }[batch]


def _prefixes(prefix: str | None, batch: int, context: int):
    if prefix is None or batch < 2:
        return ()
    shared = (0, batch, max(1, context // 2))
    return (shared,) if prefix == "all" else (shared, (batch // 2, batch, max(1, context - 1)))


def _window(window, page_size: int, context: int) -> int | None:
    return {"page": page_size, "page+1": page_size + 1, "context": context}.get(window, window)


def _grid() -> Iterator[Check]:
    for i, row in enumerate(pairwise({**_GEOMETRY, **_BATCH, **_OPTIONS})):
        yield Check("grid", make_case(row, seed=i))
    for i, head_dim in enumerate(HEAD_DIMS):
        dims = {"head_dim": head_dim, "v_head_dim": HEAD_DIMS[-i] if i % 3 == 0 else None}
        sequences = ((1, 70), (5, 40))
        yield Check("grid", Case(dtype=dtypes.NAMES[i % 3], sequences=sequences, **dims))
    for dtype in dtypes.NAMES:
        prompt = Case(dtype=dtype, sequences=((2048, 2048),), num_q_heads=1, head_dim=32)
        yield Check("grid", prompt)
        yield Check("grid", Case(dtype=dtype, sequences=((1, 4001), (1, 7), (300, 900))))


def _formats() -> Iterator[Check]:
    """Quantised pages, all options: against attention over what the pages read as."""
    axes = {**_GEOMETRY, **_BATCH, **_OPTIONS, "spread": (1.5,)}
    axes |= {
        "heads": ((1, 1), (8, 2), (28, 4), (6, 6)),
        "head_dim": (32, 64, 128, 192, 256),
        "v_head_dim": (None, 32, 128),
        "page_size": (8, 16, 24, 64),
        "context": (*itertools.product(("page", "2 pages"), (0, 1)), (33, 0), (130, 0), (257, 0)),
        "query": (1, 2, 5, 17, 40),
        "k_format": FORMATS,
        "v_format": FORMATS,
    }
    for i, row in enumerate(pairwise(axes)):
        case = make_case(row, seed=i)
        if case.formats != (None, None):
            yield Check("formats", case)
    for i, pair in enumerate(itertools.product(FORMATS, FORMATS)):
        if pair != (None, None):
            sides: dict[str, Any] = dict(zip(("k_format", "v_format"), pair))
            case = Case(dtype=dtypes.NAMES[i % 3], num_q_heads=4, num_kv_heads=2, **sides)
            case = case.replace(sequences=((1, 300), (40, 77), (1, 1), (2, 0)), seed=i)
            yield Check("formats", case.replace(ragged=True, poison="nan"), "poison")
            yield Check("formats", case.replace(prefixes=((0, 2, 64),)), "layout")
            yield Check("formats", case, "neighbours")


def _needles() -> Iterator[Check]:
    axes = {
        "dtype": dtypes.NAMES,
        "heads": ((1, 1), (8, 2), (4, 4), (28, 4)),
        "head_dim": (32, 64, 80, 128, 256),
        "page_size": (1, 8, 16, 24, 64),
        "sequences": (
            ((1, 300),),
            ((1, 65), (1, 300), (1, 513)),
            ((3, 200), (17, 129), (1, 1), (2, 0)),
            ((130, 300),),
            ((9, 300), (1, 260)),
        ),
        "prefix": (None, "all", "nested"),
        "ragged": (False, True),
        "window": (None, 33, 64),
        "alibi": (0.0, 1 / 16),
    }
    for i, row in enumerate(pairwise(axes)):
        yield Check("needles", _needle_case(row, i))
    long = Case(values="needles", num_q_heads=32, page_size=32)
    for dtype in dtypes.NAMES:
        yield Check("needles", long.replace(dtype=dtype, sequences=((1, 8192), (3, 700))))
    yield Check("needles", long.replace(dtype="bfloat16", sequences=((1, 32768),)))
    yield Check("needles", long.replace(dtype="float16", sequences=((2, 32768),), page_size=16))


def _needle_case(row: dict, seed: int) -> Case:
    batch = len(row["sequences"])
    return Case(
        values="needles",
        dtype=row["dtype"],
        num_q_heads=row["heads"][0],
        num_kv_heads=row["heads"][1],
        head_dim=row["head_dim"],
        page_size=row["page_size"],
        sequences=row["sequences"],
        prefixes=_prefixes(row["prefix"], batch, min(c for _, c in row["sequences"] if c)),
        ragged=row["ragged"],
        sliding_window=row["window"],
        alibi=row["alibi"],
        seed=seed,
    )


def _long_needles() -> Iterator[Check]:
    for dtype, heads, page_size in itertools.product(
        dtypes.NAMES, ((1, 1), (8, 2), (32, 8)), (8, 16, 32, 128)
    ):
        shape: dict[str, Any] = {
            "num_q_heads": heads[0],
            "num_kv_heads": heads[1],
            "page_size": page_size,
        }
        case = Case(values="needles", dtype=dtype, head_dim=128, **shape)
        yield Check("needles", case.replace(sequences=((1, 32768),)))
        yield Check("needles", case.replace(sequences=((7, 32767), (1, 16385)), seed=1))
        yield Check("needles", case.replace(sequences=((1, 32768),), sliding_window=4096))


def _poison() -> Iterator[Check]:
    axes = {
        "dtype": dtypes.NAMES,
        "poison": ("nan", "inf", "huge", "denormal", "mixed"),
        "page_size": (1, 8, 16, 24, 64),
        "heads": ((1, 1), (8, 2), (28, 4)),
        "sequences": (
            ((1, 37), (1, 300), (1, 1)),
            ((40, 77), (1, 129)),
            ((3, 20), (2, 0), (0, 9)),
        ),
        "window": (None, 12, 64),
        "ragged": (False, True),
        "prefix": (None, "all"),
        "mask": (None, "boolean", "additive"),
    }
    for i, row in enumerate(pairwise(axes)):
        case = _needle_case({**row, "head_dim": 64, "alibi": 0.0}, i)
        case = case.replace(values="normal", poison=row["poison"], mask=row["mask"])
        yield Check("poison", case, "poison")


def _numbers() -> Iterator[Check]:
    decode, prefill = ((1, 400), (1, 33)), ((20, 90),)
    for dtype, sequences in itertools.product(dtypes.NAMES, (decode, prefill)):
        case = Case(dtype=dtype, sequences=sequences)
        for shift in (-60.0, -30.0, -20.0, 20.0, 60.0):
            yield Check("numbers", case.replace(shift=shift))
            yield Check("numbers", case.replace(shift=shift, sliding_window=24))
        yield Check("numbers", case.replace(spread=300.0))
        yield Check("numbers", case.replace(spread=400.0, softcap=2.0))
        yield Check("numbers", case.replace(spread=30.0, softcap=30.0))
        for sink in (float("-inf"), -100.0, 0.0, 60.0, 1e4):
            yield Check("numbers", case.replace(sinks=sink))
        yield Check("numbers", case.replace(sinks=5.0, mask="boolean", mask_density=0.97))
        yield Check("numbers", case.replace(mask="additive", mask_density=1.0))
        yield Check("numbers", case.replace(mask="boolean_per_head", mask_density=1.0, sinks=1.0))
        yield Check("numbers", case.replace(values="ones"))
        yield Check("numbers", case.replace(sequences=((1, 0), (3, 0), (0, 0))))
    yield from _one_key()
    yield from _merges()


def _one_key() -> Iterator[Check]:
    for dtype, spread in (("float32", 5e5), ("bfloat16", 5e5), ("float16", 5e3)):
        case = Case(dtype=dtype, spread=spread, num_q_heads=8, num_kv_heads=2)
        yield Check("numbers", case.replace(sequences=((1, 1),) * 5), "exact")
        yield Check(
            "numbers", case.replace(spread=1.0, head_dim=80, sequences=((1, 1), (1, 0))), "exact"
        )


def _merges() -> Iterator[Check]:
    for dtype, shift in itertools.product(dtypes.NAMES, (0.0, -60.0)):
        case = Case(dtype=dtype, shift=shift, sequences=((1, 300), (1, 1), (1, 0), (1, 40)))
        yield Check("numbers", case, "merge")
        yield Check("numbers", case.replace(num_q_heads=6, num_kv_heads=2, v_head_dim=24), "merge")


def _invariance() -> Iterator[Check]:
    for dtype, heads in itertools.product(dtypes.NAMES, ((1, 1), (8, 2), (28, 4))):
        shape: dict[str, Any] = {"dtype": dtype, "num_q_heads": heads[0], "num_kv_heads": heads[1]}
        case = Case(**shape, sequences=((1, 300), (1, 77), (40, 90), (2, 130)))
        shared = case.replace(prefixes=((0, 4, 64),), sliding_window=100)
        for ask in ("layout", "again", "neighbours"):
            yield Check("invariance", case, ask)
            yield Check("invariance", shared, ask)
        ragged = case.replace(ragged=True, mask="boolean", alibi=1.0)
        yield Check("invariance", ragged, "neighbours")


def _pages() -> Iterator[Check]:
    axes: dict[str, tuple] = {
        "dtype": dtypes.NAMES,
        "num_kv_heads": (1, 4),
        "head_dim": (8, 64, 80, 512),
        "v_head_dim": (None, 24),
        "page_size": (1, 8, 24, 256),
        "ask": ("write", "copy", "gather"),
        "ragged": (False, True),
    }
    for i, row in enumerate(pairwise(axes)):
        ask = row.pop("ask")
        case = Case(**row, num_q_heads=4, sequences=((1, 70), (1, 0), (1, 9)), seed=i)
        yield Check("pages", case, ask)


def _graph(programs: int) -> Iterator[Check]:
    for i in range(programs):
        shape: dict[str, Any] = {
            "num_q_heads": 4,
            "num_kv_heads": 2,
            "head_dim": 16,
            "v_head_dim": 8,
        }
        case = Case(**shape, dtype=dtypes.NAMES[i % 3], page_size=(4, 8, 3)[i // 3 % 3], seed=i)
        yield Check("graph", case, "graph")


def _long_grid() -> Iterator[Check]:
    options = itertools.cycle(pairwise({**_BATCH, **_OPTIONS}, seed=1))
    geometry = {**_GEOMETRY, "head_dim": HEAD_DIMS, "v_head_dim": (None, 64)}
    for i, row in enumerate(product(geometry)):
        yield Check("grid", make_case({**row, **next(options)}, seed=i))
    fixed: dict[str, Any] = {
        "dtype": "bfloat16",
        "heads": (8, 2),
        "head_dim": 64,
        "v_head_dim": None,
    }
    axes = {name: _BATCH[name] for name in ("context", "query", "ragged")}
    axes |= {"page_size": PAGE_SIZES, "window": _OPTIONS["window"]}
    for i, row in enumerate(product(axes)):
        yield Check("grid", make_case({**fixed, **next(options), **row}, seed=i))


def _long_prompts() -> Iterator[Check]:
    for dtype, query in itertools.product(dtypes.NAMES, (255, 512, 1024, 2047, 2048)):
        case = Case(dtype=dtype, num_q_heads=8, num_kv_heads=2, sequences=((query, query + 700),))
        yield Check("grid", case)
        yield Check("grid", case.replace(sequences=((query, query), (1, 3000), (17, 900))))
        yield Check("grid", case.replace(sliding_window=128, softcap=30.0))
