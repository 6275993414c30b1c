"""A step's work items, and what the planner decided about them."""

from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx
import numpy as np

from paged_mlx.host_ints import host_ints, optional_ints

KINDS = ("vector", "tile", "wide")
_ITEM_FIELDS = 8


@dataclass(frozen=True)
class SharingDecision:
    """Why a run of pages that several sequences begin with is read once or not.

    The costs are the planner's estimates, in keys read per KV head.
    """

    num_sequences: int
    first_page: int
    num_pages: int
    cost_shared: float
    cost_alone: float
    shared: bool

    def __str__(self):
        verdict = "shared" if self.shared else "not shared"
        last = self.first_page + self.num_pages
        return (
            f"pages [{self.first_page}, {last}) of {self.num_sequences} sequences: {verdict}, "
            f"cost {self.cost_shared:.0f} once against {self.cost_alone:.0f} one by one"
        )


class AttentionPlan:
    """One step of attention, cut into work items on the host.

    A work item is a set of query tokens against a run of pages. Made by
    :func:`paged_mlx.fast.plan`, used by every layer with the same window.

    Attributes:
        array: The plan as both backends read it, ``int32 [words]``
            (``kernels/plan_format.h``). Pass it as an input of a compiled
            function and on to ``fast.paged_attention(..., plan=array)``.
        decisions: Why each run of common pages is shared or not.
        options: What it was made with, but for the step's tables and lengths.
    """

    def __init__(self, native, options: dict):
        self._native = native
        self.options = options
        self.array = native.array()

    @cached_property
    def _header(self) -> dict:
        return self._native.header()

    @cached_property
    def decisions(self) -> list[SharingDecision]:
        return [SharingDecision(*row) for row in self._native.decisions()]

    num_tokens = property(lambda self: self._header["num_tokens"])
    num_q_heads = property(lambda self: self._header["num_q_heads"])
    num_kv_heads = property(lambda self: self._header["num_kv_heads"])
    page_size = property(lambda self: self._header["page_size"])
    causal = property(lambda self: bool(self._header["causal"]))
    sliding_window = property(lambda self: self._header["sliding_window"] or None)
    num_partials = property(lambda self: self._header["num_partials"])
    num_merges = property(lambda self: self._header["num_merges"])
    max_page_id = property(lambda self: self._header["max_page_id"])
    max_context_len = property(lambda self: self._header["max_row_end"])

    @cached_property
    def work(self) -> tuple[tuple[int, int, int], bool, bool, bool]:
        """What decides which kernels run: most query tokens of an item, by kind; merges; window; ragged."""
        header = self._header
        merged, window, ragged = (
            bool(header[name]) for name in ("num_merges", "sliding_window", "page_starts")
        )
        return self._native.most_tokens(), merged, window, ragged

    @property
    def num_items(self) -> dict[str, int]:
        """Number of items of each kind: vector, tile and wide."""
        return dict(zip(KINDS, self._header["num_items"]))

    @cached_property
    def _words(self) -> np.ndarray:
        return np.array(self.array)

    @cached_property
    def items(self) -> list[dict]:
        """The items, in the order they are stored: kind, tokens, pages and keys of each."""
        h, words = self._header, self._words
        kinds = np.repeat(KINDS, h["num_items"])
        rows = words[h["items"] :][: len(kinds) * _ITEM_FIELDS].reshape(-1, _ITEM_FIELDS)
        items = []
        for kind, row in zip(kinds, rows):
            row_begin, row_count, page_begin, page_count, first, key_begin, key_end, partial = row
            items.append(
                {
                    "kind": str(kind),
                    "tokens": words[h["row_tokens"] + row_begin :][:row_count].tolist(),
                    "pages": words[h["pages"] + page_begin :][:page_count].tolist(),
                    "keys": (int(key_begin), int(key_end)),
                    "partial": None if partial < 0 else int(partial),
                }
            )
        return items

    @cached_property
    def keys_read(self) -> int:
        """Keys that the items read, per KV head."""
        return sum(max(0, end - begin) for begin, end in (item["keys"] for item in self.items))

    @cached_property
    def keys_least(self) -> int:
        """Keys that must be read at the least, per KV head: each slot of a page once."""
        return self.keys_read - self._repeated_keys()

    @property
    def key_nbytes(self) -> int:
        """Bytes of K and V of one key, all KV heads, of the dtype and dims it was planned for."""
        o = self.options
        return self.num_kv_heads * (o["head_dim"] + o["v_head_dim"]) * o["dtype"].size

    def _repeated_keys(self) -> int:
        seen, repeated = {}, 0
        if self._header["page_starts"]:  # ragged: count by page, as the items list them
            spans = self._ragged_spans()
        else:
            spans = self._uniform_spans()
        for page, begin, end in spans:
            low, high = seen.get(page, (begin, begin))
            repeated += max(0, min(end, high) - max(begin, low))
            seen[page] = (min(low, begin), max(high, end))
        return repeated

    def _uniform_spans(self):
        for item in self.items:
            begin, end = item["keys"]
            first = begin // self.page_size * self.page_size
            for i, page in enumerate(item["pages"]):
                start = first + i * self.page_size
                yield page, max(begin, start), min(end, start + self.page_size)

    def _ragged_spans(self):
        h, at = self._header, 0
        for item in self.items:
            begin, end = item["keys"]
            for page in item["pages"]:
                start = int(self._words[h["page_starts"] + at])
                length = int(self._words[h["page_lens"] + at])
                at += 1
                yield page, max(begin, start), min(end, start + length)

    def advance(self, block_tables, context_lens, cu_seqlens_q=None) -> "AttentionPlan | None":
        """The plan of the next step, if only lengths inside the same pages changed, else None."""
        native = self._native.advance(
            op="plan",
            block_tables=host_ints("plan", "block_tables", block_tables),
            context_lens=host_ints("plan", "context_lens", context_lens),
            cu_seqlens_q=optional_ints("plan", "cu_seqlens_q", cu_seqlens_q),
        )
        if native is None:
            return None
        return AttentionPlan(native, self.options)

    def __repr__(self):
        kinds = ", ".join(f"{n} {kind}" for kind, n in self.num_items.items() if n) or "no items"
        return (
            f"AttentionPlan({self.num_tokens} tokens, {kinds}, {self.num_partials} partials, "
            f"{self.num_merges} merges)"
        )

    def __str__(self):
        read, least = self.keys_read, self.keys_least
        lines = [
            repr(self),
            f"K and V read: {read * self.key_nbytes:,} bytes of {read:,} keys, "
            f"{read / max(1, least):.3f}x the least, {least * self.key_nbytes:,}",
            f"{'item':>5} {'kind':<7} {'tokens':>7} {'rows':>6} {'pages':>6} {'keys':>17}  result",
        ]
        gqa_factor = self.num_q_heads // self.num_kv_heads
        for i, item in enumerate(self.items[:24]):
            tokens, (begin, end) = len(item["tokens"]), item["keys"]
            result = "final" if item["partial"] is None else f"partial {item['partial']}"
            lines.append(
                f"{i:>5} {item['kind']:<7} {tokens:>7} {tokens * gqa_factor:>6} "
                f"{len(item['pages']):>6} {f'[{begin}, {end})':>17}  {result}"
            )
        if len(self.items) > 24:
            lines.append(f"{'':>5} and {len(self.items) - 24} more")
        return "\n".join(lines + [str(decision) for decision in self.decisions])


def plan_array(plan: "AttentionPlan | mx.array") -> mx.array:
    """The words of ``plan``, which may be the words already."""
    return plan.array if isinstance(plan, AttentionPlan) else plan
