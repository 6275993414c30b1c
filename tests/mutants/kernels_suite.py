"""Few cases that together tell every wrong kernel: through the launch code, on the host.

A case runs operations and returns None, or why the result is wrong. Its name begins with
the kernel it is about.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from functools import partial

import mlx.core as mx
import numpy as np
from metal_kernels import attend, format_cases
from metal_on_host import metal_on_host
from paged_mlx import PagePool, fast
from paged_mlx.machine import first_use
from paged_mlx.reference import arrays
from paged_mlx.testing import Case, Check, backends, run

from .mutant import Mutant

#: What a dispatch is launched with in place of what the launch code chose.
Change = Callable[[dict], dict]

_OPTIONS = dict(softcap=3.0, alibi=1.0, sinks="random")
_VECTOR = dict(num_q_heads=2, num_kv_heads=2, page_size=8)
_TILE = dict(num_q_heads=8, num_kv_heads=2, page_size=16)
_WIDE = dict(num_q_heads=4, num_kv_heads=2, page_size=8)
_SHORT = ((1, 70), (1, 141), (1, 1))
_PROMPTS = ((20, 70), (9, 9), (25, 45))

CHECKS = {
    "vector": Check("", Case(**_VECTOR, sequences=_SHORT, values="needles")),
    "vector, whole steps": Check("", Case(num_q_heads=2, page_size=16, sequences=((1, 160),))),
    "vector, two rows": Check("", Case(dtype="float16", num_q_heads=2, page_size=32, sequences=_SHORT)),
    "vector, window": Check("", Case(**_VECTOR, sequences=_SHORT, sliding_window=19, values="needles")),
    "vector, ragged": Check("", Case(num_q_heads=1, page_size=5, sequences=_SHORT, ragged=True, layout=3)),
    "vector, options": Check("", Case(**_VECTOR, sequences=_SHORT, mask="additive_per_head", **_OPTIONS)),
    "vector, head_dim 512": Check("", Case(num_q_heads=1, head_dim=512, sequences=((1, 140),))),
    "vector, empty": Check("", Case(**_VECTOR, sequences=((1, 0), (1, 9)), sinks=1.0)),
    "tile": Check("", Case(**_TILE, sequences=_SHORT, values="needles")),
    "tile, pages of 16": Check("", Case(**_TILE, sequences=((1, 128),), dtype="bfloat16")),
    "tile, one key": Check("", Case(**_TILE, sequences=((1, 1), (1, 33)), poison="nan"), "poison"),
    "tile, window": Check("", Case(**_TILE, sequences=_SHORT, sliding_window=19, values="needles")),
    "tile, ragged": Check("", Case(**_TILE, sequences=((1, 70), (1, 140)), ragged=True)),
    "tile, options": Check("", Case(**_TILE, sequences=_SHORT, mask="boolean_per_head", **_OPTIONS)),
    "tile, all masked": Check(
        "", Case(**_TILE, sequences=((1, 130),), mask="boolean", mask_density=1.0)
    ),
    "tile, head_dim 256": Check(
        "", Case(num_q_heads=8, v_head_dim=256, sequences=((1, 70),), dtype="float16")
    ),
    "tile, 16 rows": Check("", Case(num_q_heads=16, sequences=((1, 70), (1, 20)))),
    "wide": Check("", Case(**_WIDE, sequences=_PROMPTS, values="needles")),
    "wide, far apart": Check("", Case(**_WIDE, sequences=_PROMPTS, spread=120.0)),
    "wide, window": Check("", Case(**_WIDE, sequences=((40, 150),), sliding_window=9, values="needles")),
    "wide, options": Check("", Case(**_WIDE, sequences=_PROMPTS, mask="additive_per_head", **_OPTIONS)),
    "wide, not causal": Check("", Case(**_WIDE, sequences=_PROMPTS, causal=False, dtype="float16")),
    "wide, partitions": Check("", Case(**_WIDE, sequences=((19, 150), (1, 20))), "neighbours"),
    "vector, not finite": Check(
        "", Case(num_q_heads=2, sequences=((1, 90), (1, 40)), mask="additive", seed=2), "not finite"
    ),
    "tile, not finite": Check(
        "", Case(**_TILE, sequences=((3, 70), (3, 40)), mask="boolean_per_head"), "not finite"
    ),
    "tile, mask hides NaN": Check(
        "",
        Case(**_TILE, sequences=((3, 140), (3, 100)), mask="boolean_per_head", seed=2),
        "not finite",
    ),
    "wide, not finite": Check(
        "", Case(**_WIDE, sequences=((30, 70), (20, 40)), sliding_window=9), "not finite"
    ),
    "merge": Check("", Case(**_TILE, sequences=((2, 200), (1, 20), (1, 130))), "neighbours"),
    "merge, sinks": Check("", Case(num_q_heads=3, sequences=((1, 200), (1, 150)), sinks=2.0), "neighbours"),
    "states": Check("", Case(num_q_heads=3, sequences=((1, 130), (1, 9), (1, 0))), "merge"),
    "write": Check("", Case(**_VECTOR, v_head_dim=24, sequences=((1, 30),), dtype="float16"), "write"),
    "copy": Check("", Case(**_VECTOR, v_head_dim=24, sequences=((1, 60),)), "copy"),
    "gather": Check("", Case(**_VECTOR, v_head_dim=24, sequences=((1, 20), (1, 0), (1, 9))), "gather"),
    "gather, ragged": Check("", Case(num_q_heads=1, page_size=5, ragged=True, sequences=((1, 40), (1, 30))), "gather"),
}  # fmt: skip


def check(wanted: Check, change: Change | None, kernels: set[str] | None = None) -> str | None:
    """A check of the conformance suite on the host; ``kernels``: those that must be launched."""
    with metal_on_host(change=change) as launches:
        outcome = run(wanted, backends.cpu())
    if launches.findings:
        return launches.findings[0]
    if kernels and set(launches.kernels) != kernels:
        return f"launched {sorted(launches.kernels)}"
    return None if outcome.right else outcome.reason


def normal(shape, seed: int, dtype=mx.float32) -> mx.array:
    """Random numbers."""
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return mx.array(x).astype(dtype)


def compare(
    work: Callable[[], list[mx.array]], change: Change | None, tolerance: float
) -> str | None:
    """``work`` on the host as on the CPU backend."""
    expected = work()
    mx.eval(expected)
    with metal_on_host(change=change) as launches, first_use.unchecked():
        found = work()
        mx.eval(found)
    if launches.findings:
        return launches.findings[0]
    for a, b in zip(found, expected, strict=True):
        error = np.abs(np.array(a) - np.array(b)).max()
        if not error <= tolerance:
            return f"{error:.3g} away from the CPU backend"
    return None


def _forty_parts(change: Change | None) -> str | None:
    q, pages = normal((1, 2, 64), 0), normal((40, 1, 8, 64), 1)
    plan = fast.plan(
        [list(range(40))], [320], num_q_heads=2, num_kv_heads=1, page_size=8, fixed_partition=8
    )
    return compare(lambda: [fast.paged_attention(q, pages, pages, plan=plan)], change, 1e-5)


def _states_not_finite(change: Change | None) -> str | None:
    """Of two parts of six rows: lse NaN, infinite, of a part far below, and empty with NaN values."""
    nan, inf = np.nan, np.inf
    lses = np.array([[nan, 0], [inf, 0], [0, nan], [-1e30, 0], [-inf, 2], [-inf, -inf]], np.float32)
    outs = np.arange(12, dtype=np.float32).reshape(2, 6, 1, 1)
    outs[0, 4:], outs[1, 5] = nan, nan
    with metal_on_host(change=change):
        parts = [mx.array(o) for o in outs], [mx.array(x[:, None]) for x in lses.T.copy()]
        out, lse = (np.array(x).ravel().tolist() for x in fast.merge_states(*parts))
    right = [nan, nan, nan, 9, 10, 0], [nan, nan, nan, 0, 2, -inf]
    same = all(np.array_equal(a, b, equal_nan=True) for a, b in zip((out, lse), right))
    return None if same else f"{out} and {lse}"


def _many_tiles(change: Change | None) -> str | None:
    """A plan made elsewhere, whose item has more rows than a threadgroup attends."""
    q, pages = normal((30, 4, 64), 0), normal((5, 1, 8, 64), 1)
    plan = fast.plan(
        [[4, 0, 2, 1, 3]], [37], num_q_heads=4, num_kv_heads=1, page_size=8, cu_seqlens_q=[0, 30]
    )
    assert [len(item["tokens"]) for item in plan.items] == [30]
    return compare(lambda: [fast.paged_attention(q, pages, pages, plan=plan)], change, 1e-5)


def _thirty_states(change: Change | None) -> str | None:
    outs = [normal((3, 2, 40), i) for i in range(30)]
    lses = [normal((3, 2), 50 + i) + i / 8 for i in range(30)]
    return compare(lambda: list(fast.merge_states(outs, lses)), change, 1e-5)


def _pool(change: Change | None) -> str | None:
    """K and V are written by one dispatch, 30 arrays copied by several."""

    def work():
        pool = PagePool(15, 4, 16, 2, 96, mx.float16, v_head_dim=64)
        for layer in range(15):
            k, v = (normal((3, 2, dim), layer + dim, mx.float16) for dim in (96, 64))
            pool.write(layer, k, v, [9, -1, 14])
        pool.copy([(1, 3), (0, 2)])
        return [array.astype(mx.float32) for arrays in pool.state for array in arrays]

    return compare(work, change, 0.0)


def _kept_pages(change: Change | None) -> str | None:
    """Pages that are still in use are copied before they are written."""
    pages, k = normal((3, 2, 4, 20), 0), normal((1, 2, 20), 1)
    return compare(lambda: [*fast.write_pages(k, k, pages, pages, [5]), pages], change, 0.0)


class _FarPool:
    """A pool of more than 2^31 elements, memory only where it is touched."""

    BYTES = 5 << 30

    def __init__(self, pool_index: int, first_byte: int = 0):
        self.index, self.first = pool_index, first_byte
        no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Python names it from 3.13 on
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
        self.memory = np.frombuffer(mmap.mmap(-1, self.BYTES, flags=flags), np.uint8)

    def replace(self, dispatch: dict) -> None:
        """The dispatch gets this pool, which holds its own pool's pages at ``first_byte``."""
        address, nbytes = dispatch["buffers"][self.index]
        self.memory[self.first : self.first + nbytes] = memory_at(address, nbytes)
        dispatch["buffers"][self.index] = (self.memory.ctypes.data, self.BYTES)


