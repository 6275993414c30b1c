"""The raw operations, after ``mx.fast``: arrays in, arrays out, nothing remembered.

Pages are ``[num_pages, num_kv_heads, page_size, head_dim]``, K and V apart.
Tables and lengths are host data: lists, numpy arrays, or mx.arrays; a lazy
mx.array is evaluated.
"""

import mlx.core as mx
import numpy as np

from paged_mlx import operations
from paged_mlx._native import _ext
from paged_mlx.attention_plan import AttentionPlan
from paged_mlx.device import runs_kernels
from paged_mlx.errors import fail, whole_number
from paged_mlx.host_ints import host_ints, optional_ints

NO_PAGE = -1
MAX_INT32 = 2**31 - 1


def plan(
    block_tables,
    context_lens,
    *,
    num_q_heads: int,
    num_kv_heads: int,
    page_size: int,
    cu_seqlens_q=None,
    causal: bool = True,
    sliding_window: int | None = None,
    page_starts=None,
    page_lens=None,
    num_pages: int | None = None,
    dtype: mx.Dtype = mx.float16,
    head_dim: int = 128,
    v_head_dim: int | None = None,
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
        dtype, head_dim, v_head_dim: Of the pages; the cost model asks for them.
        share_prefixes: Let sequences that begin with the same pages read them once.
        fixed_partition: Cut at multiples of this many tokens and share nothing, so
            that a sequence's result has the same bits whatever the batch holds.
        workers: Items that can run at once. None: what the device has.
        previous: The plan of the step before; reused when only lengths inside the
            last pages changed.
        stream: Stream or device that the step will run on; any can run the plan, but
            the GPU wants other items than the CPU.

    Raises:
        ValueError: A table, length or id is not what it must be.
    """
    tables = host_ints("plan", "block_tables", block_tables)
    lens = host_ints("plan", "context_lens", context_lens)
    cu = optional_ints("plan", "cu_seqlens_q", cu_seqlens_q)
    options = {
        "num_pages": -1 if num_pages is None else num_pages,
        "num_q_heads": num_q_heads,
        "num_kv_heads": num_kv_heads,
        "page_size": page_size,
        "causal": causal,
        "sliding_window": sliding_window,
        "dtype": dtype,
        "head_dim": head_dim,
        "v_head_dim": v_head_dim or head_dim,
        "kernels": runs_kernels(stream),
        "share_prefixes": share_prefixes,
        "fixed_partition": fixed_partition,
        "workers": workers,
    }
    ragged = page_starts is not None or page_lens is not None
    if isinstance(previous, AttentionPlan) and not ragged and previous.options == options:
        following = previous.advance(tables, lens, cu)
        if following is not None:
            return following
    _check_plan_options(options, previous)
    native = _native_plan("plan", tables, lens, cu, page_starts, page_lens, **options)
    return AttentionPlan(native, options)


def _check_plan_options(options: dict, previous) -> None:
    for name in ("num_q_heads", "num_kv_heads", "page_size", "head_dim", "v_head_dim"):
        _check_int32(name, options[name])
    for name in ("sliding_window", "fixed_partition", "workers"):
        if options[name] is not None:
            _check_int32(name, options[name])
    _check_int32("num_pages", options["num_pages"], minimum=-1)
    for name in ("causal", "share_prefixes"):
        if not isinstance(options[name], bool):
            fail("plan", f"{name} must be True or False", repr(options[name]))
    if options["dtype"] not in (mx.float32, mx.float16, mx.bfloat16):
        fail("plan", "dtype must be float32, float16 or bfloat16", options["dtype"])
    if previous is not None and not isinstance(previous, AttentionPlan):
        fail("plan", "previous must be an AttentionPlan", type(previous).__name__)


def _check_int32(name: str, value, minimum: int = 1) -> None:
    if type(value) is int and minimum <= value <= MAX_INT32:
        return
    if whole_number("plan", name, value, minimum) > MAX_INT32:
        fail("plan", f"{name} must be less than 2**31", value)


def paged_attention(
    q: mx.array,
    k_pages: mx.array,
    v_pages: mx.array,
    block_tables=None,
    context_lens=None,
    *,
    scale: float | None = None,
    cu_seqlens_q=None,
    causal: bool = True,
    sliding_window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: mx.array | None = None,
    sinks: mx.array | None = None,
    mask: mx.array | None = None,
    page_starts=None,
    page_lens=None,
    return_lse: bool = False,
    plan: AttentionPlan | mx.array | None = None,
    stream: mx.Stream | mx.Device | None = None,
) -> mx.array | tuple[mx.array, mx.array]:
    """Attention that reads K and V through a block table.

    Prefill and decode mix freely in one call. A score is ``scale * q.k``, then
    softcap, then ALiBi, then the mask. What a token cannot see has no influence on a
    bit of its result, were it NaN; a NaN that it sees is in its result.

    Args:
        q: ``[tokens, num_q_heads, head_dim]``, the query tokens of all sequences,
            one after the other. float32, float16 or bfloat16; head_dim a multiple
            of 8 up to 256, or 512.
        k_pages: ``[num_pages, num_kv_heads, page_size, head_dim]``, q's dtype.
        v_pages: ``[num_pages, num_kv_heads, page_size, v_head_dim]``, q's dtype.
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
        return_lse: Also return the log-sum-exp of the scores, natural log, float32
            ``[tokens, num_q_heads]``, the sink included.
        plan: From :func:`plan`, or its ``array``; then no table or length is read,
            and ``causal`` and ``sliding_window`` are the plan's.
        stream: Stream or device.

    Returns:
        ``[tokens, num_q_heads, v_head_dim]`` in q's dtype. A token that sees no key
        gets 0 and log-sum-exp -inf.

    Raises:
        ValueError: A shape, dtype, id or length is not what it must be.
    """
    op = "paged_attention"
    if plan is None:
        plan = _own_plan(
            q, k_pages, v_pages, block_tables, context_lens, cu_seqlens_q,
            page_starts, page_lens, causal, sliding_window, stream,
        )  # fmt: skip
    else:
        check_plan_options(op, plan, causal, sliding_window)
    if isinstance(plan, AttentionPlan):
        _ext.check_plan(plan._native, q, k_pages, v_pages, mask)
    out, lse, _, _ = operations.paged_attention(
        q,
        k_pages,
        v_pages,
        plan,
        scale=scale,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        mask=mask,
        stream=stream,
    )
    return (out, lse) if return_lse else out


def write_pages(
    k: mx.array,
    v: mx.array,
    k_pages: mx.array,
    v_pages: mx.array,
    slot_mapping,
    *,
    stream: mx.Stream | mx.Device | None = None,
) -> tuple[mx.array, mx.array]:
    """Write new tokens' K and V into their slots.

    In place when nobody else holds the pages, else into a copy, as every MLX
    operation; a :class:`~paged_mlx.PagePool` writes in place always.

    Args:
        k: ``[tokens, num_kv_heads, head_dim]``, the dtype of the pages.
        v: ``[tokens, num_kv_heads, v_head_dim]``.
        k_pages: ``[num_pages, num_kv_heads, page_size, head_dim]``.
        v_pages: ``[num_pages, num_kv_heads, page_size, v_head_dim]``.
        slot_mapping: ``int32 [tokens]``, ``page_id * page_size + offset_in_page``;
            -1 skips the token. No slot twice.

    Returns:
        The next versions of ``k_pages`` and ``v_pages``.

    Raises:
        ValueError: A shape, dtype or slot is not what it must be.
    """
    slots = slot_array("write_pages", slot_mapping, k_pages)
    return tuple(operations.write_pages(k, v, k_pages, v_pages, slots, stream=stream))


def copy_pages(
    pools: list[mx.array], pairs, *, stream: mx.Stream | mx.Device | None = None
) -> list[mx.array]:
    """Copy whole pages, in every array of ``pools`` in one operation.

    Args:
        pools: Arrays ``[num_pages, num_kv_heads, page_size, head_dim]``.
        pairs: ``int32 [n, 2]``, source and target page of each copy. A target is
            named once and is nobody's source.

    Returns:
        The next versions of the arrays.

    Raises:
        ValueError: A shape or page id is not what it must be.
    """
    num_pages = pools[0].shape[0] if pools and pools[0].ndim else 0
    return operations.copy_pages(
        list(pools), pair_array("copy_pages", pairs, num_pages), stream=stream
    )


def gather_pages(
    k_pages: mx.array,
    v_pages: mx.array,
    block_tables,
    context_lens,
    *,
    page_starts=None,
    page_lens=None,
    stream: mx.Stream | mx.Device | None = None,
) -> tuple[mx.array, mx.array]:
    """K and V of each sequence, contiguous: what paged attention makes unnecessary.

    Args:
        k_pages, v_pages, block_tables, context_lens, page_starts, page_lens: As in
            :func:`paged_attention`.

    Returns:
        k ``[batch, num_kv_heads, longest context, head_dim]`` and v alike; 0 past a
        sequence's context and where its table has ``NO_PAGE``.

    Raises:
        ValueError: A shape, id or length is not what it must be.
    """
    arrays = gather_inputs(
        "gather_pages", k_pages, block_tables, context_lens, page_starts, page_lens
    )
    k, v, _, _ = operations.gather_pages(k_pages, v_pages, **arrays, stream=stream)
    return k, v


def merge_states(
    outs: list[mx.array], lses: list[mx.array], *, stream: mx.Stream | mx.Device | None = None
) -> tuple[mx.array, mx.array]:
    """Join attention over disjoint parts of a context by log-sum-exp.

    Args:
        outs: Arrays ``[tokens, num_q_heads, v_head_dim]``, one for each part.
        lses: float32 ``[tokens, num_q_heads]``, natural log; -inf: an empty part.

    Returns:
        out and lse over all parts.

    Raises:
        ValueError: The parts do not agree in number, shape or dtype.
    """
    return tuple(operations.merge_states(list(outs), list(lses), stream=stream))


def slot_array(op: str, slot_mapping, k_pages: mx.array) -> mx.array:
    """``slot_mapping`` as int32, checked where its values are known."""
    if isinstance(slot_mapping, mx.array) and _ext.is_tracer(slot_mapping):
        return slot_mapping
    slots = host_ints(op, "slot_mapping", slot_mapping)
    if slots.ndim != 1:
        fail(op, "slot_mapping must have shape [tokens]", slots.shape)
    if k_pages.ndim == 4 and slots.size:
        num_slots = k_pages.shape[0] * k_pages.shape[2]
        if slots.max() >= num_slots:
            must = f"slot_mapping must be less than num_pages * page_size = {num_slots}"
            fail(op, must, slots.max())
        if slots.min() < -1:
            fail(op, "slot_mapping must be a slot, or -1 to skip the token", slots.min())
        used = np.sort(slots[slots >= 0])
        repeated = used[1:][used[1:] == used[:-1]]
        if repeated.size:
            fail(op, "slot_mapping must name each slot at most once", f"{repeated[0]} twice")
    return mx.array(slots)


def pair_array(op: str, pairs, num_pages: int) -> mx.array:
    """Page pairs as int32 ``[n, 2]``, checked: no chain, no target twice."""
    pairs = host_ints(op, "pairs", pairs)
    if pairs.size == 0:
        return mx.zeros((0, 2), mx.int32)
    if pairs.ndim != 2 or pairs.shape[1] != 2:
        fail(op, "pairs must have shape [n, 2]", pairs.shape)
    if pairs.min() < 0 or pairs.max() >= num_pages:
        worst = pairs.min() if pairs.min() < 0 else pairs.max()
        fail(op, f"pairs must hold page ids in [0, {num_pages}), the pages of the pool", worst)
    targets = set(pairs[:, 1].tolist())
    if len(targets) < len(pairs):
        fail(op, "pairs must name each target once", f"{len(pairs) - len(targets)} repeats")
    chained = targets.intersection(pairs[:, 0].tolist())
    if chained:
        fail(op, "pairs must not use a page as source and as target", f"page {min(chained)}")
    return mx.array(pairs)


def gather_inputs(op, k_pages, block_tables, context_lens, page_starts, page_lens) -> dict:
    """Checked arrays for the native gather."""
    if k_pages.ndim != 4 or 0 in k_pages.shape:
        must = (
            "k_pages must have shape [num_pages, num_kv_heads, page_size, head_dim], none of them 0"
        )
        fail(op, must, k_pages.shape)
    arrays = {
        "block_tables": host_ints(op, "block_tables", block_tables),
        "context_lens": host_ints(op, "context_lens", context_lens),
        "page_starts": optional_ints(op, "page_starts", page_starts),
        "page_lens": optional_ints(op, "page_lens", page_lens),
    }
    num_pages, _, page_size, _ = k_pages.shape
    _ext.check_tables(op=op, **arrays, num_pages=num_pages, page_size=page_size)
    length = int(arrays["context_lens"].max())
    return {name: mx.array(a) for name, a in arrays.items() if a is not None} | {"length": length}


def check_plan_options(op: str, plan, causal: bool, sliding_window: int | None) -> None:
    """A plan has its own causality and window; what is asked for must be left out or agree."""
    if not isinstance(plan, AttentionPlan):
        return
    if not causal and plan.causal:
        fail(op, "causal must be what the plan was made for (True)", causal)
    if sliding_window is not None and sliding_window != plan.sliding_window:
        must = f"sliding_window must be what the plan was made for ({plan.sliding_window})"
        fail(op, must, sliding_window)


def _own_plan(
    q, k_pages, v_pages, block_tables, context_lens, cu_seqlens_q,
    page_starts, page_lens, causal, sliding_window, stream,
):  # fmt: skip
    op = "paged_attention"
    if block_tables is None or context_lens is None:
        fail(op, "block_tables and context_lens must be given, or a plan", "neither")
    geometry = _ext.attention_geometry(q, k_pages, v_pages)
    tables = host_ints(op, "block_tables", block_tables)
    cu = optional_ints(op, "cu_seqlens_q", cu_seqlens_q)
    tokens = len(tables) if cu is None else cu[-1] if cu.ndim == 1 and cu.size else 0
    if tables.ndim == 2 and tokens != geometry["tokens"]:
        source = "one for each sequence" if cu is None else "as many as cu_seqlens_q ends with"
        fail(op, f"q must have {tokens} tokens, {source}", geometry["tokens"])
    options = {
        "num_pages": geometry["num_pages"],
        "num_q_heads": geometry["num_q_heads"],
        "num_kv_heads": geometry["num_kv_heads"],
        "page_size": geometry["page_size"],
        "causal": causal,
        "sliding_window": sliding_window,
        "dtype": q.dtype,
        "head_dim": q.shape[2],
        "v_head_dim": v_pages.shape[3],
        "kernels": runs_kernels(stream),
    }
    lens = host_ints(op, "context_lens", context_lens)
    native = _native_plan(op, tables, lens, cu, page_starts, page_lens, **options)
    return AttentionPlan(native, options)


def _native_plan(
    op,
    tables,
    lens,
    cu,
    page_starts,
    page_lens,
    *,
    sliding_window,
    share_prefixes=True,
    fixed_partition=None,
    workers=None,
    **geometry,
):
    for name, value in (("sliding_window", sliding_window), ("fixed_partition", fixed_partition)):
        if value is not None and value < 1:
            fail(op, f"{name} must be at least 1, or None", value)
    return _ext.NativePlan(
        op=op,
        block_tables=tables,
        context_lens=lens,
        cu_seqlens_q=cu,
        page_starts=optional_ints(op, "page_starts", page_starts),
        page_lens=optional_ints(op, "page_lens", page_lens),
        sliding_window=sliding_window or 0,
        share_prefixes=share_prefixes,
        fixed_partition=fixed_partition or 0,
        workers=workers or 0,
        **geometry,
    )
