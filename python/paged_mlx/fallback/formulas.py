"""What each operation means, in plain formulas on MLX's arrays.

Every function has the name, arguments and results of the native module's. Slower, and with more
memory: K and V of a sequence are gathered, scores of all its keys are kept, and a write copies the
pages wherever MLX must keep the old ones. ``benchmarks/bench_attention.py`` measures how much slower.
"""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from functools import wraps

import mlx.core as mx
import numpy as np

import paged_mlx.fallback.checks as checks
from paged_mlx.fallback.plan import TokenRows
from paged_mlx.fallback.traces import is_tracer
from paged_mlx.formats.rotation import rotate
from paged_mlx.formats.stored import Stored, stored
from paged_mlx.options import AttentionOptions

_NEVER = -(2**30)  # the position of a slot that holds no token
_writes = 0
_calls: Counter[str] = Counter()  # of each operation, named as the native module names it


def on_stream(operation):
    """Let an operation take a stream or a device."""

    @wraps(operation)
    def placed(*arguments, stream=None, **options):
        with nullcontext() if stream is None else mx.stream(stream):
            return operation(*arguments, **options)

    return placed


# Attention


@on_stream
def paged_attention(
    q, pages, plan, scale=None, cap=None, alibi_slopes=None, sinks=None, mask=None, *,
    formats=(None, None),
):  # fmt: skip
    """``[out, lse, *pages]`` of one step."""
    _calls["PagedAttention"] += 1
    geometry = checks.attention_geometry(q, pages, formats)
    sides = stored(pages, formats)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    options = AttentionOptions(scale, cap, alibi_slopes, sinks, mask)
    checks.options("paged_attention", q, options)
    if is_tracer(plan):  # its values are not known: every token gathers for itself
        out, lse = _attend(q[:, None], *sides, TokenRows.of(plan, q.shape[0]), None, options)
        return [out.squeeze(1), lse.squeeze(1), *pages]
    words = np.array(plan)
    checks.plan(words, geometry)
    rows = TokenRows.of(words, q.shape[0])
    checks.rows(rows, geometry["num_pages"], mask)
    outs = [mx.zeros((0, q.shape[1], sides[1].dim), q.dtype)]
    lses = [mx.zeros((0, q.shape[1]))]
    for first, last in rows.sequences():
        part = TokenRows(mx.array(rows.words[first:last].swapaxes(0, 1)))
        out, lse = _attend(q[first:last][None], *sides, part, (first, last), options)
        outs.append(out.squeeze(0))
        lses.append(lse.squeeze(0))  # lse[0] of a transposed array is wrong in mlx 0.31.2
    return [mx.concatenate(outs), mx.concatenate(lses), *pages]


def _attend(
    q, keys_of: Stored, values_of: Stored, rows: TokenRows, tokens, options: AttentionOptions
):
    """Attention of ``[batch, T, num_q_heads, head_dim]``, where the T tokens have the same pages."""
    scale, cap, alibi_slopes, sinks, mask = options
    num_kv_heads, page_size = keys_of.num_kv_heads, keys_of.page_size
    batch, length, num_q_heads, head_dim = q.shape

    # Contiguous K and V: every slot of every page, with the position of its token.
    offsets = mx.arange(page_size)
    keys = mx.where(offsets < rows.lens[..., None], rows.starts[..., None] + offsets, _NEVER)
    keys = keys.reshape(batch, 1, -1)
    k, v = (_slots(side, rows.pages) for side in (keys_of, values_of))  # [batch, Hkv, N, dim]

    # Scores: scale, cap, ALiBi, mask, in this order. The rows of a KV head are multiplied together.
    by_kv_head = q.astype(mx.float32).swapaxes(1, 2).reshape(batch, num_kv_heads, -1, head_dim)
    scores = scale * _dot(by_kv_head, k.swapaxes(-1, -2))
    scores = scores.reshape(batch, num_q_heads, length, -1)
    if cap is not None:
        scores = cap * mx.tanh(scores / cap)
    if alibi_slopes is not None:
        distance = (keys - rows.position).astype(mx.float32)[:, None]
        scores = scores + alibi_slopes.astype(mx.float32)[:, None, None] * distance
    visible = (keys >= 0) & (keys < rows.end) & (keys > rows.position - rows.window)
    visible = visible[:, None]  # [batch, 1 or heads, T, N]
    if mask is not None:
        mask = _mask(mask, tokens, mx.maximum(keys, 0))
        visible = visible & (mask if mask.dtype == mx.bool_ else mask != -mx.inf)
        if mask.dtype != mx.bool_:
            scores = scores + mask.astype(mx.float32)
    scores = mx.where(visible, scores, -mx.inf)

    # Softmax; the sink takes weight and gives no value.
    highest = scores.max(-1, keepdims=True)
    seen = highest != -mx.inf
    if sinks is not None:
        sinks = sinks.astype(mx.float32)[:, None, None]
        highest = mx.maximum(highest, sinks)
    shift = mx.where(highest == -mx.inf, 0.0, highest)
    weights = mx.where(visible, mx.exp(scores - shift), 0.0)
    total = weights.sum(-1, keepdims=True)
    if sinks is not None:
        total = total + mx.exp(sinks - shift)
    total = mx.where(seen, total, 1.0)
    out = mx.where(seen, _weighted(weights / total, v), 0.0)
    if values_of.is_rotated:
        out = rotate(out)
    lse = mx.where(seen, shift + mx.log(total), -mx.inf).squeeze(-1)
    return out.swapaxes(1, 2).astype(q.dtype), lse.swapaxes(1, 2)


