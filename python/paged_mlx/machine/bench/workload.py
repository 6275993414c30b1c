"""Batches to measure: the same K and V contiguous and in shuffled pages."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

import mlx.core as mx
import numpy as np

from paged_mlx import PagePool, fast
from paged_mlx._native import _ext
from paged_mlx.fallback.formulas import joined

PERIOD = 1_000_003  # random values are repeated, out of step with the pages
COLD_BYTES = 160_000_000  # layers that take turns hold as much together: no cache does
DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


@dataclass(frozen=True)
class Geometry:
    """Heads, dims and pages of a workload."""

    num_q_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 16
    dtype: str = "float16"

    @property
    def bytes_per_token(self) -> int:
        """K and V of one token, one layer."""
        return 2 * self.num_kv_heads * self.head_dim * DTYPES[self.dtype].size


def shuffled_tables(lengths, page_size: int, rng, shared: int = 0) -> np.ndarray:
    """A block table for contexts of these lengths, ``shared`` tokens in common; page ids shuffled."""
    counts = [-(-n // page_size) for n in lengths]
    common = shared // page_size
    ids = rng.permutation(common + sum(c - common for c in counts)).astype(np.int32)
    tables = np.full((len(counts), max(counts)), fast.NO_PAGE, np.int32)
    tables[:, :common] = ids[:common]
    at = common
    for row, pages in zip(tables, counts):
        row[common:pages] = ids[at : at + pages - common]
        at += pages - common
    return tables


class Workload:
    """Layers of K and V for sequences that attend with their last tokens.

    Layers take turns, so that a layer that fits a cache is not served from it, as in a
    real model.

    Args:
        lengths: Context of each sequence.
        query_lens: New tokens of each; default one (decode).
        shared: Tokens that all sequences have in common, page for page.
        layers: Copies of K and V to rotate through.
    """

    def __init__(self, lengths, geometry=Geometry(), query_lens=None, shared=0, layers=1, seed=0):
        self.lengths, self.g = list(lengths), geometry
        self.context_lens = np.array(self.lengths, np.int32)  # as BlockTable holds them
        self.query_lens = [1] * len(self.lengths) if query_lens is None else list(query_lens)
        rng = np.random.default_rng(seed)
        g, self.dtype = geometry, DTYPES[geometry.dtype]
        self.tables = shuffled_tables(self.lengths, g.page_size, rng, shared)
        num_pages = int(self.tables.max()) + 1
        self.pool = PagePool(layers, num_pages, g.page_size, g.num_kv_heads, g.head_dim, self.dtype)
        shape = (num_pages, g.num_kv_heads, g.page_size, g.head_dim)
        values = rng.standard_normal(PERIOD, np.float32)
        slots = self.pool.slots(np.arange(num_pages * g.page_size, dtype=np.int32))
        for layer in self.layers:
            k, v = (
                mx.array(np.resize(np.roll(values, 7919 * i), shape)).astype(self.dtype)
                for i in (2 * layer, 2 * layer + 1)
            )
            by_token = (x.swapaxes(1, 2).reshape(-1, *x.shape[1::2]) for x in (k, v))
            self.pool[layer].write(*by_token, slots)
            mx.eval(self.pool[layer].arrays)
        q_shape = (sum(self.query_lens), g.num_q_heads, g.head_dim)
        self.q = mx.array(rng.standard_normal(q_shape).astype(np.float32)).astype(self.dtype)
        self.cu = np.concatenate([[0], np.cumsum(self.query_lens)]).astype(np.int32)
        mx.eval(self.q)

    @classmethod
    def cold(cls, lengths, geometry=Geometry(), query_lens=None, shared=0) -> "Workload":
        """With as many layers, 16 at the most, as make K and V larger than caches."""
        pages = sum(lengths) - shared * (len(lengths) - 1)
        layers = -(-COLD_BYTES // (pages * geometry.bytes_per_token))
        return cls(lengths, geometry, query_lens, shared, layers=min(16, layers))

    @property
    def layers(self) -> range:
        return range(self.pool.num_layers)

    @property
    def nbytes(self) -> int:
        """Bytes of K and V that a step reads when nothing is shared."""
        return sum(self.lengths) * self.g.bytes_per_token

    def in_turn(self, run: Callable[[int], object], start: int = 0) -> Callable[[], object]:
        """``run(layer)`` for layer 0, then for the layers from ``start`` on, in turn.

        So the first call of all candidates can be compared, and later ones do not find
        what the candidate before them has just read.
        """
        calls = count()

        def call():
            turn = next(calls)
            return run(0 if turn == 0 else (start + turn) % self.pool.num_layers)

        return call

    def plan(self, **options) -> fast.AttentionPlan:
        g = self.g
        return fast.plan(
            self.tables,
            self.context_lens,
            num_q_heads=g.num_q_heads,
            num_kv_heads=g.num_kv_heads,
            page_size=g.page_size,
            cu_seqlens_q=self.cu,
            dtype=self.dtype,
            **options,
        )

    # The ways to do it. Each returns [tokens, num_q_heads, head_dim], evaluated.

    def paged(self, layer=0, plan=None) -> mx.array:
        """Read through the block table; the plan is made in the call unless given."""
        out = self.pool[layer].attend(self.q, self.plan() if plan is None else plan)
        mx.eval(out)
        return out

    def naive_gather(self, layer=0) -> mx.array:
        """Gather the pages as the fallback does, then mx.fast SDPA with a mask."""
        k_pages, v_pages = self.pool[layer].arrays
        out = self._dense(self._take(k_pages), self._take(v_pages))
        mx.eval(out)
        return out

    def contiguous(self, k, v) -> mx.array:
        """mx.fast SDPA on K and V that are contiguous already."""
        out = self._dense(k, v)
        mx.eval(out)
        return out

    def contiguous_kv(self, layer=0) -> tuple[mx.array, mx.array]:
        """K and V ``[batch, num_kv_heads, longest, head_dim]``."""
        pages = self.pool[layer].arrays
        k, v = (mx.contiguous(self._take(x)) for x in pages)
        mx.eval(k, v)
        return k, v

    def packed_kv(self, layer=0) -> tuple[mx.array, mx.array]:
        """K and V of one sequence after the other, ``[tokens, num_kv_heads, head_dim]``."""
        k, v = (
            mx.concatenate([rows[:, :n].swapaxes(0, 1) for rows, n in zip(x, self.lengths)])
            for x in self.contiguous_kv(layer)
        )
        mx.eval(k, v)
        return k, v

    def contiguous_pages(self, layer=0) -> tuple[mx.array, mx.array]:
        """K and V as pages, one for each sequence, in memory as a pool takes it."""
        k, v = (in_pool_memory(x) for x in self.contiguous_kv(layer))
        mx.eval(k, v)
        return k, v

    def _take(self, pages: mx.array) -> mx.array:
        found = pages[mx.array(np.maximum(self.tables, 0))]
        return joined(found)[:, :, : max(self.lengths)]

    def _dense(self, k, v) -> mx.array:
        batch, length, g = len(self.lengths), max(self.query_lens), self.g
        if len(set(self.query_lens)) > 1:
            raise ValueError(
                "[Workload] contiguous attention must have one query length; got several."
            )
        q = self.q.reshape(batch, length, g.num_q_heads, g.head_dim).swapaxes(1, 2)
        mask = None
        if length > 1 and len(set(self.lengths)) == 1:
            mask = "causal"
        elif len(set(self.lengths)) > 1 or length > 1:
            ends = mx.array(self.lengths)[:, None] - length + mx.arange(1, length + 1)
            mask = (mx.arange(max(self.lengths)) < ends[..., None])[:, None]
        out = mx.fast.scaled_dot_product_attention(q, k, v, scale=g.head_dim**-0.5, mask=mask)
        return out.swapaxes(1, 2).reshape(-1, g.num_q_heads, g.head_dim)


def in_pool_memory(pages: mx.array) -> mx.array:
    """A copy of pages, in memory as a pool takes it."""
    return _ext.pool_memory(pages, pages.shape, 0.0, pages.dtype, stream=mx.cpu)


def agree(outputs: dict, tolerance: float = 0.05) -> None:
    """All outputs are the same attention, up to half precision.

    Raises:
        AssertionError: Two candidates differ.
    """
    (first_name, first), *others = outputs.items()
    for name, out in others:
        error = np.abs(floats(out) - floats(first)).max()
        assert error < tolerance, f"{name} and {first_name} differ by {error}"


def floats(out) -> np.ndarray:
    """An array of MLX, of NumPy or of torch as NumPy's float32."""
    if isinstance(out, mx.array):
        return np.array(out.astype(mx.float32))
    return out.astype(np.float32) if isinstance(out, np.ndarray) else out.float().numpy()
