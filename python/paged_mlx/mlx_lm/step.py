"""One forward pass of a batch: pages taken once, used by every layer of a group."""

import mlx.core as mx
import numpy as np

from paged_mlx import fast


class Step:
    """What a forward pass adds to its sequences.

    It names the sequences and does not hold them: pages are free as soon as no cache is left.

    Attributes:
        names: The sequences' names.
        starts: ``int32 [batch]``, tokens before the pass.
        counts: ``int32 [batch]``, tokens that the pass adds, padding left out.
        ends: ``int32 [batch]``, tokens after it.
        num_tokens: Tokens of a row of the input, padding included.
        served: Layers that have written their K and V.
        packed: Page tables of the batch, ``PackedTables``.
        shifts: ``int32 [batch]``, columns by which a gather of this step moves each row to the
            right, so that all rows' new tokens stand in the same columns, as in mlx-lm's batches.
        first_column: Columns at the front that it leaves out: every row gave those pages back.
        num_columns: Columns that it returns.
        route: What the attention hook has decided for the layers so far.
    """

    def __init__(
        self, names, starts, counts, num_tokens, slots, packed, num_freed, page_size, before
    ):
        self.names = names
        self.starts = starts
        self.counts = counts
        self.ends = starts + counts
        self.num_tokens = num_tokens
        self.served: set[int] = set()
        self.packed = packed
        self._num_freed = num_freed
        self.first_column = num_freed * page_size
        self.shifts = starts.max() - starts
        self.num_columns = int(starts.max()) + num_tokens - self.first_column
        self.padded = bool((counts != num_tokens).any())
        self._slots = slots
        self._slot_mapping = None
        self._gather = None
        self._plans = {}
        self.route = None
        self._before = before
        self._rows_of_tokens = None

    @property
    def batch(self) -> int:
        return len(self.names)

    def joins(self, layer, names, starts, num_tokens) -> bool:
        """Whether a layer that sees these rows takes part in this pass."""
        return (
            layer not in self.served
            and self.num_tokens == num_tokens
            and self.names == names
            and (self.starts is starts or np.array_equal(self.starts, starts))
        )

    def slot_mapping(self, pool):
        """Where each token of ``[batch * num_tokens]`` goes; padding is skipped."""
        if self._slot_mapping is None:
            slots = self._slots
            if self.padded:
                slots = np.full(self.batch * self.num_tokens, -1, np.int32)
                slots[self._real_tokens()] = self._slots
            self._slot_mapping = pool.slots(slots)
        return self._slot_mapping

    def _real_tokens(self) -> np.ndarray:
        """Indices of the tokens that are not padding, in ``[batch * num_tokens]``."""
        tokens = np.arange(self.num_tokens, dtype=np.int32)
        return np.flatnonzero(tokens < self.counts[:, None]).astype(np.int32)

    def packing(self) -> tuple[mx.array, mx.array]:
        """Indices that leave padding out, and those that put it back.

        A padded position gets the first token's output: finite, and read by nobody.
        """
        if self._rows_of_tokens is None:
            real = self._real_tokens()
            back = np.zeros(self.batch * self.num_tokens, np.int32)
            back[real] = np.arange(len(real), dtype=np.int32)
            self._rows_of_tokens = (mx.array(real), mx.array(back))
        return self._rows_of_tokens

    def plan(self, pool, num_q_heads: int, window: int | None):
        """The attention plan for layers of this shape, made once and advanced if it can be."""
        key = (num_q_heads, pool.num_kv_heads, pool.num_pages, window, pool.dtype)
        if key not in self._plans:
            one_each = self.num_tokens == 1 and not self.padded
            self._plans[key] = fast.plan(
                self.packed.block_tables,
                self.ends,
                num_q_heads=num_q_heads,
                num_kv_heads=pool.num_kv_heads,
                page_size=pool.page_size,
                cu_seqlens_q=None if one_each else np.append(0, np.cumsum(self.counts)),
                sliding_window=window,
                page_starts=self.packed.page_starts,
                page_lens=self.packed.page_lens,
                num_pages=pool.num_pages,
                dtype=pool.dtype,
                previous=self._before.get(key),
            )
        return self._plans[key]

    @property
    def plans(self) -> dict:
        return self._plans

    def gather_arguments(self, pages: mx.array) -> dict:
        """Arguments of the native gather; pages that every row gave back are left out."""
        if self._gather is None:
            first, skipped = self.first_column, self._num_freed
            starts, lens = self._page_columns(pages.shape[2])
            arrays = {
                "block_tables": self.packed.block_tables[:, skipped:],
                "context_lens": self.ends + self.shifts - first,
                "page_starts": None if starts is None else starts[:, skipped:] - first,
                "page_lens": None if lens is None else lens[:, skipped:],
            }
            known = {name: a for name, a in arrays.items() if a is not None}
            self._gather = {name: mx.array(np.ascontiguousarray(a)) for name, a in known.items()}
            self._gather["length"] = self.num_columns
        return self._gather

    def _page_columns(self, page_size: int):
        """The first column of each page and how many it fills; None where positions say it."""
        starts, lens = self.packed.page_starts, self.packed.page_lens
        if not self.shifts.any():
            return starts, lens
        if starts is None:
            tables = self.packed.block_tables
            starts = np.arange(tables.shape[1], dtype=np.int32) * np.int32(page_size)
            lens = np.full(tables.shape, page_size, np.int32)
        return starts + self.shifts[:, None], lens
