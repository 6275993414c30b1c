"""Attention over page tables."""

import mlx.core as mx
import numpy as np

from paged_mlx import fast
from paged_mlx.errors import fail
from paged_mlx.host_ints import host_ints
from paged_mlx.pages.block_table import pack
from paged_mlx.pages.table import PageTable
from paged_mlx.pool import PageBlock, PoolLayer

_OP = "paged_attention"


def paged_attention(
    query: mx.array,
    page_tables: list[PageTable],
    page_blocks: "PoolLayer | dict[int, PageBlock]",
    *,
    query_lens=None,
    scale: float | None = None,
    causal: bool = True,
    sliding_window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: mx.array | None = None,
    sinks: mx.array | None = None,
    mask: mx.array | None = None,
    return_lse: bool = False,
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
            As in :func:`paged_mlx.fast.paged_attention`.

    Returns:
        The shape of ``query``, with the head_dim of V. Log-sum-exp, if asked for,
        without the last axis.

    Raises:
        ValueError: A shape, length or page does not fit.
        CorruptPage: The pool has a canary, and a slot does not hold what its table says.
    """
    if not page_tables:
        fail(_OP, "page_tables must hold at least one table", "none")
    q, cu_seqlens_q = _pack_query(query, len(page_tables), query_lens)
    _check_pages(page_tables, page_blocks)
    tables = pack(page_tables)
    options = {
        "scale": scale,
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
        "sinks": sinks,
        "mask": mask,
        "return_lse": True,
    }
    step = {
        "cu_seqlens_q": cu_seqlens_q,
        "causal": causal,
        "sliding_window": sliding_window,
        "page_starts": tables.page_starts,
        "page_lens": tables.page_lens,
    }
    if isinstance(page_blocks, PoolLayer):
        if page_blocks.pool.canary is not None:
            page_blocks.pool.canary.read(page_blocks.index, page_tables)
        out, lse = _attend_pool(q, tables, page_blocks, step, options)
    else:
        k_pages, v_pages, block_tables = _stack(page_blocks, tables.block_tables)
        out, lse = fast.paged_attention(
            q, k_pages, v_pages, block_tables, tables.context_lens, **step, **options
        )
    if query.ndim == 4:
        out, lse = _unpack(out, query), _unpack(lse, query)
    return (out, lse) if return_lse else out


def _check_pages(page_tables: list[PageTable], page_blocks) -> None:
    """Refuse pages of another size or of another allocator than the tables'."""
    if isinstance(page_blocks, PoolLayer):
        page_size, owner = page_blocks.pool.page_size, page_blocks.pool.allocator
    elif page_blocks:
        page_size, owner = next(iter(page_blocks.values())).key_data.shape[1], None
    else:
        return  # no page is there, which is told later
    for table in page_tables:
        if table.page_size != page_size:
            must = f"page_tables must have the page_size of the pages, {page_size}"
            fail(_OP, must, table.page_size)
        if None not in (owner, table.allocator) and table.allocator is not owner:
            must = "page_tables must hold pages of the allocator that the pool belongs to"
            fail(_OP, must, "a table of another")


def _pack_query(query: mx.array, batch: int, query_lens) -> tuple[mx.array, np.ndarray | None]:
    """Query tokens one after the other, and where each sequence's begin."""
    if query.ndim == 4:
        if query.shape[0] != batch or query_lens is not None:
            must = f"query must have batch = {batch} from page_tables, and no query_lens"
            fail(_OP, must, query.shape)
        _, heads, length, head_dim = query.shape
        q = query.swapaxes(1, 2).reshape(batch * length, heads, head_dim)
        return q, np.arange(batch + 1, dtype=np.int32) * length
    if query.ndim != 3:
        must = (
            "query must have shape [tokens, num_q_heads, head_dim] or "
            "[batch, num_q_heads, L, head_dim]"
        )
        fail(_OP, must, query.shape)
    if query_lens is None:
        if query.shape[0] != batch:
            fail(_OP, f"query must have {batch} tokens, one for each table", query.shape[0])
        return query, None
    lens = host_ints(_OP, "query_lens", query_lens)
    if lens.shape != (batch,):
        fail(_OP, f"query_lens must have shape [batch], where batch = {batch}", lens.shape)
    if query.shape[0] != lens.sum():
        fail(_OP, f"query must have {lens.sum()} tokens, as query_lens say", query.shape[0])
    return query, np.concatenate([[0], np.cumsum(lens)]).astype(np.int32)


def _unpack(x: mx.array, query: mx.array) -> mx.array:
    batch, heads, length, _ = query.shape
    return x.reshape(batch, length, heads, *x.shape[2:]).swapaxes(1, 2)


def _attend_pool(q, tables, layer: PoolLayer, step: dict, options: dict):
    pool = layer.pool
    plan = fast.plan(
        tables.block_tables,
        tables.context_lens,
        num_q_heads=q.shape[1],
        num_kv_heads=pool.num_kv_heads,
        page_size=pool.page_size,
        num_pages=pool.num_pages,
        dtype=pool.dtype,
        head_dim=pool.head_dim,
        v_head_dim=pool.v_head_dim,
        stream=pool.stream,
        **step,
    )
    return layer.attend(q, plan, **options)


def _stack(blocks: dict[int, PageBlock], block_tables: np.ndarray):
    """K and V of the pages that the tables name, and the tables in their numbering."""
    used = np.unique(block_tables[block_tables >= 0])
    missing = [int(page) for page in used if page not in blocks]
    if missing:
        fail(_OP, "page_blocks must hold every page of page_tables", f"no page {missing[0]}")
    if not used.size:
        fail(_OP, "page_tables must hold at least one page", "none")
    renumbered = np.where(block_tables >= 0, np.searchsorted(used, block_tables), fast.NO_PAGE)
    k_pages = mx.stack([blocks[int(page)].key_data for page in used])
    v_pages = mx.stack([blocks[int(page)].value_data for page in used])
    return k_pages, v_pages, renumbered.astype(np.int32)
