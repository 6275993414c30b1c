"""The arrays of a call: contexts drawn, laid out in shuffled pages, and poisoned around."""

from __future__ import annotations

import numpy as np

from . import dtypes
from .call import Call
from .problem import Problem
from .stored import Layer, store
from .tables import Tables, lay_out


def draw_queries(case: Call, rng: np.random.Generator) -> np.ndarray:
    """``[tokens, num_q_heads, head_dim]``; against unit normal keys, scores have ``spread``."""
    shape = (case.num_tokens, case.num_q_heads, case.head_dim)
    gain = case.spread / (case.softmax_scale * case.head_dim**0.5)
    q = rng.standard_normal(shape, np.float32) * np.float32(gain)
    if case.shift:
        q[..., -1] = np.copysign(_shift_root(case), case.shift)
    return dtypes.round_to(q, case.dtype)


def draw_contexts(case: Call, rng: np.random.Generator):
    """Contiguous K and V of every sequence, shared prefixes equal."""
    keys, values = [], []
    for s, (_, context_len) in enumerate(case.sequences):
        k = rng.standard_normal((context_len, case.num_kv_heads, case.head_dim), np.float32)
        v = rng.standard_normal((context_len, case.num_kv_heads, case.value_dim), np.float32)
        if case.shift:
            k[..., -1] = _shift_root(case)
        if case.values == "ones":
            v[:] = 1
        keys.append(dtypes.round_to(k, case.dtype))
        values.append(dtypes.round_to(v, case.dtype))
        share_prefixes(case, s, keys)
        share_prefixes(case, s, values)
    return keys, values


def share_prefixes(case: Call, s: int, arrays: list[np.ndarray]) -> None:
    """Give sequence ``s`` the first tokens of the sequences it shares prefixes with."""
    for first, last, tokens in case.prefixes:
        if first < s < last:
            length = min(tokens, len(arrays[s]), len(arrays[first]))
            arrays[s][:length] = arrays[first][:length]


def _shift_root(case: Call) -> np.float32:
    return np.float32((abs(case.shift) / case.softmax_scale) ** 0.5)


def page_tables(case: Call) -> Tables:
    """Which page holds which tokens; from ``seed`` and ``layout`` alone."""
    return lay_out(case, np.random.default_rng([case.seed, case.layout, 2]))


def assemble(case: Call, q: np.ndarray, keys: list, values: list) -> Problem:
    """Put contiguous K and V into shuffled pages; poison everything else.

    Args:
        q: ``[tokens, num_q_heads, head_dim]``, rounded to the case's type.
        keys: ``[context_len, num_kv_heads, head_dim]`` of each sequence, rounded.
        values: The same with ``v_head_dim``.
    """
    tables = page_tables(case)
    rng = np.random.default_rng([case.seed, case.layout, 4])
    query_lens = [query_len for query_len, _ in case.sequences]
    unpacked = all(n == 1 for n in query_lens) and not case.packed
    options = np.random.default_rng([case.seed, 3])
    k_pages = tables.scatter(case, keys, case.head_dim, rng)
    v_pages = tables.scatter(case, values, case.value_dim, rng)
    layer = Layer((), keys, values, tables.block_tables)
    if case.formats != (None, None):
        layer = store(case, tables, keys, values, rng)
    return Problem(
        dtype=case.dtype,
        q=dtypes.encode(q, case.dtype),
        k_pages=k_pages,
        v_pages=v_pages,
        block_tables=layer.block_tables,
        context_lens=np.array([c for _, c in case.sequences], np.int32),
        cu_seqlens_q=None if unpacked else np.cumsum([0, *query_lens]).astype(np.int32),
        page_starts=tables.page_starts,
        page_lens=tables.page_lens,
        scale=case.scale,
        causal=case.causal,
        sliding_window=case.sliding_window,
        softcap=case.softcap,
        alibi_slopes=_alibi_slopes(case),
        sinks=_sinks(case, options),
        mask=_mask(case, options),
        keys=tuple(layer.keys),
        values=tuple(layer.values),
        formats=case.formats,
        stored=layer.arrays,
    )


def _alibi_slopes(case: Call):
    if not case.alibi:
        return None
    heads = np.arange(1, case.num_q_heads + 1, dtype=np.float32)
    return np.float32(case.alibi) * np.exp2(-8 * heads / case.num_q_heads).astype(np.float32)


def _sinks(case: Call, rng):
    if case.sinks is None:
        return None
    if case.sinks == "random":
        return (2 * rng.standard_normal(case.num_q_heads)).astype(np.float32)
    return np.full(case.num_q_heads, case.sinks, np.float32)


def _mask(case: Call, rng):
    """``[(heads,) tokens, keys]``; columns past a sequence's own context are garbage."""
    if case.mask is None:
        return None
    longest = max((c for _, c in case.sequences), default=0)
    shape: tuple[int, ...] = (case.num_tokens, longest)
    if case.mask.endswith("per_head"):
        shape = (case.num_q_heads, *shape)
    hidden = rng.random(shape, np.float32) < case.mask_density
    if case.mask.startswith("boolean"):
        return _fill_unseen(case, ~hidden, True)
    mask = rng.standard_normal(shape, np.float32)
    mask[hidden] = -np.inf
    return _fill_unseen(case, mask, np.nan if case.poison != "zero" else 0)


def _fill_unseen(case: Call, mask: np.ndarray, garbage) -> np.ndarray:
    token = 0
    for query_len, context_len in case.sequences:
        mask[..., token : token + query_len, context_len:] = garbage
        token += query_len
    return mask
