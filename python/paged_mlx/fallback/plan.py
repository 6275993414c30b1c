"""Plans of a step: a row for each query token.

A plan is a header of integers (a mark, tokens, query heads, KV heads, page size), then for each
query token

    position, keys behind (row_end), window, page ids [M], page starts [M], page lengths [M]

so that attention under ``mx.compile``, which cannot read it, can compute with it.
"""

from __future__ import annotations

from itertools import groupby

import mlx.core as mx
import numpy as np

from paged_mlx.errors import MAX_INT32, fail

MARK = 0x706C616E  # what a plan begins with
HEADER = 5
_FIELDS = 3  # of a row, before the pages
_ALL = 2**30  # a window that hides nothing


class TokenRows:
    """Rows of a plan, of NumPy or MLX: ``words [batch, T, row]``, whose T tokens share pages."""

    def __init__(self, words):
        self.words = words
        width = (words.shape[2] - _FIELDS) // 3
        self.position, self.end, self.window = (words[..., i, None] for i in range(_FIELDS))
        self.pages, self.starts, self.lens = (
            words[:, 0, _FIELDS + i * width :][:, :width] for i in range(3)
        )

    @classmethod
    def of(cls, plan, num_tokens: int) -> TokenRows:
        """The rows of a plan's array, every token by itself."""
        return cls(plan[HEADER:].reshape(num_tokens, 1, -1))

    def sequences(self):
        """``[first, last)`` of the tokens that have the same pages, one sequence after the other."""
        first = 0
        for _, same in groupby(self.words[:, 0, _FIELDS:], key=lambda entries: entries.tobytes()):
            last = first + len(list(same))
            yield first, last
            first = last


class NativePlan:
    """One step's tables, a row for each query token; an item is a sequence.

    Nothing is shared, cut or merged.
    """

    def __init__(
        self, *, op, block_tables, context_lens, cu_seqlens_q, page_starts, page_lens, num_pages,
        num_q_heads, num_kv_heads, page_size, causal, sliding_window, dtype, head_dim, v_head_dim,
        share_prefixes, fixed_partition, workers, cores=0, kernels=False, num_sealed_pages=-1,
        formats=(None, None),
    ):  # fmt: skip
        arrays = block_tables, context_lens, cu_seqlens_q, page_starts, page_lens
        step = Step(op, *arrays, page_size, sliding_window)
        step.check(num_pages)
        self._bounds, context = step.cu, step.context_lens
        sequence = np.repeat(np.arange(len(context)), step.query_lens)  # of each token
        tokens = np.arange(len(sequence)) - step.cu[:-1][sequence]  # counted from its sequence's
        position = (context - step.query_lens)[sequence] + tokens
        end = context[sequence]
        if causal:
            end = np.where(end > 0, position + 1, 0)
        pages = np.where(step.seen, block_tables, -1)  # ids behind the context mean nothing
        counts = np.where(step.seen, step.lens, 0)
        fields = np.stack([position, end, np.full(len(end), sliding_window or _ALL)], axis=1)
        rows = [fields, *(part[sequence] for part in (pages, step.starts, counts))]
        header = [MARK, len(sequence), num_q_heads, num_kv_heads, page_size]
        words = np.concatenate([header, np.concatenate(rows, axis=1).reshape(-1)])
        self._array = mx.array(words.astype(np.int32))
        self._items = [
            dict(
                kind="tile", open=False, partial=None, tokens=list(range(*step.cu[b : b + 2].tolist())),
                pages=pages[b][step.seen[b]].tolist(), keys=(int(step.first_keys[b]), int(context[b])),
            )
            for b in np.flatnonzero(step.query_lens)
        ]  # fmt: skip
        self._header = dict(
            num_tokens=len(sequence), num_items=[0, len(self._items), 0], num_q_heads=num_q_heads,
            num_kv_heads=num_kv_heads, page_size=page_size, causal=int(causal),
            sliding_window=sliding_window, num_partials=0, num_merges=0, page_starts=0,
            max_page_id=int(pages.max(initial=-1)), max_row_end=int(context.max()),
        )  # fmt: skip

    def array(self) -> mx.array:
        """Header and rows, ``int32 [words]``."""
        return self._array

    def advance(self, **step):
        """None: a plan costs little here."""
        return None

    def header(self) -> dict:
        return self._header

    def cu_seqlens_q(self) -> list[int]:
        """First query token of each sequence, and one past the last."""
        return self._bounds.tolist()

    def items(self) -> list[dict]:
        """As ``AttentionPlan.items``."""
        return self._items

    def most_tokens(self) -> tuple[int, int, int]:
        return 0, max((len(item["tokens"]) for item in self._items), default=0), 0

    def decisions(self) -> list:
        return []

    def measured(self) -> bool:
        return False

    def fresh_prompt(self) -> bool:
        return False


