"""The arrays of one call, and what the oracle and the yardstick make of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np

from . import dtypes, formats, oracle, yardstick
from .yardstick import Verdict


@dataclass(frozen=True)
class Problem:
    """One call of paged attention as numpy arrays.

    ``q``, ``k_pages`` and ``v_pages`` are stored: float32, float16, or for bfloat16 its bits
    as uint16 (``dtypes.decode`` widens). ``keys`` and ``values`` are the same tokens as
    contiguous float32 arrays, one per sequence; the oracle reads these, never the pages. Of
    quantised pages they are what the pages read as, and ``stored`` holds the arrays of the layer;
    ``k_pages`` and ``v_pages`` are dense all the same, of the tokens before.
    """

    dtype: str
    q: np.ndarray
    k_pages: np.ndarray
    v_pages: np.ndarray
    block_tables: np.ndarray
    context_lens: np.ndarray
    cu_seqlens_q: np.ndarray | None
    page_starts: np.ndarray | None
    page_lens: np.ndarray | None
    scale: float | None
    causal: bool
    sliding_window: int | None
    softcap: float | None
    alibi_slopes: np.ndarray | None
    sinks: np.ndarray | None
    mask: np.ndarray | None
    keys: tuple[np.ndarray, ...]
    values: tuple[np.ndarray, ...]
    formats: tuple[str | None, str | None] = (None, None)
    stored: tuple[np.ndarray, ...] = ()

    @property
    def options(self) -> dict:
        """Every keyword argument of the op that is not None."""
        names = ("cu_seqlens_q", "causal", "sliding_window", "page_starts", "page_lens")
        return self._given(*names) | self.scoring

    @property
    def scoring(self) -> dict:
        """Those of them that change scores, which no plan has."""
        return self._given("scale", "softcap", "alibi_slopes", "sinks", "mask")

    def _given(self, *names: str) -> dict:
        return {n: getattr(self, n) for n in names if getattr(self, n) is not None}

    @property
    def queries(self) -> np.ndarray:
        """q as float32."""
        return dtypes.decode(self.q, self.dtype)

    def with_queries(self, q: np.ndarray) -> Problem:
        """The same pages, asked by other queries; ``q`` as float32 rounded values."""
        return replace(self, q=dtypes.encode(q, self.dtype))

    @property
    def query_bounds(self) -> np.ndarray:
        """First token of each sequence, and one past the last."""
        if self.cu_seqlens_q is not None:
            return self.cu_seqlens_q
        return np.arange(len(self.context_lens) + 1)

    @cached_property
    def exact(self) -> tuple[np.ndarray, np.ndarray]:
        """``(out, lse)`` of the oracle, float64."""
        return self._contiguous(oracle.attention, np.float64)

    @cached_property
    def yardstick(self) -> tuple[np.ndarray, np.ndarray]:
        """``(out, lse)`` of the yardstick, rounded; of V that is stored rotated, it attends to that
        and rotates the result."""
        if self.formats[1] == "q4":
            turned = replace(self, values=tuple(formats.rotate(v) for v in self.values))
            attend = partial(oracle.attention, precision=np.float32)
            out, lse = turned._contiguous(attend, np.float32)
            return dtypes.round_to(formats.rotate(out), self.dtype), lse
        return self._contiguous(yardstick.attention, np.float32, dtype=self.dtype)

    @cached_property
    def largest_score(self) -> float:
        """Largest magnitude of a score, in nats, before softcap, ALiBi and mask; or of a sink.

        Where no score can be far from 0, the bound that shows it.
        """
        scale = self.q.shape[-1] ** -0.5 if self.scale is None else self.scale
        queries, bounds = self.queries, self.query_bounds
        sinks = np.zeros(1) if self.sinks is None else np.abs(self.sinks)
        largest = float(sinks[np.isfinite(sinks)].max(initial=0))
        for s, k in enumerate(self.keys):
            q = queries[bounds[s] : bounds[s + 1]]
            bound = _largest_norm(q) * _largest_norm(k) * abs(scale)
            if bound > yardstick.ORDINARY_SCORE:
                bound = _largest_product(q, k) * abs(scale)
            largest = max(largest, bound)
        return largest

    def judge(self, out: np.ndarray, lse: np.ndarray | None) -> Verdict:
        """Compare ``(out, lse)`` with the oracle; the worse of the two."""
        scores = {"largest_score": self.largest_score, "score_terms": self.q.shape[-1]}
        verdict = yardstick.judge(out, self.exact[0], self.yardstick[0], self.dtype, **scores)
        if lse is None:
            return verdict
        second = yardstick.judge_lse(lse, self.exact[1], self.yardstick[1], **scores)
        return max(verdict, second, key=lambda v: v.ratio)

    def _contiguous(self, attend, precision, **extra):
        shape = (len(self.q), self.q.shape[1])
        out = np.zeros((*shape, self.v_pages.shape[3]), precision)
        lse = np.full(shape, -np.inf, precision)
        queries, bounds = self.queries, self.query_bounds
        for s, (k, v) in enumerate(zip(self.keys, self.values, strict=True)):
            rows = slice(int(bounds[s]), int(bounds[s + 1]))
            out[rows], lse[rows] = attend(
                queries[rows],
                k,
                v,
                scale=self.scale,
                causal=self.causal,
                sliding_window=self.sliding_window,
                softcap=self.softcap,
                alibi_slopes=self.alibi_slopes,
                sinks=self.sinks,
                mask=None if self.mask is None else self.mask[..., rows, :],
                **extra,
            )
        return out, lse


def _largest_norm(rows: np.ndarray) -> float:
    return float(np.sqrt(np.einsum("...d,...d", rows, rows).max(initial=0)))


def _largest_product(q: np.ndarray, k: np.ndarray) -> float:
    """Largest ``|q . k|`` over the rows of q and the keys of their KV heads."""
    if not len(q) or not len(k):
        return 0.0
    grouped = np.moveaxis(q, 1, 0).reshape(k.shape[1], -1, q.shape[2])
    keys = np.moveaxis(k, 0, 2)
    step = max(1, (1 << 22) // (len(k) * k.shape[1]))
    blocks = range(0, grouped.shape[1], step)
    return max(float(np.abs(grouped[:, i : i + step] @ keys).max()) for i in blocks)
