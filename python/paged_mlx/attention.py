"""Attention over page tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, overload

import mlx.core as mx
import numpy as np

from paged_mlx import fast
from paged_mlx.attention_plan import AttentionPlan
from paged_mlx.errors import check_flag, fail, kind_of
from paged_mlx.host_arrays import Ints, host_ints
from paged_mlx.options import check_array
from paged_mlx.pages.block_table import pack
from paged_mlx.pages.page_map import NO_PAGE
from paged_mlx.pages.table import PageTable
from paged_mlx.pool import PageBlock, PagePool, PoolLayer

_OP = "paged_attention"


@overload
def paged_attention(
    query: mx.array,
    page_tables: Sequence[PageTable],
    page_blocks: PoolLayer | Mapping[int, PageBlock],
    *,
    query_lens: Ints | None = ...,
    scale: float | None = ...,
    causal: bool = ...,
    sliding_window: int | None = ...,
    softcap: float | None = ...,
    alibi_slopes: mx.array | None = ...,
    sinks: mx.array | None = ...,
    mask: mx.array | None = ...,
    return_lse: Literal[False] = ...,
    plan: AttentionPlan | None = ...,
) -> mx.array: ...


@overload
def paged_attention(
    query: mx.array,
    page_tables: Sequence[PageTable],
    page_blocks: PoolLayer | Mapping[int, PageBlock],
    *,
    query_lens: Ints | None = ...,
    scale: float | None = ...,
    causal: bool = ...,
    sliding_window: int | None = ...,
    softcap: float | None = ...,
    alibi_slopes: mx.array | None = ...,
    sinks: mx.array | None = ...,
    mask: mx.array | None = ...,
    return_lse: Literal[True],
    plan: AttentionPlan | None = ...,
) -> tuple[mx.array, mx.array]: ...


def paged_attention(
    query: mx.array,
    page_tables: Sequence[PageTable],
    page_blocks: PoolLayer | Mapping[int, PageBlock],
    *,
    query_lens: Ints | None = None,
    scale: float | None = None,
    causal: bool = True,
    sliding_window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: mx.array | None = None,
    sinks: mx.array | None = None,
    mask: mx.array | None = None,
    return_lse: bool = False,
    plan: AttentionPlan | None = None,
) -> mx.array | tuple[mx.array, mx.array]:
    """Attention of each sequence's newest tokens over its pages.

    Args:
        query: ``[tokens, num_q_heads, head_dim]``, one token for each table, or
            packed with ``query_lens``; or ``[batch, num_q_heads, L, head_dim]``, the
            last L positions of every sequence.
        page_tables: One table for each sequence.
        page_blocks: A layer of a pool (``pool[layer]``), which the kernel reads
            directly, or a dict page_id -> PageBlock, which is stacked first.
        query_lens: ``int32 [batch]``, query tokens of each sequence.
        scale, causal, sliding_window, softcap, alibi_slopes, sinks, mask, return_lse:
            As in ``paged_mlx.fast.paged_attention``.
        plan: From ``pool.plan(page_tables, ...)``. None: the plan that the pool remembers
            of these tables as they are, made when there is none: layers share one.

    Returns:
        The shape of ``query``, with the head_dim of V. Log-sum-exp, if asked for,
        without the last axis.

    Raises:
        ValueError: A shape, length or page does not fit.
        CorruptPage: The pool has a canary, and a slot does not hold what its table says.

    Examples:
        >>> pool = PagePool(1, 8, 16, 2, 64)
        >>> table = PageTable(16)
        >>> k = v = mx.ones((3, 2, 64), mx.float16)
        >>> pool.write(0, k, v, table.append_tokens(3, pool.allocator).slots)
        >>> paged_attention(mx.ones((1, 4, 64), mx.float16), [table], pool[0]).shape
        (1, 4, 64)
    """
    if not isinstance(query, mx.array):
        check_array(_OP, "query", query)
    if return_lse is not False and return_lse is not True:
        return_lse = check_flag(_OP, "return_lse", return_lse)
    if not isinstance(page_tables, (list, tuple)):
        fail(
            _OP,
            "page_tables must be a list of PageTables, one for each sequence",
            _kind(page_tables),
        )
    q, shape = query, query.shape
    if len(shape) == 4:
        q, query_lens = _by_token(query, len(page_tables), query_lens)
    elif query_lens is not None or len(shape) != 3 or shape[0] != len(page_tables):
        query_lens = _check_tokens(query, len(page_tables), query_lens)
    if not isinstance(page_blocks, PoolLayer):
        out, lse = _attend_blocks(
            q, page_tables, page_blocks, query_lens, plan, scale=scale, causal=causal,
            sliding_window=sliding_window, softcap=softcap, alibi_slopes=alibi_slopes,
            sinks=sinks, mask=mask,
        )  # fmt: skip
    else:
        pool = page_blocks.pool
        if plan is None:
            plan = pool.plan_for(_OP, page_tables, shape[1], query_lens, sliding_window, causal)
        elif isinstance(plan, AttentionPlan):
            plan.check_agrees(_OP, causal, sliding_window)
            plan.check_tables(_OP, page_tables)
        if pool.canary is not None:
            pool.canary.read(page_blocks.index, page_tables)
        out, lse = page_blocks.attend(
            q, plan, scale=scale, softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks,
            mask=mask, return_lse=True,
        )  # fmt: skip
    if len(shape) == 4:
        out, lse = _unpack(out, query), _unpack(lse, query)
    return (out, lse) if return_lse else out


def _attend_blocks(
    q, page_tables, page_blocks, query_lens, plan, **options
) -> tuple[mx.array, mx.array]:
    """Attention over pages that are no pool's: stacked first."""
    if isinstance(page_blocks, PagePool):
        fail(_OP, "page_blocks must be one layer of the pool, pool[layer]", "the whole pool")
    if not isinstance(page_blocks, Mapping):
        fail(_OP, "page_blocks must be pool[layer], or a dict of PageBlocks", kind_of(page_blocks))
    if plan is not None:
        fail(_OP, "plan must be None, because PageBlocks have no pool to plan for", kind_of(plan))
    tables = pack(page_tables, query_lens)
    _check_blocks(page_tables, page_blocks)
    k_pages, v_pages, block_tables = _stack(page_blocks, tables.block_tables)
    return fast.paged_attention(
        q, k_pages, v_pages, block_tables, tables.context_lens,
        cu_seqlens_q=tables.cu_seqlens_q, page_starts=tables.page_starts,
        page_lens=tables.page_lens, return_lse=True, **options,
    )  # fmt: skip


