"""Few cases that together tell every wrong CPU kernel: the kernels' checks, and some more."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from paged_mlx._native import _ext
from paged_mlx.testing import Case, Check, backends, run

from .kernels_suite import CHECKS
from .mutant import Mutant
from .native import ISA

_TILE = dict(num_q_heads=8, num_kv_heads=2, page_size=16)

MORE = {
    "pages of 5": Check("", Case(num_q_heads=4, page_size=5, sequences=((1, 70), (1, 33)), values="needles")),
    "pages of 5, partitions": Check(
        "", Case(num_q_heads=4, page_size=5, sequences=((1, 190),), sliding_window=100), "neighbours"
    ),
    "wide, ragged": Check("", Case(num_q_heads=4, page_size=8, sequences=((30, 90),), ragged=True)),
    "partitions": Check("", Case(**_TILE, sequences=((2, 200), (1, 20), (1, 130))), "neighbours"),
    "a hidden partition": Check(
        "", Case(**_TILE, sequences=((1, 300),), mask="boolean", mask_density=1.0), "neighbours"
    ),
    "20 merges": Check("", Case(num_q_heads=4, sequences=((1, 70),) * 20), "neighbours"),
    "empty": Check("", Case(sequences=((1, 0), (2, 0), (1, 9)))),
    "head_dim 24": Check("", Case(num_q_heads=4, head_dim=24, v_head_dim=24, sequences=((1, 40),) * 3)),
    "mask alone": Check("", Case(**_TILE, sequences=((1, 40),), mask="boolean")),
    "several tokens": Check("", Case(num_q_heads=2, sequences=((6, 40), (6, 36)), values="needles")),
    "several tokens in a window": Check(
        "", Case(num_q_heads=1, sequences=((12, 100),), sliding_window=3, page_size=32)
    ),
    "two passes": Check("", Case(num_q_heads=192, num_kv_heads=16, head_dim=512, sequences=((1, 20),))),
    "two tiles of keys": Check("", Case(num_q_heads=2, sequences=((60, 200),))),
    "codes by token": Check(
        "", Case(**_TILE, head_dim=128, sequences=((1, 40), (2, 33), (30, 50)), k_format="q8", v_format="q4")
    ),
    "codes by channel": Check(
        "", Case(**_TILE, head_dim=128, sequences=((1, 70), (2, 90), (30, 50)), k_format="q4", v_format="q8")
    ),
    "panels of 4 vectors": Check("", Case(num_q_heads=1, head_dim=128, sequences=((32, 90),))),
}  # fmt: skip


def _check(wanted: Check) -> str | None:
    if not _ext.set_isa(ISA):
        return f"this machine does not run {ISA}"
    outcome = run(wanted, backends.cpu())
    return None if outcome.right else outcome.reason


def cases(mutant: Mutant) -> dict[str, Callable[[], str | None]]:
    """The suite, by name."""
    attention = {
        n: c for n, c in CHECKS.items() if c.ask in ("oracle", "poison", "neighbours", "not finite")
    }
    return {name: partial(_check, wanted) for name, wanted in {**MORE, **attention}.items()}
