"""One page of one layer, and a layer as a mapping of its pages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import mlx.core as mx

if TYPE_CHECKING:
    from paged_mlx.pool import PagePool


class PageBlock:
    """One page of one layer: a view of a pool, or arrays of its own.

    Args:
        page_id: The page.
        tokens_stored: Tokens in the page.
        max_tokens: Tokens that fit, the page size.
        ref_count: Sequences that hold the page.
        key_data: ``[num_kv_heads, max_tokens, head_dim]``.
        value_data: ``[num_kv_heads, max_tokens, v_head_dim]``.
    """

    def __init__(self, page_id, tokens_stored, max_tokens, ref_count, key_data, value_data):
        self.page_id = page_id
        self.tokens_stored = tokens_stored
        self.max_tokens = max_tokens
        self.ref_count = ref_count
        self._data = (key_data, value_data)

    @property
    def key_data(self) -> mx.array:
        return self._data[0]

    @property
    def value_data(self) -> mx.array:
        return self._data[1]

    def __repr__(self):
        return (
            f"{type(self).__name__}(page_id={self.page_id}, tokens_stored={self.tokens_stored}, "
            f"max_tokens={self.max_tokens}, ref_count={self.ref_count})"
        )


class PoolPageBlock(PageBlock):
    """A page of a pool; its data is gathered when it is asked for."""

    def __init__(self, layer: LayerPages, page_id: int):
        self._layer = layer
        self.page_id = page_id
        self.max_tokens = layer.pool.page_size

    tokens_stored = property(lambda self: int(self._layer.pool.tokens_stored[self.page_id]))

    @property
    def ref_count(self) -> int:
        allocator = self._layer.pool.allocator
        return allocator.ref_count(self.page_id) if allocator is not None else 1

    @property
    def _data(self):
        pool, layer = self._layer.pool, self._layer.index
        k, v = pool.gather(layer, [[self.page_id]], [pool.page_size])
        return k[0], v[0]


class LayerPages(Mapping):
    """The pages of one layer of a pool: a mapping page_id -> PageBlock.

    :func:`paged_mlx.paged_attention` reads the layer's arrays directly.
    """

    def __init__(self, pool: PagePool, index: int):
        self.pool = pool
        self.index = index

    def __getitem__(self, page_id: int) -> PageBlock:
        if not 0 <= page_id < self.pool.num_pages:
            raise KeyError(page_id)
        return PoolPageBlock(self, int(page_id))

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.pool.num_pages))

    def __len__(self) -> int:
        return self.pool.num_pages