def _slots(side: Stored, table):
    """``[batch, heads, M * page_size, dim]`` in float32: the slots of ``table [batch, M]``."""
    found = side.read(table).swapaxes(1, 2)
    return found.reshape(*found.shape[:2], -1, found.shape[4])


def _dot(a, b):
    """``a @ b``, the inner axis summed in pieces, so that rounding errors stay small."""
    pieces = range(0, a.shape[-1], 128)
    return sum(a[..., i : i + 128] @ b[..., i : i + 128, :] for i in pieces)


def _mask(mask, tokens, columns):
    """A mask's values at the positions ``columns [batch, 1, N]``: ``[batch, heads, T, N]``."""
    mask = mask[None] if mask.ndim == 2 else mask  # [heads or 1, tokens, keys]
    if tokens is None:  # one token for each row of the batch
        mask = mask.swapaxes(0, 1)[:, :, None]
    else:
        mask = mask[None, :, slice(*tokens)]
    columns = mx.minimum(columns, mask.shape[3] - 1)[:, None]
    columns = mx.broadcast_to(columns, (*mask.shape[:3], columns.shape[3]))
    return mx.take_along_axis(mask, columns, axis=3)


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


@on_stream
def merge_states(outs, lses):
    """``(out, lse)`` of the union of parts of a context."""
    checks.parts(outs, lses)
    parts = mx.stack(lses)
    highest = parts.max(0)
    shift = mx.where(highest == -mx.inf, 0.0, highest)
    weights = mx.where(parts == -mx.inf, 0.0, mx.exp(parts - shift))
    total = weights.sum(0)
    lse = mx.where(total == 0, -mx.inf, shift + mx.log(total))
    share = (weights / mx.where(total == 0, 1.0, total))[..., None]
    values = mx.stack([out.astype(mx.float32) for out in outs])
    values = mx.where(share == 0, 0.0, share * values)
    return [values.sum(0).astype(outs[0].dtype), lse]


# Pages


@on_stream
def write_pages(tokens, pages, slot_mapping, *, alias=False, formats=(None, None)):
    """``[*pages']`` with new tokens, ``[k, v]``, in their slots: of the open pages, where there are any."""
    sides = checks.write(*tokens, pages, slot_mapping, formats)
    written = []
    for side, x in zip(sides, tokens):
        x = side.prepared(x)
        if side.opened is not None:
            written.append(_written(x, side.opened, slot_mapping))
        else:
            parts = zip(side.encode_tokens(x), side.arrays)
            written += [_written(part, array, slot_mapping) for part, array in parts]
    return [*pages[: len(pages) - len(written)], *written]


@on_stream
def seal_pages(sources, pages, pairs, *, rotated, formats):
    """The arrays of each layer, with dense pages quantised into them: all layers at once.

    Args:
        sources: ``[k0, v0, k1, v1, ...]``, dense pages ``[n, num_kv_heads, page_size, dim]`` of
            each layer.
        pages: The arrays of each layer.
        pairs: ``int32 [m, 3]``: a page of the sources, where it goes, and how many tokens it has.
        rotated: Whether V of the sources is, where its format rotates.
    """
    source, target, tokens = (pairs[:, i] for i in range(3))
    sealed = []
    for i, arrays in enumerate(pages):
        sides = checks.layer("seal_pages", arrays, formats)
        written = []
        for side, dense in zip(sides, sources[2 * i : 2 * i + 2]):
            x = dense[source] if rotated else side.prepared(dense[source])
            parts = zip(side.encode_pages(x, tokens), side.arrays)
            written += [_put(array, target, part) for part, array in parts]
        sealed.append([*written, *arrays[len(written) :]])
    return sealed


