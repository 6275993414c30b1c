"""Fit what work items cost the CPU backend: `python -m benchmarks.fit_cost_model`.

The planner's model of an item of R rows per KV head against n keys, in keys of one KV head
read from memory, is

    n * max(1, key_cost + R * row_cost) + item_cost + R * partial_cost

where the last is for an item whose result is a partial. Each body has costs of its own.

Items of known size are timed, one thread, by its CPU time, interleaved: one item a plan gives
the unit, key_cost and row_cost; the same rows cut into more and more partitions give the rest.
The record, `results/cost_model_<isa>.json`, is the home of the constants in
`csrc/plan/targets.cpp`.
"""

import sys

import mlx.core as mx
import numpy as np
from paged_mlx import fast
from paged_mlx._native import _ext
from paged_mlx.machine.bench.workload import Geometry, Workload

from benchmarks.harness import Candidate, Case, environment, measure, save

DTYPES = ("float32", "bfloat16", "float16")
KEYS = 4096
VECTOR_ROWS, TILE_ROWS, WIDE_ROWS = (1, 2), (4, 8, 12), (32, 48, 96, 192, 384)
BETWEEN_ROWS = (16, 24)  # of which body, csrc/plan/targets.cpp says
CUT_ROWS = {"tile": (4, 8, 12), "wide": (32, 48, 96)}
PARTITIONS = (4, 2, 1)  # pages of a piece
CUT_KEYS = 512  # few enough for a cache: what is fitted with them is not the reading


