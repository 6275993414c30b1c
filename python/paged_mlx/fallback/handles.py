"""K and V for models of mlx-lm: gathered arrays, which MLX's own attention reads."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from paged_mlx.fallback.checks import not_traced
from paged_mlx.fallback.formulas import slots_of_positions, taken
from paged_mlx.fallback.operations import on_stream


class GatheredKV:
    """Never made here: no array stands for pages."""


def source_of(k, v):
    """None: no array stands for pages here."""


class FetchTables:
    """Where a step's K and V lie, for all layers: the slot of each column, and of each new token."""

    ragged = False

    def __init__(
        self, block_tables, starts, counts, num_tokens, written, num_freed, page_size, length, skip,
        page_starts, page_lens,
    ):  # fmt: skip
        batch, width = block_tables.shape
        column = length - num_tokens  # of the first new token
        given = np.full(batch, num_tokens) if counts is None else counts
        if page_starts is None:
            page_starts = np.broadcast_to(np.arange(width) * page_size, block_tables.shape)
            page_lens = np.full(block_tables.shape, page_size)
        shifted = page_starts + (column - starts)[:, None]
        tables, *spans = (array[:, num_freed:] for array in (block_tables, shifted, page_lens))
        lens = np.full(batch, column) + (given if written else 0)
        self.slots = slots_of_positions(length, page_size, tables, lens, *spans)[:, skip:]
        self.new = [(b, column - skip, int(given[b])) for b in range(batch)]


class Fetches:
    """Gathers of old versions: MLX keeps those that a gather still needs."""

    @on_stream
    def fetch(self, layer, source, tables, k_pages, v_pages, k=None, v=None):
        """``(k, v, new_k, new_v)``: K and V of all sequences, and the tokens, or None."""
        made = []
        for name, pages, tokens in (("k", k_pages, k), ("v", v_pages, v)):
            whole = taken(pages, tables.slots)
            if tokens is not None:
                not_traced("fetch_pages", name, tokens)
                for b, column, count in tables.new:
                    rows = tokens[b, :, :count].astype(pages.dtype)
                    whole[b, :, column : column + count] = rows
                whole = whole.astype(tokens.dtype)
            made.append(whole)
        copies = (None if tokens is None else mx.array(tokens) for tokens in (k, v))
        return (*made, *copies)

    def read_pages(self) -> bool:
        return False

    def clear(self) -> None:
        pass

    def settle(self, state) -> None:
        pass
