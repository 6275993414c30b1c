"""The operations from MLX's own: what the native module computes, in plain formulas.

Used where there is no native module for the mlx that is installed, and read by whoever wants to
know what an operation means. Every function has the name, arguments and result of the native
module's. Slower, and with more memory: K and V of a sequence are gathered, scores of all its
keys are kept, and a write copies the pages wherever MLX must keep the old ones.

A plan is a header of integers (a mark, tokens, query heads, KV heads, page size), and a row for each
query token,

    position, keys behind (row_end), window, page ids [M], page starts [M], page lengths [M]

so that attention under ``mx.compile``, which cannot read it, can compute with it.
"""

from __future__ import annotations

from collections import Counter
from itertools import groupby
from types import SimpleNamespace

import mlx.core as mx
import numpy as np

from paged_mlx.errors import fail
from paged_mlx.options import AttentionOptions, has_kernel

_calls: Counter[str] = Counter()  # of each operation, named as the native module names it
_NEVER = -(2**30)  # the position of a slot that holds no token
_MARK = 0x706C616E  # what a plan begins with
_HEADER = 5
_FIELDS = 3  # of a plan's row, before the pages


# Attention


def paged_attention(
    q, pages, plan, scale=None, cap=None, alibi_slopes=None, sinks=None, mask=None, *,
    formats=(None, None), stream=None,
):  # fmt: skip
    """``[out, lse, *pages]`` of one step."""
    _calls["PagedAttention"] += 1
    geometry = attention_geometry(q, pages, formats)
    k_pages, v_pages = pages
    options = _options("paged_attention", q, scale, cap, alibi_slopes, sinks, mask)
    with mx.stream(stream or mx.default_device()):
        traced = is_tracer(plan)
        if not traced:
            _check_plan(np.array(plan), geometry)
        rows = plan[_HEADER:].reshape(q.shape[0], -1)
        if traced:  # every token gathers for itself
            out, lse = _attend(q[:, None], k_pages, v_pages, rows[:, None], None, options)
            return [out[:, 0], lse[:, 0], k_pages, v_pages]
        known = np.array(rows)
        _check_rows(known, k_pages, mask)
        outs, lses = [], []
        for first, last in _sequences(known):
            part = rows[first:last][None]
            out, lse = _attend(q[first:last][None], k_pages, v_pages, part, (first, last), options)
            outs.append(out[0])
            lses.append(lse[0])
        empty = mx.zeros((0, q.shape[1], v_pages.shape[3]), q.dtype), mx.zeros((0, q.shape[1]))
        out, lse = (
            mx.concatenate(parts) if parts else none for parts, none in zip((outs, lses), empty)
        )
        return [out, lse, k_pages, v_pages]


def _attend(q, k_pages, v_pages, rows, tokens, options):
    """Attention of ``[batch, T, num_q_heads, head_dim]``, the pages of a row's first token each."""
    num_kv_heads, page_size = k_pages.shape[1:3]
    batch, length, num_q_heads, _ = q.shape
    width = (rows.shape[2] - _FIELDS) // 3
    position, end, window = (rows[..., i, None] for i in range(_FIELDS))
    pages, starts, lens = (rows[:, 0, _FIELDS + i * width :][:, :width] for i in range(3))

    # Contiguous K and V: every slot of every page, with the position of its token.
    offsets = mx.arange(page_size)
    keys = mx.where(offsets < lens[..., None], starts[..., None] + offsets, _NEVER)
    keys = keys.reshape(batch, 1, -1)
    k, v = (_slots(array, pages) for array in (k_pages, v_pages))  # [batch, Hkv, N, D]

    # Scores: scale, cap, ALiBi, mask, in this order.
    grouped = q.astype(mx.float32).reshape(batch, length, num_kv_heads, -1, q.shape[3])
    grouped = grouped.transpose(0, 2, 3, 1, 4)  # [batch, Hkv, G, T, D]
    scores = options.scale * _dot(grouped, k[:, :, None].swapaxes(-1, -2))
    scores = scores.reshape(batch, num_q_heads, length, -1)
    if options.cap is not None:
        scores = options.cap * mx.tanh(scores / options.cap)
    if options.alibi_slopes is not None:
        distance = (keys - position).astype(mx.float32)[:, None]
        scores = scores + options.alibi_slopes.astype(mx.float32)[:, None, None] * distance
    visible = (keys >= 0) & (keys < end) & (keys > position - window)
    visible = visible[:, None]  # [batch, 1 or heads, T, N]
    if options.mask is not None:
        columns = mx.maximum(keys, 0)
        mask = _mask(options.mask, tokens, columns, batch)
        if mask.dtype == mx.bool_:
            visible = visible & mask
        else:
            visible = visible & (mask != -mx.inf)
            scores = scores + mask.astype(mx.float32)
    visible = mx.broadcast_to(visible, scores.shape)
    scores = mx.where(visible, scores, -mx.inf)

    # Softmax; the sink takes weight and gives no value.
    highest = scores.max(-1, keepdims=True)
    seen = highest != -mx.inf
    sinks = options.sinks
    if sinks is not None:
        sinks = sinks.astype(mx.float32)[:, None, None]
        highest = mx.maximum(highest, sinks)
    shift = mx.where(highest == -mx.inf, 0.0, highest)
    weights = mx.where(visible, mx.exp(scores - shift), 0.0)
    total = weights.sum(-1, keepdims=True)
    if sinks is not None:
        total = total + mx.exp(sinks - shift)
    total = mx.where(seen, total, 1.0)
    out = _weighted(weights / total, v, visible)
    out = mx.where(seen, out, 0.0).swapaxes(1, 2)
    lse = mx.where(seen, shift + mx.log(total), -mx.inf)[..., 0].swapaxes(1, 2)
    return out.astype(q.dtype), lse


