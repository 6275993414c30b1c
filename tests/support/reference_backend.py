"""A paged attention in numpy, float32, page by page with an online softmax.

It exists to prove the conformance suite: it shares no line with the oracle (base 2, one page
at a time, a state per row) nor with the library.
"""

from __future__ import annotations

import math

import numpy as np
from paged_mlx.reference import dtypes

LOG2E = np.float32(math.log2(math.e))


def attend(problem) -> tuple[np.ndarray, np.ndarray]:
    tokens, num_q_heads, head_dim = problem.q.shape
    out = np.zeros((tokens, num_q_heads, problem.v_pages.shape[3]), np.float32)
    lse = np.full((tokens, num_q_heads), -np.inf, np.float32)
    bounds = problem.query_bounds
    for s, context_len in enumerate(problem.context_lens):
        for token in range(bounds[s], bounds[s + 1]):
            position = int(context_len) - int(bounds[s + 1]) + token
            for head in range(num_q_heads):
                out[token, head], lse[token, head] = _row(problem, s, token, head, position)
    return dtypes.round_to(out, problem.dtype), lse


def _row(problem, s, token, head, position):
    scale = problem.q.shape[2] ** -0.5 if problem.scale is None else problem.scale
    query = dtypes.decode(problem.q[token, head], problem.dtype) * np.float32(scale)
    kv_head = head // (problem.q.shape[1] // problem.k_pages.shape[1])
    largest, total = np.float32(-np.inf), np.float32(0)
    mixed = np.zeros(problem.v_pages.shape[3], np.float32)
    end = int(problem.context_lens[s])
    if problem.causal:
        end = min(end, position + 1)
    begin = 0 if problem.sliding_window is None else max(0, position - problem.sliding_window + 1)
    for page_id, page_start, page_len in _entries(problem, s):
        low, high = max(begin, page_start), min(end, page_start + page_len)
        if low >= high:
            continue
        slots = slice(low - page_start, high - page_start)
        keys = dtypes.decode(problem.k_pages[page_id, kv_head, slots], problem.dtype)
        values = dtypes.decode(problem.v_pages[page_id, kv_head, slots], problem.dtype)
        score = _modify(problem, keys @ query, token, head, np.arange(low, high), position)
        new = max(largest, score.max())
        if new == -np.inf:
            continue
        weights = np.exp2(score - new)
        decay = np.exp2(largest - new)
        total = total * decay + weights.sum()
        mixed = mixed * decay + weights @ values
        largest = new
    return _finish(problem, head, largest, total, mixed)


def _entries(problem, s):
    page_size = problem.k_pages.shape[2]
    for i, page_id in enumerate(problem.block_tables[s]):
        if problem.page_starts is None:
            yield int(page_id), i * page_size, page_size
        elif i == 0 or problem.page_starts[s, i] > problem.page_starts[s, i - 1]:
            yield int(page_id), int(problem.page_starts[s, i]), int(problem.page_lens[s, i])


def _modify(problem, score, token, head, keys, position):
    """Scores in units of log 2."""
    if problem.softcap is not None:
        score = np.float32(problem.softcap) * np.tanh(score / np.float32(problem.softcap))
    if problem.alibi_slopes is not None:
        score = score + problem.alibi_slopes[head] * (keys - position).astype(np.float32)
    if problem.mask is not None:
        mask = problem.mask if problem.mask.ndim == 3 else problem.mask[None]
        mask = mask[head if len(mask) > 1 else 0, token, keys]
        score = np.where(mask, score, -np.inf) if mask.dtype == bool else score + mask
    return (score * LOG2E).astype(np.float32)


def _finish(problem, head, largest, total, mixed):
    if largest == -np.inf:
        return 0, -np.inf
    if problem.sinks is not None:
        sink = problem.sinks[head] * LOG2E
        new = max(largest, sink)
        decay = np.exp2(largest - new)
        total, mixed = total * decay + np.exp2(sink - new), mixed * decay
        largest = new
    return mixed / total, (largest + np.log2(total)) / LOG2E