class Step:
    """A step's tables and lengths, and what must hold of them."""

    def __init__(self, op, tables, context_lens, cu, starts, lens, page_size, window=0):
        self.op, self.page_size, self.tables = op, page_size, tables
        by_entry = ("batch", "max_pages")
        given = (
            ("block_tables", tables, by_entry),
            ("context_lens", context_lens, ("batch",)),
            ("cu_seqlens_q", cu, ("batch + 1",)),
            ("page_starts", starts, by_entry),
            ("page_lens", lens, by_entry),
        )
        given = [row for row in given if row[1] is not None]
        for name, array, dims in given:
            if array.ndim != len(dims):
                must = f"{name} must have shape [{', '.join(dims)}]"
                fail(op, must, f"{array.ndim} dimensions")
        if not len(tables):
            fail(op, "block_tables must have at least one sequence", "batch = 0")
        if (starts is None) != (lens is None):
            fail(op, "page_starts and page_lens must be given together", "one of them")
        sizes = dict(zip(by_entry, tables.shape)) | {"batch + 1": len(tables) + 1}
        for name, array, dims in given:
            for dim, size in zip(dims, array.shape):
                if size != sizes[dim]:
                    fail(op, f"{name} must match {dim} = {sizes[dim]} of block_tables", size)
        if starts is None:
            starts = np.broadcast_to(np.arange(tables.shape[1]) * page_size, tables.shape)
            lens = np.full(tables.shape, page_size)
        cu = np.arange(len(tables) + 1) if cu is None else cu
        self.context_lens, self.cu, self.starts, self.lens = (
            array.astype(np.int64) for array in (context_lens, cu, starts, lens)
        )
        self.query_lens = np.diff(self.cu)
        first = self.context_lens - self.query_lens + 1 - window
        self.first_keys = np.maximum(first, 0) if window else np.zeros_like(first)
        inside = (self.starts < self.context_lens[:, None]) & (self.query_lens > 0)[:, None]
        #: Which entries hold keys that a token sees, as far as the window goes.
        self.needed = inside & (self.starts + self.lens > self.first_keys[:, None])
        self.seen = self.needed & (tables != -1)

    def check(self, num_pages: int, allow_no_page: bool = False) -> None:
        """Refuse tables that do not hold what the lengths say."""
        cu, context, queries = self.cu, self.context_lens, self.query_lens
        if cu[0]:
            fail(self.op, "cu_seqlens_q must start with 0", cu[0])
        for (b,) in _indices(queries < 0):
            got = f"{cu[b]} before {cu[b + 1]} at sequence {b}"
            fail(self.op, "cu_seqlens_q must not decrease", got)
        for (b,) in _indices(context < 0):
            fail(self.op, "context_lens must be at least 0", f"{context[b]} for sequence {b}")
        for (b,) in _indices((queries > 0) & (context > MAX_INT32 - self.page_size)):
            must = "context_lens must be at most 2^31 - 1 - page_size"
            fail(self.op, must, f"{context[b]} for sequence {b}")
        for (b,) in _indices((context > 0) & (queries > context)):
            must = "the query must not be longer than its context, which includes it"
            must = f"{must} (context_lens[{b}] = {context[b]})"
            fail(self.op, must, f"{queries[b]} query tokens")
        self._check_covered((context > 0) & (queries > 0))
        self._check_ids(num_pages, allow_no_page)

    def _check_covered(self, attends) -> None:
        """Pages follow each other, from the first key that a token sees to the context's end."""
        starts, lens, ends = self.starts, self.lens, self.starts + self.lens
        before = np.concatenate([np.full((len(ends), 1), -1), ends], axis=1)[:, :-1]
        inside = before < self.context_lens[:, None]
        read = np.logical_and.accumulate(inside, axis=1) & attends[:, None]
        for b, i in _indices(read & ((lens < 0) | (lens > self.page_size))):
            must = f"page_lens must be in [0, page_size = {self.page_size}]"
            fail(self.op, must, f"{lens[b, i]} at [{b}, {i}]")
        for b, i in _indices(read & (starts != before) & (before >= 0)):
            must = f"page_starts must continue where the entry before ends ({before[b, i]})"
            fail(self.op, must, f"{starts[b, i]} at [{b}, {i}]")
        late = read & ((starts < 0) | (starts > self.first_keys[:, None]))
        for b, i in _indices(late[:, :1]):
            must = "page_starts must begin at or before the first key that a token sees"
            fail(self.op, f"{must} ({self.first_keys[b]})", f"{starts[b, i]} for sequence {b}")
        covered = np.where(read, ends, 0).max(1, initial=0)
        for (b,) in _indices(attends & (covered < self.context_lens)):
            self._fail_covered(b, covered[b])

    def _check_ids(self, num_pages, allow_no_page) -> None:
        ids, none = self.tables, self.tables == -1
        for b, i in _indices(self.needed & none & (not allow_no_page)):
            self._fail_covered(b, self.starts[b, i])
        of_pool = f"in [0, {num_pages}), the pages of the pool"
        which = of_pool if num_pages >= 0 else "that are not negative"
        outside = (ids < 0) | (ids >= (num_pages if num_pages >= 0 else MAX_INT32))
        for b, i in _indices(self.needed & ~none & outside):
            fail(self.op, f"block_tables must hold page ids {which}", f"{ids[b, i]} at [{b}, {i}]")

    def _fail_covered(self, b, covered) -> None:
        must = "context_lens must be covered by the pages of block_tables"
        who = f"(sequence {b} has {covered} tokens' worth)"
        fail(self.op, f"{must} {who}", self.context_lens[b])


def _indices(wrong: np.ndarray) -> list[list[int]]:
    return np.argwhere(wrong).tolist()


def check_tables(op, block_tables, context_lens, page_starts, page_lens, num_pages, page_size):
    """Refuse tables that do not cover the whole contexts; NO_PAGE is allowed."""
    step = Step(op, block_tables, context_lens, None, page_starts, page_lens, page_size)
    step.check(num_pages, allow_no_page=True)