def _written(tokens, pages, slots):
    num_pages, _, page_size, _ = pages.shape
    if is_tracer(slots):  # a page more takes the tokens that go nowhere
        end = num_pages * page_size
        slots = mx.where((slots < 0) | (slots >= end), end, slots)
        longer = mx.concatenate([pages, pages[:1]])
        return _put(longer, (slots // page_size, slice(None), slots % page_size), tokens)[:-1]
    known = np.array(slots)
    kept = np.flatnonzero(known >= 0)
    if not kept.size:
        return pages
    if kept.size < known.size:
        tokens, known = tokens[mx.array(kept)], known[kept]
    pages_of, offsets = (mx.array(part) for part in np.divmod(known, page_size))
    return _put(pages, (pages_of, slice(None), offsets), tokens)


def _put(pages, index, values):
    """The pages with other values at an index: MLX copies all of them unless it alone holds them."""
    global _writes
    _writes += 1
    new = mx.array(pages)
    new[index] = values
    return new


def buffer_copies() -> int:
    """Writes so far, of K and of V each: MLX may have copied the pages for every one of them.

    It does so where somebody else holds the pages when the write runs, and does not say.
    """
    return _writes


@on_stream
def copy_pages(pools, pairs, *, alias=False):
    """The pools with page ``pairs[i, 0]`` copied to page ``pairs[i, 1]``."""
    checks.pools(pools)
    return [_put(pool, pairs[:, 1], pool[pairs[:, 0]]) for pool in pools]


@on_stream
def gather_pages(
    pages, block_tables, context_lens, length, *, page_starts=None, page_lens=None,
    formats=(None, None),
):  # fmt: skip
    """``[k, v, *pages]``, K and V of each sequence made contiguous."""
    sides = checks.layer("gather_pages", pages, formats)
    known = (
        None if array is None else np.array(array)
        for array in (block_tables, context_lens, page_starts, page_lens)
    )  # fmt: skip
    index = columns(length, sides[0].page_size, *known)
    return [*(_taken(side, index) for side in sides), *pages]


def _taken(side: Stored, index):
    """K or V at the slots of ``index``, of as many pages as it names."""
    if side.name is None and side.opened is None:
        return take(side.arrays[0], index)
    named = np.unique(index[index >= 0] // side.page_size)
    place = np.searchsorted(named, index // side.page_size) * side.page_size
    named = named if named.size else np.zeros(1, np.int64)
    return take(side.pages(named), np.where(index >= 0, place + index % side.page_size, -1))


def columns(length, page_size, tables, lens, starts=None, counts=None) -> np.ndarray:
    """The slot that each column of each sequence comes from, ``[batch, length]``; -1: none."""
    index = np.full((len(tables), length), -1, np.int64)
    for b, i in np.argwhere(tables >= 0).tolist():
        start = i * page_size if starts is None else int(starts[b, i])
        count = page_size if counts is None else int(counts[b, i])
        first, last = max(start, 0), min(start + count, int(lens[b]), length)
        if first < last:
            slot = int(tables[b, i]) * page_size + first - start
            index[b, first:last] = np.arange(slot, slot + last - first)
    return index


def take(pages, index):
    """``[batch, heads, length, dim]``: the slots of ``index``, 0 where there is none."""
    pages_of, offsets = (mx.array(part) for part in np.divmod(np.maximum(index, 0), pages.shape[2]))
    found = pages[pages_of, :, offsets]  # [batch, length, heads, dim]
    return mx.where(mx.array(index >= 0)[..., None, None], found, 0).swapaxes(1, 2)


@on_stream
def pool_memory(kept, shape, fill, dtype):
    """New memory for pages: those kept, and pages full of ``fill``."""
    if kept is None:
        return mx.full(shape, mx.array(fill, dtype))
    more = shape[0] - kept.shape[0]
    if more <= 0:
        return kept[mx.arange(shape[0])]
    return mx.concatenate([kept, mx.full((more, *shape[1:]), mx.array(fill, dtype))])


@on_stream
def write_attend(q, k_pages, v_pages, plan, k, v, slots, scale, sinks=None):
    """``(out, k_pages', v_pages')``: k and v go to their slots, then q attends."""
    _calls["WriteAttend"] += 1
    checks.write_attend(q, k, v)

    def by_token(x):
        return x.swapaxes(1, 2).reshape(-1, x.shape[1], x.shape[3])

    if k is not None:
        k, v = (by_token(x).astype(k_pages.dtype) for x in (k, v))
        k_pages, v_pages = write_pages([k, v], [k_pages, v_pages], slots)
    out, *_ = paged_attention(by_token(q), [k_pages, v_pages], plan, scale, sinks=sinks)
    out = out.reshape(q.shape[0], q.shape[2], q.shape[1], -1).swapaxes(1, 2)
    return out, k_pages, v_pages


def route_counts() -> dict[str, dict[str, int]]:
    """How often each attention was built so far; MLX's own operations run it."""
    return {name: {"mlx": count} for name, count in _calls.items()}
