"""The raw operations, after ``mx.fast``: arrays in, arrays out, nothing remembered.

Pages are ``[num_pages, num_kv_heads, page_size, head_dim]``, K and V apart; a quantised side is
``(codes, scales, biases)``.
Tables and lengths are host data: lists, numpy arrays, or mx.arrays; a lazy
mx.array is evaluated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

import mlx.core as mx

from paged_mlx import operations
from paged_mlx.attention_plan import AttentionPlan, PlanOptions, make_plan, runs_kernels
from paged_mlx.errors import check_flag, fail
from paged_mlx.formats.page_format import PageFormats
from paged_mlx.formats.raw_pages import Pages, head_dim_of, layer_of, sides
from paged_mlx.host_arrays import (
    Ints,
    gather_inputs,
    host_ints,
    optional_ints,
    pair_array,
    slot_array,
)
from paged_mlx.options import AttentionOptions, Geometry, check_array, check_stream
from paged_mlx.pages.block_table import PackedTables
from paged_mlx.pages.page_map import NO_PAGE

__all__ = [
    "NO_PAGE",
    "copy_pages",
    "gather_pages",
    "merge_states",
    "paged_attention",
    "plan",
    "write_pages",
]


def __dir__() -> list[str]:
    return __all__


def plan(
    block_tables: Ints,
    context_lens: Ints,
    *,
    num_q_heads: int,
    num_kv_heads: int,
    page_size: int,
    cu_seqlens_q: Ints | None = None,
    causal: bool = True,
    sliding_window: int | None = None,
    page_starts: Ints | None = None,
    page_lens: Ints | None = None,
    num_pages: int | None = None,
    dtype: mx.Dtype = mx.float16,
    head_dim: int = 128,
    v_head_dim: int | None = None,
    k_format: str | None = None,
    v_format: str | None = None,
    share_prefixes: bool = True,
    fixed_partition: int | None = None,
    workers: int | None = None,
    previous: AttentionPlan | None = None,
    stream: mx.Stream | mx.Device | None = None,
) -> AttentionPlan:
    """Cut one step of attention into work items, once for all layers.

    Args:
        block_tables: ``int32 [batch, max_pages]``, padded with ``NO_PAGE``.
        context_lens: ``int32 [batch]``, tokens visible to the last query token,
            this step's included. 0: the sequence is empty, its rows see nothing.
        num_q_heads, num_kv_heads, page_size: Geometry of q and of the pages.
        cu_seqlens_q: ``int32 [batch + 1]``, where each sequence's query tokens
            begin in q. None: one token each.
        causal: A token sees no key behind its own position.
        sliding_window: Keys a token may see, its own included. None: all.
        page_starts, page_lens: ``int32 [batch, max_pages]`` for ragged tables:
            position of each page's first token and the number of its tokens.
        num_pages: Pages of the pool, so that ids outside it are found here.
        dtype, head_dim, v_head_dim: Type and sizes of the pages, for the cost model.
        k_format, v_format: Formats of the pages; see ``paged_attention``.
        share_prefixes: Let sequences that begin with the same pages read them once.
        fixed_partition: Cut at multiples of this many tokens and share nothing, so
            that a sequence's result has the same bits whatever the batch holds.
        workers: Items that can run at once. None: those of the device.
        previous: The plan of the step before; reused when only lengths inside the
            last pages changed.
        stream: Stream or device that the step will run on; any can run the plan, but
            the GPU wants other items than the CPU.

    Raises:
        ValueError: A table, length or id is wrong; the message says why.

    Examples:
        >>> sizes = dict(num_q_heads=8, num_kv_heads=2, page_size=16)
        >>> plan([[0, 1], [2, NO_PAGE]], [20, 9], **sizes).num_tokens
        2
    """
    tables = _packed("plan", block_tables, context_lens, cu_seqlens_q, page_starts, page_lens)
    v_head_dim = head_dim if v_head_dim is None else v_head_dim
    formats = PageFormats(k_format, v_format)
    geometry = Geometry(num_q_heads, num_kv_heads, page_size, head_dim, v_head_dim, dtype, formats)
    pages = -1 if num_pages is None else num_pages
    kernels = runs_kernels(stream)
    options = PlanOptions(
        pages, causal, sliding_window, share_prefixes, fixed_partition, workers, kernels
    )
    geometry.check("plan")
    options.check("plan")
    check_stream("plan", stream)
    return make_plan("plan", tables, geometry, options, previous)


@overload
def paged_attention(
    q: mx.array,
    k_pages: Pages,
    v_pages: Pages,
    block_tables: Ints | None = ...,
    context_lens: Ints | None = ...,
    *,
    scale: float | None = ...,
    cu_seqlens_q: Ints | None = ...,
    causal: bool = ...,
    sliding_window: int | None = ...,
    softcap: float | None = ...,
    alibi_slopes: mx.array | None = ...,
    sinks: mx.array | None = ...,
    mask: mx.array | None = ...,
    page_starts: Ints | None = ...,
    page_lens: Ints | None = ...,
    k_format: str | None = ...,
    v_format: str | None = ...,
    return_lse: Literal[False] = ...,
    plan: AttentionPlan | mx.array | None = ...,
    stream: mx.Stream | mx.Device | None = ...,
) -> mx.array: ...


@overload
def paged_attention(
    q: mx.array,
    k_pages: Pages,
    v_pages: Pages,
    block_tables: Ints | None = ...,
    context_lens: Ints | None = ...,
    *,
    scale: float | None = ...,
    cu_seqlens_q: Ints | None = ...,
    causal: bool = ...,
    sliding_window: int | None = ...,
    softcap: float | None = ...,
    alibi_slopes: mx.array | None = ...,
    sinks: mx.array | None = ...,
    mask: mx.array | None = ...,
    page_starts: Ints | None = ...,
    page_lens: Ints | None = ...,
    k_format: str | None = ...,
    v_format: str | None = ...,
    return_lse: Literal[True],
    plan: AttentionPlan | mx.array | None = ...,
    stream: mx.Stream | mx.Device | None = ...,
) -> tuple[mx.array, mx.array]: ...


def paged_attention(
    q: mx.array,
    k_pages: Pages,
    v_pages: Pages,
    block_tables: Ints | None = None,
    context_lens: Ints | None = None,
    *,
    scale: float | None = None,
    cu_seqlens_q: Ints | None = None,
    causal: bool = True,
    sliding_window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: mx.array | None = None,
    sinks: mx.array | None = None,
    mask: mx.array | None = None,
    page_starts: Ints | None = None,
    page_lens: Ints | None = None,
    k_format: str | None = None,
    v_format: str | None = None,
    return_lse: bool = False,
    plan: AttentionPlan | mx.array | None = None,
    stream: mx.Stream | mx.Device | None = None,
) -> mx.array | tuple[mx.array, mx.array]:
    """Attention that reads K and V through a block table.

    Prefill and decode mix freely in one call. A score is ``scale * q.k``, then
    softcap, then ALiBi, then the mask. Keys that a token cannot see have no influence on a
    bit of its result, were it NaN; a NaN that it sees is in its result.

    Args:
        q: ``[tokens, num_q_heads, head_dim]``, the query tokens of all sequences,
            one after the other. float32, float16 or bfloat16; head_dim a multiple
            of 8 up to 256, or 512.
        k_pages: ``[num_pages, num_kv_heads, page_size, head_dim]``, q's dtype.
        v_pages: ``[num_pages, num_kv_heads, page_size, v_head_dim]``, q's dtype.
            A quantised side is ``(codes, scales, biases)``, as ``mx.quantize`` gives of such
            pages.
        block_tables: ``int32 [batch, max_pages]``, padded with ``NO_PAGE``.
        context_lens: ``int32 [batch]``, tokens visible to a sequence's last query
            token, this step's included; 0 for an empty sequence.
        scale: None: ``head_dim ** -0.5``.
        cu_seqlens_q: ``int32 [batch + 1]``, first query token of each sequence.
            None: decode, one token per sequence.
        causal: A token sees no key behind its own position.
        sliding_window: Keys a token may see, its own included.
        softcap: ``softcap * tanh(score / softcap)``.
        alibi_slopes: ``[num_q_heads]``; adds ``slope * (key - query position)``.
        sinks: ``[num_q_heads]``, logits that take weight and give no value.
        mask: ``[tokens, keys]`` or ``[num_q_heads or 1, tokens, keys]``; column j is
            key position j. bool (True: visible) or additive.
        page_starts, page_lens: ``int32 [batch, max_pages]`` for ragged tables.
        k_format: None, or ``"q8"``: codes of 8 bits, in groups of 64 channels, or of 32 where
            head_dim is no multiple of 64.
        v_format: The same, or ``"q4"``: 4 bits of V that ``write_pages`` has rotated.
        return_lse: Also return the log-sum-exp of the scores, natural log, float32
            ``[tokens, num_q_heads]``, the sink included.
        plan: From ``plan``, or its ``array``; then no table or length is read,
            and ``causal`` and ``sliding_window`` are the plan's.
        stream: Stream or device.

    Returns:
        ``[tokens, num_q_heads, v_head_dim]`` in q's dtype. A token that sees no key
        gets 0 and log-sum-exp -inf.

    Raises:
        ValueError: A shape, dtype, id or length is wrong; the message says why.

    Examples:
        >>> q, pages = mx.ones((1, 4, 64)), mx.ones((2, 2, 16, 64))
        >>> paged_attention(q, pages, pages, [[1, 0]], [20]).shape
        (1, 4, 64)
    """
    op = "paged_attention"
    if return_lse is not False and return_lse is not True:
        return_lse = check_flag(op, "return_lse", return_lse)
    options = AttentionOptions(scale, softcap, alibi_slopes, sinks, mask)
    pages, formats = layer_of(op, k_pages, v_pages, k_format, v_format)
    if plan is None:
        if block_tables is None or context_lens is None:
            fail(op, "block_tables and context_lens must be given, or a plan", "neither")
        tables = _packed(op, block_tables, context_lens, cu_seqlens_q, page_starts, page_lens)
        plan = _own_plan(q, pages, formats, tables, causal, sliding_window, stream)
    elif isinstance(plan, AttentionPlan):
        plan.check_agrees(op, causal, sliding_window)
    made = plan if isinstance(plan, AttentionPlan) else None
    words = plan if made is None else made.array
    out, lse, *_ = operations.paged_attention(
        q, pages, words, *options, stream=stream, plan=made, **formats.told
    )
    return (out, lse) if return_lse else out


def write_pages(
    k: mx.array,
    v: mx.array,
    k_pages: Pages,
    v_pages: Pages,
    slot_mapping: Ints,
    *,
    k_format: str | None = None,
    v_format: str | None = None,
    stream: mx.Stream | mx.Device | None = None,
) -> tuple[Pages, Pages]:
    """Write new tokens' K and V into their slots.

    In place when nobody else holds the pages, else into a copy, as every MLX
    operation; a ``paged_mlx.PagePool`` writes in place always.

    Args:
        k: ``[tokens, num_kv_heads, head_dim]``, the dtype of the pages.
        v: ``[tokens, num_kv_heads, v_head_dim]``.
        k_pages: ``[num_pages, num_kv_heads, page_size, head_dim]``.
        v_pages: ``[num_pages, num_kv_heads, page_size, v_head_dim]``.
        slot_mapping: ``int32 [tokens]``, ``page_id * page_size + offset_in_page``;
            -1 skips the token. No slot twice.
        k_format, v_format: As in ``paged_attention``; the tokens are quantised as they are
            written, and V is rotated first for ``"q4"``.

    Returns:
        The next versions of ``k_pages`` and ``v_pages``.

    Raises:
        ValueError: A shape, dtype or slot is wrong; the message says why.

    Examples:
        >>> pages, k = mx.zeros((2, 2, 16, 64)), mx.ones((1, 2, 64))
        >>> written, _ = write_pages(k, k, pages, pages, [17])
        >>> written[1, 0, 1, 0].item()
        1.0
    """
    pages, formats = layer_of("write_pages", k_pages, v_pages, k_format, v_format)
    slots = slot_array("write_pages", slot_mapping, pages[0])
    written = operations.write_pages([k, v], pages, slots, stream=stream, **formats.told)
    return sides(written, formats)


def copy_pages(
    pools: Sequence[Pages], pairs: Ints, *, stream: mx.Stream | mx.Device | None = None
) -> list[Pages]:
    """Copy whole pages, in every array of ``pools`` in one operation.

    Args:
        pools: Arrays ``[num_pages, num_kv_heads, page_size, head_dim]``, or of quantised pages
            ``(codes, scales, biases)``.
        pairs: ``int32 [n, 2]``, source and target page of each copy. A target is
            named once and is nobody's source.

    Returns:
        The next versions of the arrays.

    Raises:
        ValueError: A shape or page id is wrong; the message says why.

    Examples:
        >>> pages = mx.arange(2).reshape(2, 1, 1, 1) * mx.ones((2, 1, 16, 64))
        >>> copy_pages([pages], [(1, 0)])[0][0].max().item()
        1.0
    """
    flat, widths = [], []
    for i, pool in enumerate(_sequence("copy_pages", "pools", pools)):
        parts = pool if isinstance(pool, (tuple, list)) else (pool,)
        flat += _arrays("copy_pages", f"pools[{i}]" if parts is pool else "pools", parts)
        widths.append(len(parts))
    num_pages = flat[0].shape[0] if flat and flat[0].ndim else 0
    pairs = pair_array("copy_pages", pairs, num_pages)
    copies = iter(operations.copy_pages(flat, pairs, stream=stream))
    return [
        tuple(next(copies) for _ in range(n)) if isinstance(pool, (tuple, list)) else next(copies)  # type: ignore[misc]
        for pool, n in zip(pools, widths)
    ]


def gather_pages(
    k_pages: Pages,
    v_pages: Pages,
    block_tables: Ints,
    context_lens: Ints,
    *,
    page_starts: Ints | None = None,
    page_lens: Ints | None = None,
    k_format: str | None = None,
    v_format: str | None = None,
    stream: mx.Stream | mx.Device | None = None,
) -> tuple[mx.array, mx.array]:
    """K and V of each sequence, contiguous. Paged attention needs no such copy.

    Args:
        k_pages, v_pages, block_tables, context_lens, page_starts, page_lens, k_format,
            v_format: As in ``paged_attention``. Quantised pages are dequantised, and V is rotated
            back.

    Returns:
        k ``[batch, num_kv_heads, longest context, head_dim]`` and v alike; 0 past a
        sequence's context and where its table has ``NO_PAGE``.

    Raises:
        ValueError: A shape, id or length is wrong; the message says why.

    Examples:
        >>> pages = mx.ones((2, 2, 16, 64))
        >>> gather_pages(pages, pages, [[1, 0]], [20])[0].shape
        (1, 2, 20, 64)
    """
    pages, formats = layer_of("gather_pages", k_pages, v_pages, k_format, v_format)
    tables, lens, length, ragged = gather_inputs(
        "gather_pages", pages[0], block_tables, context_lens, page_starts, page_lens
    )
    k, v, *_ = operations.gather_pages(
        pages, tables, lens, length, **ragged, stream=stream, **formats.told
    )
    return k, v


def merge_states(
    outs: Sequence[mx.array],
    lses: Sequence[mx.array],
    *,
    stream: mx.Stream | mx.Device | None = None,
) -> tuple[mx.array, mx.array]:
    """Join attention over disjoint parts of a context by log-sum-exp.

    Args:
        outs: Arrays ``[tokens, num_q_heads, v_head_dim]``, one for each part.
        lses: float32 ``[tokens, num_q_heads]``, natural log; -inf: an empty part.

    Returns:
        out and lse over all parts.

    Raises:
        ValueError: The parts do not agree in number, shape or dtype.

    Examples:
        >>> out, lse = merge_states([mx.ones((1, 4, 64))] * 2, [mx.zeros((1, 4))] * 2)
        >>> round(lse[0, 0].item(), 4)
        0.6931
    """
    parts = _arrays("merge_states", "outs", outs), _arrays("merge_states", "lses", lses)
    return tuple(operations.merge_states(*parts, stream=stream))


def _sequence(op: str, name: str, values) -> list:
    """``values`` as a list, which it must be."""
    if not isinstance(values, (list, tuple)):
        fail(op, f"{name} must be a list of arrays", type(values).__name__)
    return list(values)


def _arrays(op: str, name: str, values: Sequence[mx.array]) -> list[mx.array]:
    """``values`` as a list of arrays, which it must be."""
    values = _sequence(op, name, values)
    for i, value in enumerate(values):
        check_array(op, f"{name}[{i}]", value)
    return list(values)


def _packed(op, block_tables, context_lens, cu_seqlens_q, page_starts, page_lens) -> PackedTables:
    return PackedTables(
        host_ints(op, "block_tables", block_tables),
        host_ints(op, "context_lens", context_lens),
        optional_ints(op, "cu_seqlens_q", cu_seqlens_q),
        optional_ints(op, "page_starts", page_starts),
        optional_ints(op, "page_lens", page_lens),
    )


def _own_plan(
    q: mx.array,
    pages: list[mx.array],
    formats: PageFormats,
    tables: PackedTables,
    causal: bool,
    sliding_window: int | None,
    stream: mx.Stream | mx.Device | None,
) -> AttentionPlan:
    """The plan of one call, for the sizes of its arrays."""
    op = "paged_attention"
    sizes = operations.check_attention(q, pages, **formats.told)
    cu = tables.cu_seqlens_q
    tokens = len(tables.block_tables) if cu is None else cu[-1] if cu.ndim == 1 and cu.size else 0
    if tables.block_tables.ndim == 2 and tokens != sizes["tokens"]:
        source = "one for each sequence" if cu is None else "as many as cu_seqlens_q ends with"
        fail(op, f"q must have {tokens} tokens, {source}", sizes["tokens"])
    geometry = Geometry(
        sizes["num_q_heads"],
        sizes["num_kv_heads"],
        sizes["page_size"],
        q.shape[2],
        head_dim_of(pages[-1 if formats.v is None else -3], formats.v),
        q.dtype,
        formats,
    )
    kernels = runs_kernels(stream)
    options = PlanOptions(sizes["num_pages"], causal, sliding_window, kernels=kernels)
    options.check(op)
    return make_plan(op, tables, geometry, options)
