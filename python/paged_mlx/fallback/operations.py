"""The native module's operations, name for name, by the formulas; what is counted and checked."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from functools import wraps

import mlx.core as mx
import numpy as np

import paged_mlx.fallback.checks as checks
import paged_mlx.fallback.formulas as formulas
from paged_mlx.fallback.plan import TokenRows
from paged_mlx.fallback.traces import is_tracer
from paged_mlx.formats.rotation import rotate
from paged_mlx.formats.stored import Stored, stored
from paged_mlx.options import AttentionOptions

_calls: Counter[str] = Counter()  # of each attention, named as the native module names it


def on_stream(operation):
    """Let an operation take a stream or a device."""

    @wraps(operation)
    def placed(*arguments, stream=None, **options):
        with nullcontext() if stream is None else mx.stream(stream):
            return operation(*arguments, **options)

    return placed


@on_stream
def paged_attention(
    q, pages, plan, scale=None, cap=None, alibi_slopes=None, sinks=None, mask=None, *,
    formats=(None, None),
):  # fmt: skip
    """``[out, lse, *pages]`` of one step."""
    _calls["PagedAttention"] += 1
    geometry = checks.attention_geometry(q, pages, formats)
    sides = stored(pages, formats)
    options = AttentionOptions(scale, cap, alibi_slopes, sinks, mask)
    checks.options("paged_attention", q, options)
    if is_tracer(plan):  # its values are not known: every token gathers for itself
        rows = TokenRows.of(plan, q.shape[0])
        masks = None if mask is None else _heads_first(mask).swapaxes(0, 1)[:, :, None]
        out, lse = _attend(q[:, None], *sides, rows, options.with_mask(masks))
        return [out.squeeze(1), lse.squeeze(1), *pages]
    rows = checks.plan(np.array(plan), geometry, mask)
    outs = [mx.zeros((0, q.shape[1], sides[1].dim), q.dtype)]
    lses = [mx.zeros((0, q.shape[1]))]
    for first, last in rows.sequences():
        part = TokenRows(mx.array(rows.words[first:last].swapaxes(0, 1)))
        masks = None if mask is None else _heads_first(mask)[None, :, first:last]
        out, lse = _attend(q[first:last][None], *sides, part, options.with_mask(masks))
        outs.append(out.squeeze(0))
        lses.append(lse.squeeze(0))  # lse[0] of a transposed array is wrong in mlx 0.31.2
    return [mx.concatenate(outs), mx.concatenate(lses), *pages]


def _heads_first(mask):
    return mask[None] if mask.ndim == 2 else mask  # [heads or 1, tokens, keys]


def _attend(q, k: Stored, v: Stored, rows: TokenRows, options: AttentionOptions):
    """Attention of ``[batch, T, num_q_heads, head_dim]``, where the T tokens have the same pages."""
    keys = formulas.key_positions(rows.starts, rows.lens, k.page_size)
    if options.mask is not None:  # by key position, as the public API takes it: by slot
        last = options.mask.shape[3] - 1
        columns = mx.clip(keys, 0, last)[:, None]
        columns = mx.broadcast_to(columns, (*options.mask.shape[:3], keys.shape[2]))
        options = options.with_mask(mx.take_along_axis(options.mask, columns, axis=3))
    visible = formulas.is_visible(keys, rows.position, rows.end, rows.window)
    joined_k, joined_v = (formulas.joined(side.read(rows.pages)) for side in (k, v))
    distance, by_head = keys - rows.position, q.swapaxes(1, 2)
    out, lse = formulas.attention(by_head, joined_k, joined_v, distance, visible, options)
    out = rotate(out) if v.is_rotated else out
    return out.swapaxes(1, 2).astype(q.dtype), lse.swapaxes(1, 2)


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


@on_stream
def merge_states(outs, lses):
    """``[out, lse]`` of the union of parts of a context."""
    checks.parts(outs, lses)
    return list(formulas.merged(outs, lses))


@on_stream
def write_pages(tokens, pages, slot_mapping, *, alias=False, formats=(None, None)):
    """``[*pages']`` with new tokens, ``[k, v]``, in their slots: of the open pages, where there are any."""
    sides = checks.write(*tokens, pages, slot_mapping, formats)
    write, slots = formulas.written_while_traced, slot_mapping
    if not is_tracer(slot_mapping):
        write, slots = formulas.written, np.array(slot_mapping)
    new = []
    for side, x in zip(sides, tokens):
        x = side.prepared(x)
        whole = side.opened is not None
        parts = [(x, side.opened)] if whole else zip(side.encode_tokens(x), side.arrays)
        new += [write(array, slots, part) for part, array in parts]
    return [*pages[: len(pages) - len(new)], *new]


@on_stream
def seal_pages(sources, pages, pairs, formats, *, rotated=True):
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
        new = []
        for side, dense in zip(checks.layer("seal_pages", arrays, formats), sources[2 * i :]):
            x = dense[source] if rotated else side.prepared(dense[source])
            parts = zip(side.encode_pages(x, tokens), side.arrays)
            new += [formulas.put(array, target, part) for part, array in parts]
        sealed.append([*new, *arrays[len(new) :]])
    return sealed


def buffer_copies() -> int:
    """Writes so far, of each array: MLX may have copied the pages for every one of them.

    It does so where somebody else holds the pages when the write runs, and does not say.
    """
    return formulas.num_puts


@on_stream
def copy_pages(pools, pairs, *, alias=False):
    """The pools with page ``pairs[i, 0]`` copied to page ``pairs[i, 1]``."""
    checks.pools(pools)
    return [formulas.copied(pool, pairs) for pool in pools]


@on_stream
def gather_pages(
    pages, block_tables, context_lens, length, *, page_starts=None, page_lens=None,
    formats=(None, None),
):  # fmt: skip
    """``[k, v, *pages]``, K and V of each sequence made contiguous."""
    sides = checks.layer("gather_pages", pages, formats)
    given = block_tables, context_lens, page_starts, page_lens
    known = (None if array is None else np.array(array) for array in given)
    slots = formulas.slots_of_positions(length, sides[0].page_size, *known)
    return [*(_taken(side, slots) for side in sides), *pages]


def _taken(side: Stored, slots):
    """K or V at some slots, of as many pages as they are in."""
    if side.name is None and side.opened is None:
        return formulas.taken(side.arrays[0], slots)
    named = np.unique(slots[slots >= 0] // side.page_size)
    place = np.searchsorted(named, slots // side.page_size) * side.page_size
    named = named if named.size else np.zeros(1, np.int64)
    place = np.where(slots >= 0, place + slots % side.page_size, -1)
    return formulas.taken(side.pages(named), place)


@on_stream
def pool_memory(kept, shape, fill, dtype, *, most_pages=0):
    """New memory for pages: those kept, and pages full of ``fill``."""
    if kept is None:
        return mx.full(shape, mx.array(fill, dtype))
    more = shape[0] - kept.shape[0]
    if more <= 0:
        return kept[mx.arange(shape[0])]
    return mx.concatenate([kept, mx.full((more, *shape[1:]), mx.array(fill, dtype))])