def memory_at(address: int, nbytes: int) -> np.ndarray:
    """Memory as an array of bytes."""
    return np.frombuffer((ctypes.c_char * nbytes).from_address(address), np.uint8)


def _far_attention(change: Change | None, q_heads: int) -> str | None:
    """Pages behind 2^31 elements: page ids of the plan and the pools are moved together."""
    page_bytes = 16 * 64 * 2
    first_page = (1 << 32) // page_bytes + 3
    q = normal((1, q_heads, 64), 0, mx.float16)
    k_pages, v_pages = (normal((5, 1, 16, 64), i, mx.float16) for i in (1, 2))
    plan = fast.plan([[3, 0, 4]], [41], num_q_heads=q_heads, num_kv_heads=1, page_size=16)
    pools = [_FarPool(index, first_page * page_bytes) for index in (3, 4)]
    at, count = plan._header["pages"], plan._header["num_pages"]

    def move(dispatch: dict) -> dict:
        dispatch = change(dispatch) if change else dispatch
        for pool in pools:
            pool.replace(dispatch)
        address, nbytes = dispatch["buffers"][1]
        move.plan = memory_at(address, nbytes).view(np.int32).copy()  # outlives the launch
        move.plan[at : at + count] += first_page
        dispatch["buffers"][1] = (move.plan.ctypes.data, nbytes)
        address, nbytes = dispatch["buffers"][2]
        move.q = memory_at(address, nbytes).copy()  # aligned, as Metal's buffers are
        dispatch["buffers"][2] = (move.q.ctypes.data, nbytes)
        return dispatch

    def attend():
        return [fast.paged_attention(q, k_pages, v_pages, plan=plan).astype(mx.float32)]

    expected = attend()
    mx.eval(expected)
    with metal_on_host(instrument=False, change=move) as launches, first_use.unchecked():
        found = attend()
        mx.eval(found)
    error = np.abs(np.array(found[0]) - np.array(expected[0])).max()
    return _first(launches.findings) or (
        None if error < 2e-3 else f"{error:.3g} away from the CPU backend"
    )


