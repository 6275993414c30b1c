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

from paged_mlx.errors import fail

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
        step = Step(op, *arrays, page_size)
        step.check(num_pages, sliding_window)
        header = [MARK, step.num_tokens, num_q_heads, num_kv_heads, page_size]
        rows = np.zeros((step.num_tokens, 1, _FIELDS + 3 * block_tables.shape[1]), np.int32)
        self._items = []
        for b, context_len in enumerate(context_lens.tolist()):
            first, last = step.cu[b : b + 2].tolist()
            if last == first:
                continue
            part = TokenRows(rows[first:last].swapaxes(0, 1))
            positions = np.arange(context_len - (last - first), context_len)
            part.position[0, :, 0] = positions
            part.end[0] = context_len
            if causal and context_len:
                part.end[0, :, 0] = positions + 1
            part.window[0] = sliding_window or _ALL
            begin = max(0, int(positions[0]) + 1 - sliding_window) if sliding_window else 0
            seen = step.entries(b, begin)
            pages = np.where(seen, block_tables[b], -1)  # ids behind the context mean nothing
            lens = np.where(seen, step.lens[b], 0)
            for i, values in enumerate((pages, step.starts[b], lens)):
                width = len(values)
                rows[first:last, 0, _FIELDS + i * width :][:, :width] = values
            self._items.append(
                {
                    "kind": "tile",
                    "open": False,
                    "tokens": list(range(first, last)),
                    "pages": pages[seen].tolist(),
                    "keys": (begin, context_len),
                    "partial": None,
                }
            )
        self._array = mx.array(np.concatenate([np.array(header, np.int32), rows.reshape(-1)]))
        self._header = {
            "num_tokens": step.num_tokens,
            "num_items": [0, len(self._items), 0],
            "num_q_heads": num_q_heads,
            "num_kv_heads": num_kv_heads,
            "page_size": page_size,
            "causal": int(causal),
            "sliding_window": sliding_window,
            "num_partials": 0,
            "num_merges": 0,
            "max_page_id": max(
                (page for item in self._items for page in item["pages"]), default=-1
            ),
            "max_row_end": int(context_lens.max()),
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

    def __init__(self, op, tables, context_lens, cu, starts, lens, page_size):
        self.op, self.page_size = op, page_size
        self.tables, self.context_lens = tables, context_lens
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
                self._fail(must, f"{array.ndim} dimensions")
        if not len(tables):
            self._fail("block_tables must have at least one sequence", "batch = 0")
        if (starts is None) != (lens is None):
            self._fail("page_starts and page_lens must be given together", "one of them")
        sizes = dict(zip(by_entry, tables.shape)) | {"batch + 1": len(tables) + 1}
        for name, array, dims in given:
            for dim, size in zip(dims, array.shape):
                if size != sizes[dim]:
                    self._fail(f"{name} must match {dim} = {sizes[dim]} of block_tables", size)
        self.cu = np.arange(len(tables) + 1) if cu is None else cu
        self.num_tokens = max(0, int(self.cu[-1]))
        if starts is None:
            starts = np.broadcast_to(np.arange(tables.shape[1]) * page_size, tables.shape)
            lens = np.full(tables.shape, page_size)
        self.starts, self.lens = starts, lens

    def _fail(self, must, got):
        fail(self.op, must, got)

    def entries(self, b: int, first_key: int) -> np.ndarray:
        """Which entries of a sequence's table hold keys from ``first_key`` on."""
        starts = self.starts[b]
        seen = (starts < self.context_lens[b]) & (starts + self.lens[b] > first_key)
        return seen & (self.tables[b] != -1)

    def check(self, num_pages: int, sliding_window: int = 0, allow_no_page: bool = False) -> None:
        """Refuse tables that do not hold what the lengths say."""
        if self.cu[0]:
            self._fail("cu_seqlens_q must start with 0", self.cu[0])
        for b, context_len in enumerate(self.context_lens.tolist()):
            first, last = self.cu[b : b + 2].tolist()
            if last < first:
                must = "cu_seqlens_q must not decrease"
                self._fail(must, f"{first} before {last} at sequence {b}")
        for b, context_len in enumerate(self.context_lens.tolist()):
            query_len = int(self.cu[b + 1]) - int(self.cu[b])
            self._check_length(b, context_len, query_len)
            if context_len and query_len:
                hidden = context_len - query_len + 1 - sliding_window if sliding_window else 0
                first_key = max(0, hidden)
                self._check_covered(b, context_len, first_key)
                self._check_ids(b, context_len, first_key, num_pages, allow_no_page)

    def _check_length(self, b, context_len, query_len) -> None:
        if context_len < 0:
            self._fail("context_lens must be at least 0", f"{context_len} for sequence {b}")
        if query_len and context_len > 2**31 - 1 - self.page_size:
            must = "context_lens must be at most 2^31 - 1 - page_size"
            self._fail(must, f"{context_len} for sequence {b}")
        if 0 < context_len < query_len:
            must = (
                "the query must not be longer than its context, which includes it "
                f"(context_lens[{b}] = {context_len})"
            )
            self._fail(must, f"{query_len} query tokens")

    def _check_covered(self, b, context_len, first_key) -> None:
        end = -1
        for i, (start, count) in enumerate(zip(self.starts[b].tolist(), self.lens[b].tolist())):
            if end >= context_len:
                return
            if not 0 <= count <= self.page_size:
                must = f"page_lens must be in [0, page_size = {self.page_size}]"
                self._fail(must, f"{count} at [{b}, {i}]")
            if i and start != end:
                must = f"page_starts must continue where the entry before ends ({end})"
                self._fail(must, f"{start} at [{b}, {i}]")
            if not i and not 0 <= start <= first_key:
                must = "page_starts must begin at or before the first key that a token sees"
                self._fail(f"{must} ({first_key})", f"{start} for sequence {b}")
            end = start + count
        if end < context_len:
            self._fail_covered(b, max(0, end))

    def _check_ids(self, b, context_len, first_key, num_pages, allow_no_page) -> None:
        starts, ids = self.starts[b], self.tables[b]
        read = np.flatnonzero((starts < context_len) & (starts + self.lens[b] > first_key))
        for i, page in zip(read.tolist(), ids[read].tolist()):
            if page == -1:
                if not allow_no_page:
                    self._fail_covered(b, int(starts[i]))
            elif page < 0 or 0 <= num_pages <= page:
                of_pool = f"in [0, {num_pages}), the pages of the pool"
                which = of_pool if num_pages >= 0 else "that are not negative"
                self._fail(f"block_tables must hold page ids {which}", f"{page} at [{b}, {i}]")

    def _fail_covered(self, b, covered) -> None:
        must = "context_lens must be covered by the pages of block_tables"
        who = f"(sequence {b} has {covered} tokens' worth)"
        self._fail(f"{must} {who}", self.context_lens[b])


def check_tables(op, block_tables, context_lens, page_starts, page_lens, num_pages, page_size):
    """Refuse tables that do not cover the whole contexts; NO_PAGE is allowed."""
    step = Step(op, block_tables, context_lens, None, page_starts, page_lens, page_size)
    step.check(num_pages, allow_no_page=True)