def _dot(a, b):
    """``a @ b``, the inner axis summed in pieces, so that rounding errors stay small."""
    pieces = range(0, a.shape[-1], 32)
    return sum(a[..., i : i + 32] @ b[..., i : i + 32, :] for i in pieces)


def _slots(array, pages):
    """``[batch, heads, M * page_size, dim]`` in float32: the slots of ``pages [batch, M]``."""
    found = array[mx.clip(pages, 0, array.shape[0] - 1)].astype(
        mx.float32
    )  # [batch, M, heads, page_size, dim]
    found = found.swapaxes(1, 2)
    return found.reshape(*found.shape[:2], -1, found.shape[4])


def _weighted(weights, v, visible):
    """``weights @ v`` per group of heads; what a row does not see adds nothing, were it NaN."""
    shape = (*v.shape[:2], -1, *weights.shape[2:])
    weights_of = weights.reshape(shape)
    sees = (visible & (weights != 0)).astype(mx.float32).reshape(shape)
    out = weights_of @ mx.where(mx.isfinite(v), v, 0.0)[:, :, None]
    for odd, value in ((v == mx.inf, mx.inf), (v == -mx.inf, -mx.inf), (mx.isnan(v), mx.nan)):
        met = sees @ odd.astype(mx.float32)[:, :, None] > 0
        out = out + mx.where(met, value, 0.0)
    return out.reshape(*weights.shape[:3], v.shape[3])


def _mask(mask, tokens, columns, batch):
    """A mask's values at the positions ``columns [batch, 1, N]``: ``[batch, heads, T, N]``."""
    mask = mask[None] if mask.ndim == 2 else mask  # [heads or 1, tokens, keys]
    if tokens is None:  # one token for each row of the batch
        mask = mask.swapaxes(0, 1)[:, :, None]
    else:
        mask = mask[None, :, slice(*tokens)]
    columns = mx.minimum(columns, mask.shape[3] - 1)[:, None]
    columns = mx.broadcast_to(columns, (*mask.shape[:3], columns.shape[3]))
    return mx.take_along_axis(mask, columns, axis=3)


def _options(op, q, scale, cap, alibi_slopes, sinks, mask):
    AttentionOptions(scale, cap, alibi_slopes, sinks, mask).check(op)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    for name, value, least in zip(
        AttentionOptions._fields, (scale, cap), ("", " and greater than 0")
    ):
        if value is not None and (not np.isfinite(value) or (least and value <= 0)):
            fail(op, f"{name} must be finite{least}", value)
    for name, value in (("alibi_slopes", alibi_slopes), ("sinks", sinks)):
        if value is not None:
            if value.shape != (q.shape[1],):
                must = f"must have shape [num_q_heads], where num_q_heads = {q.shape[1]} from q"
                fail(op, f"{name} {must}", value.shape)
            _check_float(op, name, value)
    if mask is not None:
        if mask.dtype != mx.bool_:
            _check_float(op, "mask (unless bool)", mask)
        shape = mask.shape[-3:] if mask.ndim == 3 else (1, *mask.shape)
        if len(shape) != 3 or shape[0] not in (1, q.shape[1]) or shape[1] != q.shape[0]:
            must = "mask must have shape [tokens, keys] or [num_q_heads or 1, tokens, keys], where "
            fail(op, f"{must}tokens = {q.shape[0]} from q", mask.shape)
    return SimpleNamespace(scale=scale, cap=cap, alibi_slopes=alibi_slopes, sinks=sinks, mask=mask)