def _far_write(change: Change | None) -> str | None:
    """A slot whose row begins behind 2^31 elements; a unit is an element."""
    k = normal((1, 1, 3), 0, mx.float16)
    pool, slot = _FarPool(3), 800_000_001

    def move(dispatch: dict) -> dict:
        dispatch = change(dispatch) if change else dispatch
        pool.replace(dispatch)
        move.slots = np.array([slot], np.int32)
        dispatch["buffers"][1] = (move.slots.ctypes.data, 4)
        return dispatch

    with metal_on_host(instrument=False, change=move) as launches, first_use.unchecked():
        pages = (mx.zeros((2, 1, 4, 3), mx.float16) for _ in "kv")  # donated: nothing is copied
        mx.eval(fast.write_pages(k, k, *pages, [0]))
    written = pool.memory.view(np.float16)[3 * slot : 3 * slot + 3]
    right = np.array_equal(written, np.array(k)[0, 0])
    return _first(launches.findings) or (None if right else f"{written} at slot {slot}")


_Q8 = dict(dtype="float16", k_format="q8", v_format="q8", head_dim=128)
_Q4 = dict(dtype="float16", k_format="q4", v_format="q4", head_dim=128, page_size=64)
_LONG = ((1, 200), (1, 330))
FORMATS = {
    "formats, vector": Case(num_q_heads=2, num_kv_heads=2, sequences=_LONG, **_Q8),
    "formats, vector, channels": Case(num_q_heads=1, sequences=_LONG, **_Q4),
    "formats, vector, hidden": Case(num_q_heads=2, sequences=((1, 90),), mask="boolean_per_head", seed=3, **_Q8),
    "formats, tile": Case(num_q_heads=8, sequences=_LONG, **_Q8),
    "formats, tile, channels": Case(num_q_heads=8, sequences=_LONG, **_Q4),
    "formats, tile, window": Case(num_q_heads=8, sequences=((1, 330),), sliding_window=234, **_Q4),
    "formats, tile, far apart": Case(num_q_heads=8, sequences=_LONG, spread=40.0, **_Q8),
    "formats, tile, long rows": Case(num_q_heads=8, sequences=((1, 90),), v_head_dim=64, **_Q8 | {"head_dim": 512}),
    "formats, tile, hidden": Case(num_q_heads=8, sequences=((3, 90),), mask="boolean_per_head", seed=3, **_Q8),
}  # fmt: skip


