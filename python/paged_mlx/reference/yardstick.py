"""The distance from the oracle that a result may have. The one home of tolerances.

The yardstick is contiguous attention that accumulates in float32 and rounds once to the
output's type. A result is right when its largest error is at most ``MAX_FACTOR`` times the
yardstick's and its mean error at most ``MEAN_FACTOR`` times, plus a floor.

The floor keeps a yardstick that happens to be exact from being a trap. It is a few units in
the last place of the output's type, relative to the largest value of the row, and, where
scores are far from 0, what a float32 score of that size may lose: one rounding for each term
of its dot product, since a backend adds them in the order it likes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from . import dtypes, oracle

MAX_FACTOR = 2.0
MEAN_FACTOR = 1.5

#: Units in the last place of the output's type: (largest error, mean error).
FLOOR_ULPS = {"float32": (4.0, 1.0), "float16": (1.0, 0.01), "bfloat16": (1.0, 0.01)}

#: Nats; what lies beyond counts as large, and may be off by a rounding for each term.
ORDINARY_SCORE = 16.0

_FLOAT32_UNIT = dtypes.EPSILON["float32"] / 2


@dataclass(frozen=True)
class Verdict:
    """The result of ``judge``. ``ratio`` is the worst error over its bound; at most 1 is right."""

    right: bool
    ratio: float
    reason: str

    def __bool__(self) -> bool:
        return self.right


def attention(q, k, v, dtype: str, **options) -> tuple[np.ndarray, np.ndarray]:
    """The yardstick of one sequence; arguments as in ``oracle.attention``."""
    out, lse = oracle.attention(q, k, v, precision=np.float32, **options)
    return dtypes.round_to(out, dtype), lse


def judge(
    out: np.ndarray,
    exact: np.ndarray,
    yardstick: np.ndarray,
    dtype: str = "float32",
    largest_score: float = 0.0,
    score_terms: int = 1,
) -> Verdict:
    """Compare a result with the oracle's, by the yardstick's own error.

    Args:
        out: The result, ``[rows..., dim]``.
        exact: The oracle's, same shape.
        yardstick: The yardstick's, same shape.
        dtype: Type that ``out`` was rounded to.
        largest_score: Largest magnitude of a score, in nats.
        score_terms: Terms of a score's dot product, the head_dim.
    """
    out, exact = np.asarray(out, np.float64), np.asarray(exact, np.float64)
    if out.shape != exact.shape:
        return Verdict(False, np.inf, f"shape {out.shape} where {exact.shape} is right")
    size = np.abs(exact).max(axis=-1, keepdims=True, initial=0)
    return _compare(out, exact, np.asarray(yardstick), size, dtype, largest_score, score_terms)


def judge_lse(lse, exact, yardstick, largest_score: float = 0.0, score_terms: int = 1) -> Verdict:
    """Compare log-sum-exps ``[tokens, heads]``: float32 whatever the output's type."""
    lse, exact = np.asarray(lse, np.float64), np.asarray(exact, np.float64)
    if lse.shape != exact.shape:
        return Verdict(False, np.inf, f"lse of shape {lse.shape} where {exact.shape} is right")
    size = np.maximum(1.0, np.where(np.isfinite(exact), np.abs(exact), 0.0))
    verdict = _compare(
        lse, exact, np.asarray(yardstick), size, "float32", largest_score, score_terms
    )
    return Verdict(verdict.right, verdict.ratio, "lse: " + verdict.reason)


def _error(found, exact):
    """Absolute error; 0 where both are the same infinity, NaN or inf where one is not finite."""
    with np.errstate(invalid="ignore", over="ignore"):
        return np.where(found == exact, 0.0, np.abs(found - exact))


def _compare(out, exact, yardstick, size, dtype, largest_score, score_terms):
    """``size`` is what the units of the floor are relative to, one per row or per element."""
    if out.size == 0:
        return Verdict(True, 0.0, "nothing to compare")
    error, own = _error(out, exact), _error(yardstick, exact)
    if not np.isfinite(error).all():
        at = tuple(int(i) for i in np.argwhere(~np.isfinite(error))[0])
        return Verdict(False, np.inf, f"{out[at]} at {at} where {exact[at]:.6g} is right")
    unit = dtypes.EPSILON[dtype] * size + dtypes.TINY[dtype]
    rounding = score_terms * dtypes.EPSILON["float32"] / 2
    unavoidable = size * rounding * max(0.0, largest_score - ORDINARY_SCORE)
    max_ulps, mean_ulps = FLOOR_ULPS[dtype]
    bound = np.broadcast_to(MAX_FACTOR * own.max() + max_ulps * unit + unavoidable, error.shape)
    mean_bound = MEAN_FACTOR * own.mean() + np.mean(mean_ulps * unit + unavoidable)
    at = tuple(int(i) for i in np.unravel_index((error / bound).argmax(), error.shape))
    ratio, mean_ratio = float(error[at] / bound[at]), float(error.mean() / mean_bound)
    if mean_ratio > ratio:
        reason = f"mean error {error.mean():.3g}, bound {mean_bound:.3g}"
        return Verdict(mean_ratio <= 1, mean_ratio, reason)
    reason = f"{out[at]:.6g} at {at} where {exact[at]:.6g} is right, bound {bound[at]:.3g}"
    return Verdict(ratio <= 1, ratio, reason)
