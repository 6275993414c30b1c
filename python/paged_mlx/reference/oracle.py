"""Attention from its definition, in float64. numpy only, no code of the library.

``attention`` computes one sequence with contiguous K and V; ``paged_attention`` has the
arguments of ``paged_mlx.fast.paged_attention`` and looks every key up in its page.

For a query token at position ``i`` and a key at position ``j`` of the same sequence:

    score = scale * (q . k)
    score = softcap * tanh(score / softcap)          if softcap
    score = score + slope * (j - i)                  if alibi_slopes
    score = score + mask                             if mask is additive
    visible: j < context_len, j <= i if causal, j > i - sliding_window,
             mask is True if boolean, score > -inf
    denominator = sum over visible exp(score) + exp(sink)
    out = sum over visible exp(score) * v / denominator,  lse = log(denominator)

A row that sees no key has out 0 and lse -inf, sinks or not. What it does not see has no
influence on a row, were it NaN; a NaN that it sees is in its result.
"""

from __future__ import annotations

import numpy as np

# Scores held at once; longer problems go by blocks of query tokens.
_BLOCK = 1 << 22


def attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    scale: float | None = None,
    causal: bool = True,
    sliding_window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: np.ndarray | None = None,
    sinks: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    precision: type = np.float64,
) -> tuple[np.ndarray, np.ndarray]:
    """Attention of the last ``query_len`` tokens of one sequence to all of it.

    Args:
        q: ``[query_len, num_q_heads, head_dim]``.
        k: ``[context_len, num_kv_heads, head_dim]``.
        v: ``[context_len, num_kv_heads, v_head_dim]``.
        mask: ``[query_len, keys]`` or ``[1 or num_q_heads, query_len, keys]`` with
            ``keys >= context_len``; boolean (True: visible) or additive.
        precision: Type in which everything is computed.

    Returns:
        ``out [query_len, num_q_heads, v_head_dim]`` and ``lse [query_len, num_q_heads]``,
        both of ``precision``.
    """
    query_len, num_q_heads, head_dim = q.shape
    context_len, num_kv_heads, v_head_dim = v.shape
    out: np.ndarray = np.zeros((query_len, num_q_heads, v_head_dim), precision)
    lse: np.ndarray = np.full((query_len, num_q_heads), -np.inf, precision)
    if context_len == 0 or query_len == 0:
        return out, lse
    scale = head_dim**-0.5 if scale is None else scale
    keys: np.ndarray = np.moveaxis(
        np.asarray(k, precision), 0, 2
    )  # [num_kv_heads, head_dim, context]
    values: np.ndarray = np.moveaxis(
        np.asarray(v, precision), 0, 1
    )  # [num_kv_heads, context, v_head_dim]
    step = max(1, _BLOCK // (context_len * num_q_heads))
    for begin in range(0, query_len, step):
        end = min(begin + step, query_len)
        positions = np.arange(context_len - query_len + begin, context_len - query_len + end)
        rows: np.ndarray = np.asarray(q[begin:end], precision)
        with np.errstate(invalid="ignore"):  # a NaN in, a NaN out
            score = _scores(rows, keys, precision(scale))
            score = _modify(score, positions, softcap, alibi_slopes)
            visible = _visible(positions, context_len, causal, sliding_window)[None]
            if mask is not None:
                score, visible = _apply_mask(score, visible, mask, begin, end)
            score = np.where(visible, score, precision(-np.inf))
            out[begin:end], lse[begin:end] = _softmax(score, values, sinks)
    return out, lse


def _scores(q, keys, scale):
    """``[num_q_heads, rows, context]``; query head h reads KV head h // gqa_factor."""
    rows, num_q_heads, head_dim = q.shape
    num_kv_heads, _, context_len = keys.shape
    grouped = np.moveaxis(q, 0, 1).reshape(num_kv_heads, -1, head_dim)
    return (grouped @ keys).reshape(num_q_heads, rows, context_len) * scale


def _modify(score, positions, softcap, alibi_slopes):
    if softcap is not None:
        cap = score.dtype.type(softcap)
        score = np.tanh(score / cap) * cap
    if alibi_slopes is not None:
        slopes = np.asarray(alibi_slopes, score.dtype)[:, None, None]
        distance = np.arange(score.shape[2])[None, :] - positions[:, None]
        score = score + slopes * distance.astype(score.dtype)
    return score


def _visible(positions, context_len, causal, sliding_window):
    """``bool [rows, context]`` from positions alone."""
    key = np.arange(context_len)[None, :]
    query = positions[:, None]
    seen = key <= query if causal else np.ones((len(positions), context_len), bool)
    return seen & (key > query - sliding_window) if sliding_window is not None else seen


def _apply_mask(score, visible, mask, begin, end):
    mask = mask if mask.ndim == 3 else mask[None]
    part = mask[:, begin:end, : score.shape[2]]
    if part.dtype == bool:
        return score, visible & part
    return score + part.astype(score.dtype), visible & (part != -np.inf)


def _softmax(score, values, sinks):
    """``score`` is -inf wherever a key is not visible."""
    num_q_heads, rows, context_len = score.shape
    num_kv_heads = values.shape[0]
    largest = score.max(axis=2, keepdims=True)
    sees = ~(largest == -np.inf)
    if sinks is not None:
        sink = np.asarray(sinks, score.dtype)[:, None, None]
        largest = np.where(sees, np.maximum(largest, sink), 0)
    largest = np.where(sees, largest, 0)
    weights = np.exp(score - largest)
    total = weights.sum(axis=2, keepdims=True)
    if sinks is not None:
        with np.errstate(over="ignore"):
            total = total + np.where(sees, np.exp(sink - largest), 0)
    mixed = _mix(weights.reshape(num_kv_heads, -1, context_len), score, values)
    mixed = mixed.reshape(num_q_heads, rows, -1) / np.where(sees, total, 1)
    with np.errstate(divide="ignore"):
        lse = np.where(sees, largest + np.log(total), -np.inf)[..., 0]
    return np.moveaxis(mixed, 0, 1), lse.T


def _mix(weights, score, values):
    """Sums of values by weight. One that a row does not see is 0 for it, were it NaN."""
    finite = np.isfinite(values)
    mixed = weights @ np.where(finite, values, 0)
    hidden = (score == -np.inf).reshape(weights.shape)
    for head, key in zip(*np.nonzero(~finite.all(axis=2))):
        seen = ~hidden[head, :, key]
        more = weights[head, seen, key][:, None] * values[head, key]
        mixed[head, seen] += np.where(finite[head, key], 0, more)
    return mixed


def paged_attention(
    q: np.ndarray,
    k_pages: np.ndarray,
    v_pages: np.ndarray,
    block_tables: np.ndarray,
    context_lens: np.ndarray,
    *,
    cu_seqlens_q: np.ndarray | None = None,
    page_starts: np.ndarray | None = None,
    page_lens: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    **options,
) -> tuple[np.ndarray, np.ndarray]:
    """Attention over pages, with the meaning of ``paged_mlx.fast.paged_attention``.

    Floating-point arguments are numpy arrays that hold the rounded values. Pages that no
    query token can see are not read. Returns ``(out, lse)`` in float64.
    """
    batch = len(context_lens)
    bounds = np.arange(batch + 1) if cu_seqlens_q is None else np.asarray(cu_seqlens_q)
    out = np.zeros((len(q), q.shape[1], v_pages.shape[3]))
    lse = np.full((len(q), q.shape[1]), -np.inf)
    for s in range(batch):
        begin, end = int(bounds[s]), int(bounds[s + 1])
        if begin == end:
            continue
        table = _table(block_tables, page_starts, page_lens, s, k_pages.shape[2])
        first = first_key(int(context_lens[s]), end - begin, options.get("sliding_window"))
        k = _gather(k_pages, table, int(context_lens[s]), first)
        v = _gather(v_pages, table, int(context_lens[s]), first)
        part = None if mask is None else mask[..., begin:end, :]
        out[begin:end], lse[begin:end] = attention(q[begin:end], k, v, mask=part, **options)
    return out, lse


def first_key(context_len: int, query_len: int, sliding_window: int | None) -> int:
    """First position that any of the sequence's query tokens may see."""
    if sliding_window is None:
        return 0
    return max(0, context_len - query_len - sliding_window + 1)


def _table(block_tables, page_starts, page_lens, s, page_size):
    """``(page_id, first position, tokens)`` of every entry of a sequence."""
    pages = np.asarray(block_tables)[s]
    if page_starts is None:
        return [(int(p), i * page_size, page_size) for i, p in enumerate(pages)]
    return [(int(p), int(page_starts[s][i]), int(page_lens[s][i])) for i, p in enumerate(pages)]


def _gather(pages, table, context_len, first):
    """``[context_len, num_kv_heads, dim]``; zeros before the entry that holds ``first``."""
    result = np.zeros((context_len, pages.shape[1], pages.shape[3]), pages.dtype)
    for page_id, start, length in table:
        end = min(start + length, context_len)
        if start >= context_len:
            break
        if end > first and end > start:
            result[start:end] = np.moveaxis(pages[page_id, :, : end - start], 0, 1)
    return result