def attend_in_formats(case: Case, change: Change | None) -> str | None:
    """Attention over quantised pages against the oracle, by the launch code alone."""
    problem = case.build()
    attended = attend(problem, workers=1, host={"change": change})
    if attended.errors:
        return attended.errors[0]
    verdict = problem.judge(attended.out, attended.lse)
    return None if verdict else verdict.reason


def hide_in_formats(case: Case, change: Change | None) -> str | None:
    """A token that is not finite, which a mask hides from some rows."""
    rng = np.random.default_rng(1)
    keys, values = arrays.draw_contexts(case, rng)
    values[0][5, 0, 3] = np.inf
    problem = arrays.assemble(case, arrays.draw_queries(case, rng), keys, values)
    seen = np.isnan(problem.exact[0]).any(-1)
    assert seen.any() and not seen.all()
    attended = attend(problem, workers=1, host={"change": change})
    right = np.array_equal(np.isnan(attended.out), np.isnan(problem.exact[0]))
    return _first(attended.errors) or (None if right else "other results are NaN")


def _first(findings: list[str]) -> str | None:
    return findings[0] if findings else None


CASES: dict[str, Callable[[Change | None], str | None]] = {
    **{name: partial(check, wanted) for name, wanted in CHECKS.items()},
    "wide, many tiles": _many_tiles,
    "merge, 40 parts": _forty_parts,
    "30 states": _thirty_states,
    "states, not finite": _states_not_finite,
    "pool": _pool,
    "kept pages": _kept_pages,
    "vector, far pages": partial(_far_attention, q_heads=1),
    "tile, far pages": partial(_far_attention, q_heads=8),
    "write, far pages": _far_write,
    **{
        name: partial(hide_in_formats if "hidden" in name else attend_in_formats, case)
        for name, case in FORMATS.items()
    },
    "formats, write": lambda change: _first(
        format_cases.write(("q8", "q4"), "float16", change=change)
        + format_cases.write(("q4", "q4"), "float16", change=change)
    ),
    "formats, seal": lambda change: _first(
        format_cases.seal("q4", "float16", change=change)
        + format_cases.seal("q4", "float16", rotated=True, change=change)
    ),
    "formats, gather": lambda change: _first(
        format_cases.gather(("q8", "q4"), change=change)
        + format_cases.gather(("q4", "q4"), True, change=change)
    ),
}


def cases(mutant: Mutant) -> dict[str, Callable[[], str | None]]:
    """The suite, by name, without a fault."""
    return {name: partial(case, None) for name, case in CASES.items()}
