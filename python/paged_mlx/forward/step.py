"""One forward pass of a batch: pages taken once, used by every layer of a group."""

from dataclasses import replace
from functools import cached_property

import mlx.core as mx
import numpy as np

from paged_mlx import fast
from paged_mlx._native import _ext
from paged_mlx.attention_plan import runs_kernels
from paged_mlx.pages.block_table import BlockTable


class Step:
    """What a forward pass adds to its sequences.

    It names the sequences and does not hold them: pages are free as soon as no cache is left.

    Attributes:
        names: The sequences' names.
        starts: ``int32 [batch]``, tokens before the pass.
        ends: ``int32 [batch]``, tokens after it.
        num_tokens: Tokens of a row of the input, padding included.
        padded: Whether some of them are padding.
        batched: Whether K and V are to come back as those of mlx-lm's batch caches do.
        served: Layers that have brought their K and V.
        slots: ``int32 [batch * num_tokens]``, where each token goes; -1 for padding.
        slot_array: ``slots`` as an array.
        tables_before: Where a gather finds K and V while the step's tokens are not in pages.
        first_column: Columns at the front that a gather of this step leaves out: every row gave
            those pages back.
        num_columns: Columns that it returns.
        route: What the attention hook has decided for the layers so far.
        plans: Attention plans by what they are for; the next step of the same sequences advances
            them.
        packer: Packs the tables of these sequences, step by step.
        of_pass: The pass of the model that it is one group's part of.
    """

    def __init__(self, cache, num_tokens, counts, slots, tables, num_freed, longest, before):
        group = cache.group
        self.names, self.starts, self.batched = cache.names, cache.lens, cache.batched
        self.num_tokens = num_tokens
        self.padded = counts is not None and bool((counts != num_tokens).any())
        self.packer = BlockTable() if before is None else before.packer
        self._packed = packed = self.packer.update(tables)
        self.ends = packed.context_lens
        self.served: set[int] = set()
        self.first_column = min(table.map.first_held for table in tables)
        self.num_columns = longest + num_tokens - self.first_column
        self.route = self.of_pass = None
        self.plans = {}
        self._sealed_before: dict = {}  # how often pages were sealed before a plan was made
        self._window, self._page_size = group.window, group.page_size
        self._num_freed = num_freed
        self._counts = counts if self.padded else None
        self._before = {} if before is None else before.plans
        self.slots = self._padded(slots, -1) if self.padded else slots
        self.slot_array = mx.array(self.slots)
        self._slots_in: dict = {}
        if group.formats.are_dense:
            self.tables_before = self._tables(written=False)

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

    def undo(self) -> None:
        """Have added nothing, also in the caches that have taken part; nobody joins any more."""
        self.ends[:] = self.starts
        self.names, self.plans = (), {}
        self.served.clear()

    def _padded(self, values: np.ndarray, filler: int) -> np.ndarray:
        """A value for each token that is not padding, as ``[batch * num_tokens]``."""
        padded = np.full(self.batch * self.num_tokens, filler, np.int32)
        padded[self._real_tokens()] = values
        return padded

    def _real_tokens(self) -> np.ndarray:
        """Indices of the tokens that are not padding, in ``[batch * num_tokens]``."""
        tokens = np.arange(self.num_tokens, dtype=np.int32)
        return np.flatnonzero(tokens < self._counts[:, None]).astype(np.int32)

    @cached_property
    def packing(self) -> tuple[mx.array, mx.array]:
        """Indices that leave padding out, and those that put it back.

        A padded position gets the first token's output: finite, and read by nobody.
        """
        real = self._real_tokens()
        back = self._padded(np.arange(len(real), dtype=np.int32), 0)
        return mx.array(real), mx.array(back)

    def plan(self, pool, num_q_heads: int, window: int | None):
        """The attention plan for layers of this shape, made once and advanced if it can be."""
        head_dims = pool.head_dim, pool.v_head_dim
        kernels = runs_kernels(pool.stream)
        key = (
            num_q_heads,
            window,
            pool.num_kv_heads,
            *head_dims,
            pool.dtype,
            pool.num_pages,
            kernels,
            None if pool.open_pages is None else id(pool),
        )
        made = self.plans.get(key)
        if made is None or self._sealed_before.get(key) != pool.num_sealed:
            before = self._before.get(key) if made is None else None
            self.plans[key] = made = self._plan(pool, num_q_heads, window, before)
            self._sealed_before[key] = pool.num_sealed
        return made

    def _plan(self, pool, num_q_heads, window, before):
        packed, first_tokens = self._packed, None
        if self.num_tokens > 1 or self.padded:
            counts = np.full(self.batch, self.num_tokens) if self._counts is None else self._counts
            first_tokens = np.append(0, np.cumsum(counts)).astype(np.int32)
        if not pool.formats.are_dense:
            packed = replace(packed, context_lens=self.ends, cu_seqlens_q=first_tokens)
            return pool.plan_packed(packed, num_q_heads, window, before)
        return fast.plan(
            packed.block_tables,
            self.ends,
            num_q_heads=num_q_heads,
            num_kv_heads=pool.num_kv_heads,
            page_size=pool.page_size,
            cu_seqlens_q=first_tokens,
            sliding_window=window,
            page_starts=packed.page_starts,
            page_lens=packed.page_lens,
            num_pages=pool.num_pages,
            dtype=pool.dtype,
            head_dim=pool.head_dim,
            v_head_dim=pool.v_head_dim,
            previous=before,
            stream=pool.stream,
        )

    def slots_in(self, pool):
        """``slots`` as a pool's layers write them, checked once for all."""
        if pool not in self._slots_in:
            self._slots_in[pool] = pool.slots(self.slots)
        return self._slots_in[pool]

    # For gathers

    def contexts(self, written: bool) -> tuple[np.ndarray, np.ndarray, int, dict]:
        """Tables, lengths, the longest, and what ragged tables add: as gathers take them."""
        packed, lens = self._packed, self.ends if written else self.starts
        ragged = {}
        if packed.page_starts is not None:
            ragged = {"page_starts": packed.page_starts, "page_lens": packed.page_lens}
        return packed.block_tables, lens.astype(np.int32), max(1, int(lens.max())), ragged

    def tables_of_gathered(self, written: bool):
        """Where a gather finds K and V that are contiguous, a page for each sequence."""
        length = self.contexts(written)[2]
        rows = np.arange(self.batch, dtype=np.int32)[:, None]
        return _ext.FetchTables(
            rows, self.starts, self._counts, self.num_tokens, written, 0, length,
            self.first_column + self.num_columns, self.first_column + self._skipped_columns(),
            None, None,
        )  # fmt: skip

    @cached_property
    def tables_after(self):
        """Where a gather finds K and V when all tokens are in the pages."""
        return self._tables(written=True)

    @cached_property
    def shifts(self) -> np.ndarray:
        """Columns by which a gather moves each row to the right, ``int32 [batch]``.

        So all rows' new tokens stand in the same columns, as in mlx-lm's batches.
        """
        return self.starts.max() - self.starts

    def _tables(self, written: bool):
        packed = self._packed
        return _ext.FetchTables(
            packed.block_tables,
            self.starts,
            self._counts,
            self.num_tokens,
            written,
            self._num_freed,
            self._page_size,
            self.num_columns,
            self._skipped_columns(),
            packed.page_starts,
            packed.page_lens,
        )

    def _skipped_columns(self) -> int:
        """Columns that a stock window cache leaves out: it begins at the first token's window."""
        if self.batched or self._window is None:
            return 0
        return max(0, int(self.starts[0]) - self._window + 1 - self.first_column)