def _check_blocks(page_tables: Sequence[PageTable], blocks: Mapping[int, PageBlock]) -> None:
    """Refuse PageBlocks that are none, and those of different shapes."""
    first = None
    for page_id, block in blocks.items():
        if not isinstance(block, PageBlock):
            fail(_OP, f"page_blocks[{page_id}] must be a PageBlock", kind_of(block))
        check_array(_OP, f"page_blocks[{page_id}].key_data", block.key_data)
        check_array(_OP, f"page_blocks[{page_id}].value_data", block.value_data)
        shapes = block.key_data.shape, block.value_data.shape
        first = shapes if first is None else first
        if shapes != first or len(shapes[0]) != 3:
            must = "page_blocks must hold pages of one shape [num_kv_heads, page_size, head_dim]"
            fail(_OP, must, f"{shapes[0]} and {shapes[1]} after {first[0]} and {first[1]}")
    if first is not None and page_tables[0].page_size != first[0][1]:
        must = f"page_tables must have the page_size of the pages, {first[0][1]}"
        fail(_OP, must, page_tables[0].page_size)


def _by_token(query: mx.array, batch: int, query_lens) -> tuple[mx.array, list[int]]:
    """Query tokens one after the other, and how many each sequence has."""
    if query.shape[0] != batch or query_lens is not None:
        must = f"query must have batch = {batch} from page_tables, and no query_lens"
        fail(_OP, must, query.shape)
    _, heads, length, head_dim = query.shape
    return query.swapaxes(1, 2).reshape(batch * length, heads, head_dim), [length] * batch


def _check_tokens(query: mx.array, batch: int, query_lens) -> list[int] | None:
    """query_lens as whole numbers, after checking that query has as many tokens."""
    if query.ndim != 3:
        must = (
            "query must have shape [tokens, num_q_heads, head_dim] or "
            "[batch, num_q_heads, L, head_dim]"
        )
        fail(_OP, must, query.shape)
    if not batch:
        fail(_OP, "page_tables must hold at least one table", "none")
    if query_lens is None:
        if query.shape[0] != batch:
            fail(_OP, f"query must have {batch} tokens, one for each table", query.shape[0])
        return None
    lens = host_ints(_OP, "query_lens", query_lens)
    if lens.shape != (batch,):
        fail(_OP, f"query_lens must have shape [batch], where batch = {batch}", lens.shape)
    if query.shape[0] != lens.sum():
        fail(_OP, f"query must have {lens.sum()} tokens, as query_lens say", query.shape[0])
    return lens.tolist()


def _kind(tables: object) -> str:
    return "one PageTable, not in a list" if isinstance(tables, PageTable) else kind_of(tables)


def _unpack(x: mx.array, query: mx.array) -> mx.array:
    batch, heads, length, _ = query.shape
    return x.reshape(batch, length, heads, *x.shape[2:]).swapaxes(1, 2)


def _stack(blocks: Mapping[int, PageBlock], block_tables: np.ndarray):
    """K and V of the pages that the tables name, and the tables in their numbering."""
    used = np.unique(block_tables[block_tables >= 0])
    missing = [int(page) for page in used if page not in blocks]
    if missing:
        fail(_OP, "page_blocks must hold every page of page_tables", f"no page {missing[0]}")
    if not used.size:
        fail(_OP, "page_tables must hold at least one page", "none")
    renumbered = np.where(block_tables >= 0, np.searchsorted(used, block_tables), NO_PAGE)
    k_pages = mx.stack([blocks[int(page)].key_data for page in used])
    v_pages = mx.stack([blocks[int(page)].value_data for page in used])
    return k_pages, v_pages, renumbered.astype(np.int32)