def _check_plan(words, geometry) -> None:
    op = "paged_attention"
    if words.ndim != 1 or words.dtype != np.int32 or words.size < _HEADER or words[0] != _MARK:
        fail(op, "plan must be the array of an AttentionPlan", "other words")
    names = ("tokens of q", "num_q_heads of q", "num_kv_heads of k_pages", "page_size of k_pages")
    for name, planned in zip(names, words[1:_HEADER].tolist()):
        field, _, array = name.partition(" of ")
        if planned != geometry[field]:
            fail(op, f"plan must be made for {field} = {geometry[field]} of {array}", planned)


def _check_rows(rows, k_pages, mask) -> None:
    pages = rows[:, _FIELDS:][:, : (rows.shape[1] - _FIELDS) // 3]
    if pages.size and pages.max() >= k_pages.shape[0]:
        must = f"block_tables must hold page ids in [0, {k_pages.shape[0]}), the pages of the pool"
        fail("paged_attention", must, int(pages.max()))
    if mask is not None and rows.size and rows[:, 1].max() > mask.shape[-1]:
        must = f"mask must have a column for each key of the longest context ({rows[:, 1].max()})"
        fail("paged_attention", must, mask.shape[-1])


def _sequences(rows):
    """``[first, last)`` of the tokens that have the same pages, one sequence after the other."""
    first = 0
    for _, same in groupby(rows[:, _FIELDS:], key=lambda row: row.tobytes()):
        last = first + len(list(same))
        yield first, last
        first = last


def merge_states(outs, lses, *, stream=None):
    """``(out, lse)`` of the union of parts of a context."""
    _check_parts(outs, lses)
    with mx.stream(stream or mx.default_device()):
        parts = mx.stack([lse.astype(mx.float32) for lse in lses])
        highest = parts.max(0)
        shift = mx.where(highest == -mx.inf, 0.0, highest)
        weights = mx.where(parts == -mx.inf, 0.0, mx.exp(parts - shift))
        total = weights.sum(0)
        lse = mx.where(total == 0, -mx.inf, shift + mx.log(total))
        share = weights / mx.where(total == 0, 1.0, total)
        values = mx.stack([out.astype(mx.float32) for out in outs])
        values = mx.where(share[..., None] == 0, 0.0, share[..., None] * values)
        return [values.sum(0).astype(outs[0].dtype), lse]


def _check_parts(outs, lses) -> None:
    op, shape = "merge_states", _Shapes("merge_states")
    if not outs or len(outs) != len(lses):
        got = f"{len(outs)} outs and {len(lses)} lses"
        fail(op, "outs and lses must hold one array for each part, at least one", got)
    for out in outs:
        shape("outs", out, "tokens", "num_q_heads", "v_head_dim")
        _check_float(op, "outs", out)
        _check_dtype(op, "outs", out, outs[0].dtype, "the dtype of the first")
    for lse in lses:
        shape("lses", lse, "tokens", "num_q_heads")
        _check_dtype(op, "lses", lse, mx.float32, "as merging needs")


# Pages


def write_pages(
    tokens, pages, slot_mapping, *, alias=False, formats=(None, None), stream=None
):  # fmt: skip
    """``[*pages']`` with new tokens, ``[k, v]``, in their slots."""
    (k, v), (k_pages, v_pages) = tokens, pages
    _check_write(k, v, k_pages, v_pages, slot_mapping)
    with mx.stream(stream or mx.default_device()):
        return [_scatter(k, k_pages, slot_mapping), _scatter(v, v_pages, slot_mapping)]


def _scatter(tokens, pages, slots):
    num_pages, heads, page_size, dim = pages.shape
    if is_tracer(slots):  # a page more takes the tokens that go nowhere
        longer = mx.concatenate([pages, pages[:1]])
        end = num_pages * page_size
        slots = mx.where((slots < 0) | (slots >= end), end, slots)
        longer[slots // page_size, :, slots % page_size] = tokens
        return longer[:num_pages]
    known = np.array(slots)
    kept = np.flatnonzero(known >= 0)
    if not kept.size:
        return pages
    if kept.size < known.size:
        tokens, known = tokens[mx.array(kept)], known[kept]
    pages = mx.array(pages)
    pages[mx.array(known // page_size), :, mx.array(known % page_size)] = tokens
    return pages


def _check_write(k, v, k_pages, v_pages, slots) -> None:
    op, shape = "write_pages", _Shapes("write_pages")
    _check_pages(op, shape, k_pages, v_pages)
    shape("k", k, "tokens", "num_kv_heads", "head_dim")
    shape("v", v, "tokens", "num_kv_heads", "v_head_dim")
    shape("slot_mapping", slots, "tokens")
    _check_dtype(op, "k", k, k_pages.dtype, "the dtype of k_pages")
    _check_dtype(op, "v", v, v_pages.dtype, "the dtype of v_pages")


def copy_pages(pools, pairs, *, alias=False, stream=None):
    """The pools with page ``pairs[i, 0]`` copied to page ``pairs[i, 1]``."""
    with mx.stream(stream or mx.default_device()):
        copied = []
        for pool in pools:
            if pool.ndim != 4 or pool.shape[0] != pools[0].shape[0]:
                must = "pools must have shape [num_pages, num_kv_heads, page_size, head_dim]"
                fail("copy_pages", f"{must}, all with as many pages", pool.shape)
            new = mx.array(pool)
            new[pairs[:, 1]] = pool[pairs[:, 0]]
            copied.append(new)
        return copied


def gather_pages(
    pages, block_tables, context_lens, length, *, page_starts=None, page_lens=None,
    formats=(None, None), stream=None,
):  # fmt: skip
    """``[k, v, *pages]``, K and V of each sequence made contiguous."""
    k_pages, v_pages = pages
    _check_pages("gather_pages", _Shapes("gather_pages"), k_pages, v_pages)
    with mx.stream(stream or mx.default_device()):
        tables, lens = np.array(block_tables), np.array(context_lens)
        starts, counts = (
            None if part is None else np.array(part) for part in (page_starts, page_lens)
        )
        index = _columns(tables, lens, length, k_pages.shape[2], starts, counts)
        return [_take(k_pages, index), _take(v_pages, index), k_pages, v_pages]


def _columns(tables, lens, length, page_size, starts=None, counts=None) -> np.ndarray:
    """The slot that each column of each sequence comes from, ``[batch, length]``; -1: none."""
    batch, width = tables.shape
    index = np.full((batch, length), -1, np.int64)
    for b in range(batch):
        for i in range(width):
            start = i * page_size if starts is None else int(starts[b, i])
            count = page_size if counts is None else int(counts[b, i])
            first, last = max(start, 0), min(start + count, int(lens[b]), length)
            if tables[b, i] >= 0 and first < last:
                slot = int(tables[b, i]) * page_size + first - start
                index[b, first:last] = np.arange(slot, slot + last - first)
    return index


def _take(pages, index):
    """``[batch, heads, length, dim]``: the slots of ``index``, 0 where there is none."""
    page_size = pages.shape[2]
    at = mx.array(np.maximum(index, 0))
    found = pages[at // page_size, :, at % page_size]  # [batch, length, heads, dim]
    return mx.where(mx.array(index >= 0)[..., None, None], found, 0).swapaxes(1, 2)


def pool_memory(kept, shape, fill, dtype, *, stream=None):
    """New memory for pages: those kept, and pages full of ``fill``."""
    with mx.stream(stream or mx.default_device()):
        if kept is None:
            return mx.full(shape, fill, dtype)
        more = shape[0] - kept.shape[0]
        if more <= 0:
            return kept[mx.arange(shape[0])]
        return mx.concatenate([kept, mx.full((more, *shape[1:]), fill, dtype)])


# Plans


class NativePlan:
    """One step's tables, a row for each query token; ``words`` has them as items too.

    There is one item for each sequence, and nothing is shared or merged.
    """

    def __init__(
        self, *, op, block_tables, context_lens, cu_seqlens_q, page_starts, page_lens, num_pages,
        num_q_heads, num_kv_heads, page_size, causal, sliding_window, dtype, head_dim, v_head_dim,
        share_prefixes, fixed_partition, workers, cores=0, kernels=False,
    ):  # fmt: skip
        step = _Step(
            op, block_tables, context_lens, cu_seqlens_q, page_starts, page_lens, page_size
        )
        step.check(num_pages, sliding_window)
        width = step.tables.shape[1]
        header = [_MARK, step.num_tokens, num_q_heads, num_kv_heads, page_size]
        rows = np.zeros((step.num_tokens, _FIELDS + 3 * width), np.int32)
        items, self._pages = [], []
        for b in range(step.batch):
            first, last = step.tokens(b)
            context_len = int(step.lens[b])
            positions = np.arange(context_len - (last - first), context_len)
            part = rows[first:last]
            part[:, 0] = positions
            part[:, 1] = positions + 1 if causal and context_len else context_len
            part[:, 2] = sliding_window or 2**30
            starts, lens = step.entries(b)
            begin = (
                max(0, positions[0] + 1 - sliding_window) if sliding_window and last > first else 0
            )
            seen = (starts < context_len) & (starts + lens > begin) & (step.tables[b] >= 0)
            pages = np.where(seen, step.tables[b], -1)  # ids behind the context mean nothing
            for i, values in enumerate((pages, starts, np.where(seen, lens, 0))):
                part[:, _FIELDS + i * width :][:, :width] = values
            if last > first:
                items.append((first, last, int(begin), context_len))
                self._pages.append(pages[seen])
        self._array = mx.array(np.concatenate([np.array(header, np.int32), rows.reshape(-1)]))
        self._items = items
        self._header = {
            "num_tokens": step.num_tokens,
            "num_items": [0, len(items), 0],
            "num_q_heads": num_q_heads,
            "num_kv_heads": num_kv_heads,
            "page_size": page_size,
            "causal": int(causal),
            "sliding_window": sliding_window,
            "num_partials": 0,
            "num_merges": 0,
            "max_page_id": max(
                (int(pages.max()) for pages in self._pages if pages.size), default=-1
            ),
            "max_row_end": int(step.lens.max()),
            "page_starts": 0,
        }

    def array(self) -> mx.array:
        """Header and rows, ``int32 [words]``."""
        return self._array

    def advance(self, **step):
        """None: a plan costs little here."""
        return None

    def header(self) -> dict:
        return self._header

    def decisions(self) -> list:
        return []

    def measured(self) -> bool:
        return False

    def fresh_prompt(self) -> bool:
        return False

    def most_tokens(self) -> tuple[int, int, int]:
        return 0, max((last - first for first, last, *_ in self._items), default=0), 0

    def items(self) -> list[dict]:
        """As ``AttentionPlan.items``."""
        return [
            {
                "kind": "tile",
                "tokens": list(range(first, last)),
                "pages": pages.tolist(),
                "keys": (begin, end),
                "partial": None,
            }
            for (first, last, begin, end), pages in zip(self._items, self._pages)
        ]


class _Step:
    """A step's tables and lengths, and what must hold of them."""

    def __init__(
        self, op, block_tables, context_lens, cu_seqlens_q, page_starts, page_lens, page_size
    ):
        self.op, self.page_size = op, page_size
        self.tables, self.lens, self.cu = block_tables, context_lens, cu_seqlens_q
        self.starts, self.page_lens = page_starts, page_lens
        for name, array, dims in (
            ("block_tables", block_tables, "batch, max_pages"),
            ("context_lens", context_lens, "batch"),
            ("cu_seqlens_q", cu_seqlens_q, "batch + 1"),
            ("page_starts", page_starts, "batch, max_pages"),
            ("page_lens", page_lens, "batch, max_pages"),
        ):
            if array is not None and array.ndim != dims.count(",") + 1:
                fail(op, f"{name} must have shape [{dims}]", f"{array.ndim} dimensions")
        self.batch = len(block_tables)
        if not self.batch:
            fail(op, "block_tables must have at least one sequence", "batch = 0")
        if (page_starts is None) != (page_lens is None):
            fail(op, "page_starts and page_lens must be given together", "one of them")
        self._match("context_lens", context_lens, 0, self.batch, "batch")
        self._match("cu_seqlens_q", cu_seqlens_q, 0, self.batch + 1, "batch + 1")
        for name, array in (("page_starts", page_starts), ("page_lens", page_lens)):
            self._match(name, array, 0, self.batch, "batch")
            self._match(name, array, 1, block_tables.shape[1], "max_pages")
        self.num_tokens = self.batch if cu_seqlens_q is None else max(0, int(cu_seqlens_q[-1]))

    def _match(self, name, array, axis, size, dim) -> None:
        if array is not None and array.shape[axis] != size:
            fail(self.op, f"{name} must match {dim} = {size} of block_tables", array.shape[axis])

    def tokens(self, b: int) -> tuple[int, int]:
        """The query tokens ``[first, last)`` of a sequence."""
        return (b, b + 1) if self.cu is None else (int(self.cu[b]), int(self.cu[b + 1]))

    def entries(self, b: int) -> tuple[np.ndarray, np.ndarray]:
        """Position of each page's first token, and its tokens."""
        if self.starts is not None:
            return self.starts[b], self.page_lens[b]
        width = self.tables.shape[1]
        return np.arange(width) * self.page_size, np.full(width, self.page_size)

    def check(self, num_pages: int, sliding_window: int = 0, allow_no_page: bool = False) -> None:
        """Refuse tables that do not hold what the lengths say."""
        if self.cu is not None:
            if self.cu[0]:
                fail(self.op, "cu_seqlens_q must start with 0", self.cu[0])
            falls = np.flatnonzero(np.diff(self.cu.astype(np.int64)) < 0)
            if falls.size:
                b = int(falls[0])
                got = f"{self.cu[b]} before {self.cu[b + 1]} at sequence {b}"
                fail(self.op, "cu_seqlens_q must not decrease", got)
        for b in range(self.batch):
            self._check_sequence(b, num_pages, sliding_window, allow_no_page)

    def _check_sequence(self, b, num_pages, sliding_window, allow_no_page) -> None:
        first, last = self.tokens(b)
        context_len, query_len = int(self.lens[b]), last - first
        if context_len < 0:
            fail(self.op, "context_lens must be at least 0", f"{context_len} for sequence {b}")
        if query_len and context_len > 2**31 - 1 - self.page_size:
            must = "context_lens must be at most 2^31 - 1 - page_size"
            fail(self.op, must, f"{context_len} for sequence {b}")
        if 0 < context_len < query_len:
            must = (
                "the query must not be longer than its context, which includes it "
                f"(context_lens[{b}] = {context_len})"
            )
            fail(self.op, must, f"{query_len} query tokens")
        if not context_len or not query_len:
            return
        first_key = max(0, context_len - query_len + 1 - sliding_window) if sliding_window else 0
        starts, lens = self.entries(b)
        if self.starts is not None:
            self._check_ragged(b, first_key, starts, lens)
        elif len(starts) * self.page_size < context_len:
            self._not_covered(b, len(starts) * self.page_size)
        for i in np.flatnonzero((starts < context_len) & (starts + lens > first_key)):
            page = int(self.tables[b, i])
            if page == -1:
                if not allow_no_page:
                    self._not_covered(b, int(starts[i]))
            elif page < 0 or (num_pages >= 0 and page >= num_pages):
                ids = "that are not negative"
                if num_pages >= 0:
                    ids = f"in [0, {num_pages}), the pages of the pool"
                fail(self.op, f"block_tables must hold page ids {ids}", f"{page} at [{b}, {i}]")

    def _check_ragged(self, b, first_key, starts, lens) -> None:
        end = None
        for i, (start, count) in enumerate(zip(starts.tolist(), lens.tolist())):
            if end is not None and end >= self.lens[b]:
                break
            if not 0 <= count <= self.page_size:
                must = f"page_lens must be in [0, page_size = {self.page_size}]"
                fail(self.op, must, f"{count} at [{b}, {i}]")
            if end is not None and start != end:
                must = f"page_starts must continue where the entry before ends ({end})"
                fail(self.op, must, f"{start} at [{b}, {i}]")
            if end is None and not 0 <= start <= first_key:
                must = (
                    "page_starts must begin at or before the first key that a token sees "
                    f"({first_key})"
                )
                fail(self.op, must, f"{start} for sequence {b}")
            end = start + count
        if end is None or end < self.lens[b]:
            self._not_covered(b, end or 0)

    def _not_covered(self, b, covered) -> None:
        must = (
            f"context_lens must be covered by the pages of block_tables (sequence {b} has "
            f"{covered} tokens' worth)"
        )
        fail(self.op, must, self.lens[b])


def check_tables(op, block_tables, context_lens, page_starts, page_lens, num_pages, page_size):
    """Refuse tables that do not cover the whole contexts; NO_PAGE is allowed."""
    step = _Step(op, block_tables, context_lens, None, page_starts, page_lens, page_size)
    step.check(num_pages, allow_no_page=True)


def attention_geometry(q, pages, formats=(None, None)) -> dict[str, int]:
    """Heads, page size and counts, after checking shapes and dtypes."""
    k_pages, v_pages = pages
    op, shape = "paged_attention", _Shapes("paged_attention")
    shape("q", q, "tokens", "num_q_heads", "head_dim")
    _check_float(op, "q", q)
    _check_pages(op, shape, k_pages, v_pages)
    for name, array in (("k_pages", k_pages), ("v_pages", v_pages)):
        _check_dtype(op, name, array, q.dtype, "the dtype of q")
    if not k_pages.shape[2]:
        fail(op, "k_pages must have a page_size of at least 1", 0)
    for name, dim in (("q", q.shape[2]), ("v_pages", v_pages.shape[3])):
        if not has_kernel(dim):
            must = f"{name} must have a head_dim that is a multiple of 8 up to 256, or 512"
            fail(op, must, dim)
    num_kv_heads = k_pages.shape[1]
    if not num_kv_heads or q.shape[1] % num_kv_heads:
        must = f"num_q_heads of q must be a multiple of num_kv_heads = {num_kv_heads} from k_pages"
        fail(op, must, q.shape[1])
    return {
        "tokens": q.shape[0],
        "num_q_heads": q.shape[1],
        "num_kv_heads": num_kv_heads,
        "page_size": k_pages.shape[2],
        "num_pages": k_pages.shape[0],
    }


class _Shapes:
    """Checks shapes by the names of their axes: a name has one size in a call."""

    def __init__(self, op: str):
        self.op = op
        self.known: dict[str, int] = {}

    def __call__(self, name, array, *dims):
        _check_array(self.op, name, array)
        known = {dim: self.known[dim] for dim in dims if dim in self.known}
        sizes = dict(zip(dims, array.shape))
        if array.ndim != len(dims) or any(sizes[dim] != size for dim, (size, _) in known.items()):
            where = " and ".join(f"{dim} = {size} from {of}" for dim, (size, of) in known.items())
            must = f"{name} must have shape [{', '.join(dims)}]" + (where and f", where {where}")
            fail(self.op, must, array.shape)
        self.known |= {dim: (sizes[dim], name) for dim in dims if dim not in known}


def _check_pages(op, shape, k_pages, v_pages) -> None:
    shape("k_pages", k_pages, "num_pages", "num_kv_heads", "page_size", "head_dim")
    shape("v_pages", v_pages, "num_pages", "num_kv_heads", "page_size", "v_head_dim")
    if op != "paged_attention":  # which compares them with q
        _check_float(op, "k_pages", k_pages)
        _check_dtype(op, "v_pages", v_pages, k_pages.dtype, "the dtype of k_pages")


def _check_array(op, name, array) -> None:
    if not isinstance(array, mx.array):
        fail(op, f"{name} must be an mx.array", type(array).__name__)


def _check_float(op, name, array) -> None:
    if array.dtype not in (mx.float32, mx.float16, mx.bfloat16):
        fail(op, f"{name} must be float32, float16 or bfloat16", _named(array.dtype))


def _check_dtype(op, name, array, dtype, why) -> None:
    if array.dtype != dtype:
        fail(op, f"{name} must be {_named(dtype)}, {why}", _named(array.dtype))


def _named(dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


# K and V for models that attend by themselves


class GatheredKV:
    """Never made here: MLX's own attention reads the gathered arrays."""


class FetchTables:
    """Where a step's K and V lie, for all layers: the slot of each column, and of each new token."""

    def __init__(
        self, block_tables, starts, counts, num_tokens, written, num_freed, page_size, length, skip,
        page_starts, page_lens,
    ):  # fmt: skip
        batch, width = block_tables.shape
        tables = block_tables[:, num_freed:]
        new_column = length - num_tokens
        positions = (num_freed + np.arange(width - num_freed)) * page_size
        first = positions[None] if page_starts is None else page_starts[:, num_freed:]
        shift = (new_column - starts)[:, None]
        given = np.full(batch, num_tokens) if counts is None else counts
        lens = new_column + (given if written else 0) + np.zeros(batch, np.int64)
        page_lens = None if page_lens is None else page_lens[:, num_freed:]
        columns = np.broadcast_to(first + shift, tables.shape)
        full = np.full(tables.shape, page_size) if page_lens is None else page_lens
        self.index = _columns(tables, lens, length, page_size, columns, full)[:, skip:]
        self.num_tokens = 0 if written else num_tokens
        self.new = [(b, new_column - skip, int(given[b])) for b in range(batch)]
        self.ragged = False


class Fetches:
    """Gathers of old versions: MLX keeps those that a gather still needs."""

    def fetch(self, layer, source, tables, k_pages, v_pages, k=None, v=None, stream=None):
        """``(k, v, new_k, new_v)``: K and V of all sequences, and the tokens, or None."""
        with mx.stream(stream or mx.default_device()):
            made = []
            for pages, tokens in ((k_pages, k), (v_pages, v)):
                whole = _take(pages, tables.index)
                if tokens is not None:
                    for b, column, count in tables.new:
                        rows = tokens[b, :, :count].astype(pages.dtype)
                        whole[b, :, column : column + count] = rows
                    whole = whole.astype(tokens.dtype)
                made.append(whole)
            copies = (None if tokens is None else mx.array(tokens) for tokens in (k, v))
            return (*made, *copies)

    def read_pages(self) -> bool:
        return False

    def are_alive(self) -> bool:
        return False

    def clear(self) -> None:
        pass

    def settle(self, state) -> None:
        pass


def source_of(k, v):
    """None: no array stands for pages here."""


def descriptor(a) -> int:
    return id(a)


def write_attend(q, k_pages, v_pages, plan, k, v, slots, scale, sinks=None, stream=None):
    """``(out, k_pages', v_pages')``: k and v go to their slots, then q attends."""
    _calls["WriteAttend"] += 1
    op, shape = "write_attend", _Shapes("write_attend")
    shape("q", q, "batch", "num_q_heads", "length", "head_dim")

    def by_token(name, a, dim):
        shape(name, a, "batch", "num_kv_heads", "length", dim)
        _check_float(op, name, a)
        a = a.astype(k_pages.dtype)
        return a.swapaxes(1, 2).reshape(-1, a.shape[1], a.shape[3])

    if k is not None:
        k, v = by_token("k", k, "head_dim"), by_token("v", v, "v_head_dim")
        k_pages, v_pages = write_pages([k, v], [k_pages, v_pages], slots, stream=stream)
    tokens = q.swapaxes(1, 2).reshape(-1, q.shape[1], q.shape[3])
    pages = [k_pages, v_pages]
    out, *_ = paged_attention(tokens, pages, plan, scale, None, None, sinks, stream=stream)
    out = out.reshape(q.shape[0], q.shape[2], q.shape[1], -1).swapaxes(1, 2)
    return out, k_pages, v_pages


# What the native module says of arrays and of the machine


def data_address(a) -> int:
    """0: arrays have no address that can be asked for."""
    return 0


def is_tracer(a) -> bool:
    """Whether an array of integers, a plan or slots, is traced; of others MLX does not tell."""
    if not mx.issubdtype(a.dtype, mx.integer):
        return False
    try:
        mx.eval(a)
    except (ValueError, RuntimeError):
        return True
    return False


def is_stale(a) -> bool:
    return False


def is_pending(a) -> bool:
    return False


def route_counts() -> dict[str, dict[str, int]]:
    """How often each attention was built so far; MLX's own operations run it."""
    return {name: {"mlx": count} for name, count in _calls.items()}


def buffer_copies() -> int:
    """0: MLX copies when it must, and does not say so."""
    return 0


def attention_body(rows, head_dim, v_head_dim, dtype) -> tuple[str, int]:
    return "gather", rows


def has_host_launch() -> bool:
    return False


def set_host_launch(launch, spared=-1) -> None:
    """Nothing is ever dispatched here."""


def pipeline_limits() -> dict[str, int]:
    return {}


def gpu_cores() -> int:
    return 0


def num_threads() -> int:
    """1: MLX decides by itself."""
    return 1


def set_num_threads(n: int) -> None:
    pass


def isa() -> str:
    return "MLX's own operations"


def isa_names() -> list[str]:
    return []


def set_isa(name: str) -> bool:
    return False


def plan_thresholds(kernels: bool, itemsize: int) -> tuple[dict[str, int], bool]:
    """None: a plan cuts nothing here."""
    return {}, False


def set_plan_thresholds(kernels: bool, itemsize: int, measured: dict[str, int]) -> None:
    pass
