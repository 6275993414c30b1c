"""The numbers that describe one call of paged attention.

Every page a sequence holds has a shuffled physical id, every slot that no sequence may see
is poisoned, and every table entry that must not be read is garbage. A case prints itself as
the expression that makes it again.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from . import dtypes

POISONS = ("nan", "inf", "huge", "denormal", "mixed", "zero")
FORMATS = (None, "q8", "q4")
MASKS = (None, "boolean", "boolean_per_head", "additive", "additive_per_head")


SomeCall = TypeVar("SomeCall", bound="Call")


@dataclass(frozen=True)
class Call:
    """One call of paged attention. Small numbers, one seed; equal cases build equal arrays.

    Attributes:
        sequences: ``(query_len, context_len)`` of each; the context includes the query.
            ``(n, 0)`` is an empty sequence whose n tokens see nothing.
        prefixes: ``(first, last, tokens)``: sequences ``[first, last)`` begin with the same
            tokens, in the same pages. Later entries may nest in earlier ones.
        packed: Pass ``cu_seqlens_q`` although every query is one token.
        ragged: Pages are part-filled in the middle of a sequence.
        k_format, v_format: One of ``FORMATS``: how K's and V's pages are held.
        spread: Standard deviation of the scores, in nats.
        shift: Nats added to every score, through one dimension of q and k.
        alibi: Factor of the usual slopes ``2 ** (-8 h / num_q_heads)``; 0 is no ALiBi.
        sinks: ``"random"``, or one logit for every head.
        mask: One of ``MASKS``.
        mask_density: Share of keys that a mask hides.
        values: ``"normal"``, ``"ones"`` or ``"needles"``.
        poison: What lies in slots that no sequence may see; one of ``POISONS``.
        seed: Of the values. ``layout`` seeds page ids, padding and which pages are ragged.
    """

    dtype: str = "float32"
    num_q_heads: int = 2
    num_kv_heads: int = 1
    head_dim: int = 64
    v_head_dim: int | None = None
    page_size: int = 16
    sequences: tuple[tuple[int, int], ...] = ((1, 40),)
    causal: bool = True
    sliding_window: int | None = None
    softcap: float | None = None
    alibi: float = 0.0
    sinks: float | str | None = None
    mask: str | None = None
    mask_density: float = 0.3
    ragged: bool = False
    k_format: str | None = None
    v_format: str | None = None
    prefixes: tuple[tuple[int, int, int], ...] = ()
    packed: bool = False
    scale: float | None = None
    spread: float = 1.5
    shift: float = 0.0
    values: str = "normal"
    poison: str = "mixed"
    seed: int = 0
    layout: int = 0

    def __post_init__(self):
        _require(self.dtype in dtypes.NAMES, "dtype", f"be one of {dtypes.NAMES}", self.dtype)
        _require(self.poison in POISONS, "poison", f"be one of {POISONS}", self.poison)
        for name in ("k_format", "v_format"):
            found = getattr(self, name)
            _require(found in FORMATS, name, f"be one of {FORMATS}", found)
        _require(self.mask in MASKS, "mask", f"be one of {MASKS}", self.mask)
        _require(self.page_size >= 1, "page_size", "be at least 1", self.page_size)
        _require(
            self.num_kv_heads >= 1 and self.num_q_heads % self.num_kv_heads == 0,
            "num_q_heads",
            f"be a multiple of num_kv_heads = {self.num_kv_heads}",
            self.num_q_heads,
        )
        for query_len, context_len in self.sequences:
            _require(
                0 <= query_len and (query_len <= context_len or context_len == 0),
                "sequences",
                "have queries no longer than their contexts",
                (query_len, context_len),
            )

    def __repr__(self):
        shown = (
            f"{f.name}={_expression(getattr(self, f.name))}"
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != f.default
        )
        return f"Case({', '.join(shown)})"

    def replace(self: SomeCall, **changes: Any) -> SomeCall:
        return dataclasses.replace(self, **changes)

    @property
    def value_dim(self) -> int:
        return self.head_dim if self.v_head_dim is None else self.v_head_dim

    @property
    def formats(self) -> tuple[str | None, str | None]:
        return self.k_format, self.v_format

    @property
    def gqa_factor(self) -> int:
        return self.num_q_heads // self.num_kv_heads

    @property
    def num_tokens(self) -> int:
        return sum(query_len for query_len, _ in self.sequences)

    @property
    def softmax_scale(self) -> float:
        return self.head_dim**-0.5 if self.scale is None else self.scale


def _expression(value: object) -> str:
    """Source text of a field; an infinity has none of its own."""
    infinite = isinstance(value, float) and np.isinf(value)
    return f"float('{value}')" if infinite else repr(value)


def _require(holds: bool, name: str, must: str, found: object) -> None:
    if not holds:
        raise ValueError(f"[Case] {name} must {must}; got {found}.")
