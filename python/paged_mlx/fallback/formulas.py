"""The formula of each operation on MLX's arrays. This is the file to read.

K and V of a sequence are gathered, scores of all its keys are kept, and a write makes new pages
wherever MLX must keep the old ones. ``operations`` gives these formulas the names, arguments and
checks of the native module; ``benchmarks/bench_attention.py`` measures how much slower they are.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from paged_mlx.options import AttentionOptions

_NO_TOKEN = -(2**30)  # the position of a slot that holds none


# Attention


def attention(q, k, v, distance, visible, options: AttentionOptions):
    """``(out, lse)``: softmax of the scores, times V, and the scores' log-sum-exp.

    Args:
        q: ``[batch, num_q_heads, T, head_dim]``.
        k, v: ``[batch, num_kv_heads, N, dim]``, float32.
        distance: ``[batch, T, N]``, the position of a key less that of the query.
        visible: bool ``[batch, T, N]``: which keys a query sees.
        options: The mask is ``[batch, num_q_heads or 1, T, N]``.
    """
    batch, num_q_heads, length, head_dim = q.shape
    scale, cap, alibi_slopes, sinks, mask = options
    visible = visible[:, None]

    # Scores: scale, cap, ALiBi, mask, in this order. The rows of a KV head are multiplied together.
    rows = q.astype(mx.float32).reshape(batch, k.shape[1], -1, head_dim)
    scores = _dot(rows, k.swapaxes(-1, -2)).reshape(batch, num_q_heads, length, -1)
    scores = scores * (head_dim**-0.5 if scale is None else scale)
    if cap is not None:
        scores = cap * mx.tanh(scores / cap)
    if alibi_slopes is not None:
        scores = scores + _by_head(alibi_slopes) * distance[:, None].astype(mx.float32)
    if mask is not None:
        visible = visible & (mask if mask.dtype == mx.bool_ else mask != -mx.inf)
        scores = scores if mask.dtype == mx.bool_ else scores + mask.astype(mx.float32)
    scores = mx.where(visible, scores, -mx.inf)

    # Softmax; the sink takes weight and gives no value.
    highest = scores.max(-1, keepdims=True)
    seen = highest != -mx.inf
    if sinks is not None:
        highest = mx.maximum(highest, _by_head(sinks))
    shift = mx.where(highest == -mx.inf, 0.0, highest)
    weights = mx.where(visible, mx.exp(scores - shift), 0.0)
    total = weights.sum(-1, keepdims=True)
    if sinks is not None:
        total = total + mx.exp(_by_head(sinks) - shift)
    total = mx.where(seen, total, 1.0)
    out = mx.where(seen, _weighted(weights / total, v), 0.0)
    return out, mx.where(seen, shift + mx.log(total), -mx.inf).squeeze(-1)


def key_positions(starts, lens, page_size: int):
    """``[batch, 1, N]``: of the token in each slot of the pages, which begin at ``starts [batch, M]``."""
    offsets = mx.arange(page_size)
    keys = mx.where(offsets < lens[..., None], starts[..., None] + offsets, _NO_TOKEN)
    return keys.reshape(len(keys), 1, -1)


def is_visible(keys, position, end, window):
    """A query sees the keys before ``end``, and of these the last ``window`` up to its position."""
    return (keys >= 0) & (keys < end) & (keys > position - window)


def _by_head(values):
    return values.astype(mx.float32)[:, None, None]


def _dot(a, b):
    """``a @ b``, the inner axis summed in pieces, so that rounding errors stay small."""
    pieces = range(0, a.shape[-1], 128)
    return sum(a[..., i : i + 128] @ b[..., i : i + 128, :] for i in pieces)


def _weighted(weights, v):
    """``weights @ v`` per KV head; what a row gives no weight adds nothing, were it NaN."""
    rows = weights.reshape(*v.shape[:2], -1, weights.shape[3])
    out = rows @ mx.where(mx.isfinite(v), v, 0.0)
    nan = mx.isnan(v)
    odd = mx.concatenate([nan | (v == mx.inf), nan | (v == -mx.inf)], axis=-1)
    met = (rows != 0).astype(mx.float32) @ odd.astype(mx.float32) > 0
    up, down = mx.split(met, 2, axis=-1)  # both: NaN
    out = out + mx.where(up, mx.inf, 0.0) - mx.where(down, mx.inf, 0.0)
    return out.reshape(*weights.shape[:3], v.shape[3])


def merged(outs, lses):
    """``(out, lse)`` of the union of parts of a context, from those of each part."""
    parts = mx.stack(lses)
    highest = parts.max(0)
    shift = mx.where(highest == -mx.inf, 0.0, highest)
    weights = mx.where(parts == -mx.inf, 0.0, mx.exp(parts - shift))
    total = weights.sum(0)
    lse = mx.where(total == 0, -mx.inf, shift + mx.log(total))
    share = (weights / mx.where(total == 0, 1.0, total))[..., None]
    values = mx.stack([out.astype(mx.float32) for out in outs])
    values = mx.where(share == 0, 0.0, share * values)
    return values.sum(0).astype(outs[0].dtype), lse


# Pages: [num_pages, num_kv_heads, page_size, dim], of K or of V


def written(pages, slots: np.ndarray, tokens):
    """The pages with ``tokens [n, num_kv_heads, dim]`` in their slots; -1: nowhere."""
    kept = np.flatnonzero(slots >= 0)
    if not kept.size:
        return pages
    page_ids, offsets = (mx.array(part) for part in np.divmod(slots[kept], pages.shape[2]))
    return put(pages, (page_ids, slice(None), offsets), tokens[mx.array(kept)])


def written_while_traced(pages, slots, tokens):
    """``written`` where the slots are not known: a page more takes the tokens that go nowhere."""
    num_pages, _, page_size, _ = pages.shape
    end = num_pages * page_size
    slots = mx.where((slots < 0) | (slots >= end), end, slots)
    longer = mx.concatenate([pages, pages[:1]])
    return put(longer, (slots // page_size, slice(None), slots % page_size), tokens)[:-1]


def copied(pages, pairs):
    """The pages with page ``pairs[i, 0]`` copied to page ``pairs[i, 1]``."""
    return put(pages, pairs[:, 1], pages[pairs[:, 0]])


def put(pages, index, values):
    """The pages with other values at an index: MLX copies all of them unless it alone holds them."""
    global num_puts
    num_puts += 1
    new = mx.array(pages)
    new[index] = values
    return new


num_puts = 0  #: of arrays so far: MLX does not say which of them were copied


def joined(pages):
    """``[batch, num_kv_heads, M * page_size, dim]``: M pages of each sequence, one after the other."""
    pages = pages.swapaxes(1, 2)
    return pages.reshape(*pages.shape[:2], -1, pages.shape[4])


def taken(pages, slots: np.ndarray):
    """``[batch, num_kv_heads, N, dim]``: what ``slots [batch, N]`` hold, 0 for a slot of -1."""
    page_ids, offsets = (mx.array(part) for part in np.divmod(np.maximum(slots, 0), pages.shape[2]))
    found = pages[page_ids, :, offsets]  # [batch, N, heads, dim]
    return mx.where(mx.array(slots >= 0)[..., None, None], found, 0).swapaxes(1, 2)


def slots_of_positions(length, page_size, tables, lens, starts=None, counts=None) -> np.ndarray:
    """The slot of each position of each sequence, ``[batch, length]``; -1: it holds no token.

    Args:
        tables, lens: Page ids ``[batch, M]``, and the tokens of each sequence.
        starts, counts: Of ragged tables: position of each page's first token, and how many it has.
    """
    slots = np.full((len(tables), length), -1, np.int64)
    for b, i in np.argwhere(tables >= 0).tolist():
        start = i * page_size if starts is None else int(starts[b, i])
        count = page_size if counts is None else int(counts[b, i])
        first, last = max(start, 0), min(start + count, int(lens[b]), length)
        if first < last:
            slot = int(tables[b, i]) * page_size + first - start
            slots[b, first:last] = np.arange(slot, slot + last - first)
    return slots