def workload(dtype, rows, keys) -> Workload:
    """One sequence whose items have ``rows`` rows per KV head."""
    gqa_factor = min(rows, 4)
    geometry = Geometry(num_q_heads=8 * gqa_factor, dtype=dtype)
    return Workload([keys], geometry, [rows // gqa_factor], layers=max(1, keys // 1024))


def attend(work, name, **options) -> Candidate:
    """One layer a call; no causality, so that every row sees every key."""
    plan = fast.plan(
        work.tables,
        work.lengths,
        num_q_heads=work.g.num_q_heads,
        num_kv_heads=work.g.num_kv_heads,
        page_size=work.g.page_size,
        cu_seqlens_q=work.cu,
        dtype=work.dtype,
        causal=False,
        workers=1,
        **options,
    )
    return Candidate(name, work.in_turn(lambda layer: work.paged(layer, plan)))


def nothing() -> Candidate:
    """What graph, Python and evaluation take, whatever the item."""
    work = workload("float32", 1, 16)
    return attend(work, "one page")


def rows_case(dtype, rounds) -> Case:
    candidates = [nothing()]
    for rows in VECTOR_ROWS + TILE_ROWS + BETWEEN_ROWS + WIDE_ROWS:
        candidates.append(attend(workload(dtype, rows, KEYS), str(rows)))
    return Case(f"rows, {dtype}", candidates, any_output, rounds, 2, "cpu", {"keys": KEYS})


def cuts_case(dtype, rows, rounds) -> Case:
    work = workload(dtype, rows, CUT_KEYS)
    candidates = [attend(work, "1")]
    for pages in PARTITIONS:
        size = pages * work.g.page_size
        candidates.append(attend(work, str(CUT_KEYS // size), fixed_partition=size))
    name = f"partitions of {rows} rows, {dtype}"
    return Case(name, candidates, same, rounds, 2, "cpu", {"rows": rows, "keys": CUT_KEYS})


def any_output(outputs: dict) -> None:
    for name, out in outputs.items():
        assert mx.isfinite(out).all().item(), f"{name} rows: not finite"


def same(outputs: dict) -> None:
    whole, *others = (out.astype(mx.float32) for out in outputs.values())
    for out in others:
        assert mx.abs(out - whole).max().item() < 0.05, "partitions change the result"


def medians(result: dict) -> dict[str, float]:
    return {c["name"]: c["median"] for c in result["candidates"]}


def fit(rows_result: dict, cut_results: dict[str, list[dict]]) -> dict:
    """The model's constants for one dtype; times of one key of one KV head are its unit."""
    times = medians(rows_result)
    overhead = times.pop("one page")
    per_key = {int(r): (t - overhead) / (KEYS * 8) for r, t in times.items()}
    key = float(np.mean([per_key[r] for r in VECTOR_ROWS]))
    costs = {"key_nanoseconds": key * 1e9, "key_cost": {"vector": 1.0}, "row_cost": {"vector": 0.0}}
    for kind, rows in (("tile", TILE_ROWS), ("wide", WIDE_ROWS)):
        line = _line({r: per_key[r] / key for r in rows})
        costs["key_cost"][kind], costs["row_cost"][kind] = line
    costs["item_cost"], costs["partial_cost"] = {}, {}
    for kind, results in cut_results.items():
        costs["item_cost"][kind], costs["partial_cost"][kind] = _cut_costs(results, key)
    costs["keys_by_rows"] = {r: t / key for r, t in per_key.items()}
    return costs


def _line(keys_by_rows: dict[int, float]) -> tuple[float, float]:
    """key_cost and row_cost, whose line is nearest to what was measured, by ratio."""
    rows = np.array(list(keys_by_rows), float)
    measured = np.array(list(keys_by_rows.values()))
    equations = np.stack([np.ones(len(rows)), rows], axis=1) / measured[:, None]
    return _not_negative(equations, np.ones(len(rows)))


def _cut_costs(results: list[dict], key: float) -> tuple[float, float]:
    """Least squares over more pieces than one, for each partial of pieces * rows."""
    equations, extra = [], []
    for result in results:
        times, rows = medians(result), result["about"]["rows"]
        whole = times.pop("1")
        for pieces, time in times.items():
            partials = int(pieces) * rows
            equations.append([(int(pieces) - 1) / partials, 1])
            extra.append((time - whole) / (key * 8) / partials)
    return _not_negative(np.array(equations, float), np.array(extra))


def _not_negative(equations: np.ndarray, wanted: np.ndarray) -> tuple[float, float]:
    """Least squares with two unknowns, neither below 0."""
    both, *_ = np.linalg.lstsq(equations, wanted, rcond=None)
    if both[0] < 0 or both[1] < 0:
        kept = int(both[0] < 0)
        alone, *_ = np.linalg.lstsq(equations[:, kept : kept + 1], wanted, rcond=None)
        both = np.zeros(2)
        both[kept] = max(0.0, alone[0])
    return float(both[0]), float(both[1])


def dearer(a: dict, b: dict) -> dict:
    """Of each cost the larger, so that what is shared pays for either type."""
    return {
        name: dearer(cost, b[name]) if isinstance(cost, dict) else max(cost, b[name])
        for name, cost in a.items()
    }


def show(dtype: str, costs: dict) -> None:
    print(dtype)
    for name, value in costs.items():
        words = value if isinstance(value, dict) else {"": value}
        print(f"  {name:<18}" + "  ".join(f"{k} {v:.3g}".strip() for k, v in words.items()))


def main(rounds: int = 24) -> None:
    threads = _ext.num_threads()
    _ext.set_num_threads(1)
    record = {"question": f"cost_model_{_ext.isa()}", **environment(), "fitted": {}, "cases": []}
    for dtype in DTYPES:
        rows_result = measure(rows_case(dtype, rounds))
        cut_results = {
            kind: [measure(cuts_case(dtype, rows, 2 * rounds)) for rows in several]
            for kind, several in CUT_ROWS.items()
        }
        record["cases"] += [rows_result, *sum(cut_results.values(), [])]
        record["fitted"][dtype] = fit(rows_result, cut_results)
        show(dtype, record["fitted"][dtype])
    record["targets"] = {
        "4": record["fitted"]["float32"],
        "2": dearer(record["fitted"]["bfloat16"], record["fitted"]["float16"]),
    }
    for itemsize, costs in record["targets"].items():
        show(f"cpu_target, {itemsize} bytes", costs)
    _ext.set_num_threads(threads)
    save(record)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
