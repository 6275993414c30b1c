"""A ``Case`` names one call of paged attention; ``Case.build`` makes its arrays.

Every page a sequence holds has a shuffled physical id, every slot that no sequence may see
is poisoned, and every table entry that must not be read is garbage. A case prints itself as
the expression that makes it again.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import dtypes
from .problem import Problem
from .tables import Tables, lay_out

POISONS = ("nan", "inf", "huge", "denormal", "mixed", "zero")
MASKS = (None, "boolean", "boolean_per_head", "additive", "additive_per_head")


@dataclass(frozen=True)
class Case:
    """One call of paged attention. Small numbers, one seed; equal cases build equal arrays.

    Attributes:
        sequences: ``(query_len, context_len)`` of each; the context includes the query.
            ``(n, 0)`` is an empty sequence whose n tokens see nothing.
        prefixes: ``(first, last, tokens)``: sequences ``[first, last)`` begin with the same
            tokens, in the same pages. Later entries may nest in earlier ones.
        packed: Pass ``cu_seqlens_q`` although every query is one token.
        ragged: Pages are part-filled in the middle of a sequence.
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

    def replace(self, **changes) -> Case:
        return dataclasses.replace(self, **changes)

    @property
    def value_dim(self) -> int:
        return self.head_dim if self.v_head_dim is None else self.v_head_dim

    @property
    def gqa_factor(self) -> int:
        return self.num_q_heads // self.num_kv_heads

    @property
    def num_tokens(self) -> int:
        return sum(query_len for query_len, _ in self.sequences)

    @property
    def softmax_scale(self) -> float:
        return self.head_dim**-0.5 if self.scale is None else self.scale

    def build(self) -> Problem:
        """The arrays of this case. Needles are planted by ``needle.build``."""
        if self.values == "needles":
            from . import needle

            return needle.build(self)[0]
        rng = np.random.default_rng([self.seed, 1])
        keys, values = draw_contexts(self, rng)
        return assemble(self, draw_queries(self, rng), keys, values)


def with_options(softcap: bool, alibi: bool, sinks: bool, mask: str | None) -> dict[str, Any]:
    """Fields of a case that has these options, with values that matter."""
    return {
        "softcap": 4.0 if softcap else None,
        "alibi": 1.0 if alibi else 0.0,
        "sinks": "random" if sinks else None,
        "mask": mask,
    }


def _expression(value: object) -> str:
    """Source text of a field; an infinity has none of its own."""
    infinite = isinstance(value, float) and np.isinf(value)
    return f"float('{value}')" if infinite else repr(value)


def _require(holds: bool, name: str, must: str, found: object) -> None:
    if not holds:
        raise ValueError(f"[Case] {name} must {must}; got {found}.")


def draw_queries(case: Case, rng: np.random.Generator) -> np.ndarray:
    """``[tokens, num_q_heads, head_dim]``; against unit normal keys, scores have ``spread``."""
    shape = (case.num_tokens, case.num_q_heads, case.head_dim)
    gain = case.spread / (case.softmax_scale * case.head_dim**0.5)
    q = rng.standard_normal(shape, np.float32) * np.float32(gain)
    if case.shift:
        q[..., -1] = np.copysign(_shift_root(case), case.shift)
    return dtypes.round_to(q, case.dtype)


def draw_contexts(case: Case, rng: np.random.Generator):
    """Contiguous K and V of every sequence, shared prefixes equal."""
    keys, values = [], []
    for s, (_, context_len) in enumerate(case.sequences):
        k = rng.standard_normal((context_len, case.num_kv_heads, case.head_dim), np.float32)
        v = rng.standard_normal((context_len, case.num_kv_heads, case.value_dim), np.float32)
        if case.shift:
            k[..., -1] = _shift_root(case)
        if case.values == "ones":
            v[:] = 1
        keys.append(dtypes.round_to(k, case.dtype))
        values.append(dtypes.round_to(v, case.dtype))
        share_prefixes(case, s, keys)
        share_prefixes(case, s, values)
    return keys, values


def share_prefixes(case: Case, s: int, arrays: list[np.ndarray]) -> None:
    """Give sequence ``s`` the first tokens of the sequences it shares prefixes with."""
    for first, last, tokens in case.prefixes:
        if first < s < last:
            length = min(tokens, len(arrays[s]), len(arrays[first]))
            arrays[s][:length] = arrays[first][:length]


def _shift_root(case: Case) -> np.float32:
    return np.float32((abs(case.shift) / case.softmax_scale) ** 0.5)


def page_tables(case: Case) -> Tables:
    """Which page holds which tokens; from ``seed`` and ``layout`` alone."""
    return lay_out(case, np.random.default_rng([case.seed, case.layout, 2]))


def assemble(case: Case, q: np.ndarray, keys: list, values: list) -> Problem:
    """Put contiguous K and V into shuffled pages; poison everything else.

    Args:
        q: ``[tokens, num_q_heads, head_dim]``, rounded to the case's type.
        keys: ``[context_len, num_kv_heads, head_dim]`` of each sequence, rounded.
        values: The same with ``v_head_dim``.
    """
    tables = page_tables(case)
    rng = np.random.default_rng([case.seed, case.layout, 4])
    query_lens = [query_len for query_len, _ in case.sequences]
    unpacked = all(n == 1 for n in query_lens) and not case.packed
    options = np.random.default_rng([case.seed, 3])
    return Problem(
        dtype=case.dtype,
        q=dtypes.encode(q, case.dtype),
        k_pages=tables.scatter(case, keys, case.head_dim, rng),
        v_pages=tables.scatter(case, values, case.value_dim, rng),
        block_tables=tables.block_tables,
        context_lens=np.array([c for _, c in case.sequences], np.int32),
        cu_seqlens_q=None if unpacked else np.cumsum([0, *query_lens]).astype(np.int32),
        page_starts=tables.page_starts,
        page_lens=tables.page_lens,
        scale=case.scale,
        causal=case.causal,
        sliding_window=case.sliding_window,
        softcap=case.softcap,
        alibi_slopes=_alibi_slopes(case),
        sinks=_sinks(case, options),
        mask=_mask(case, options),
        keys=tuple(keys),
        values=tuple(values),
    )


def _alibi_slopes(case: Case):
    if not case.alibi:
        return None
    heads = np.arange(1, case.num_q_heads + 1, dtype=np.float32)
    return np.float32(case.alibi) * np.exp2(-8 * heads / case.num_q_heads).astype(np.float32)


def _sinks(case: Case, rng):
    if case.sinks is None:
        return None
    if case.sinks == "random":
        return (2 * rng.standard_normal(case.num_q_heads)).astype(np.float32)
    return np.full(case.num_q_heads, case.sinks, np.float32)


def _mask(case: Case, rng):
    """``[(heads,) tokens, keys]``; columns past a sequence's own context are garbage."""
    if case.mask is None:
        return None
    longest = max((c for _, c in case.sequences), default=0)
    shape = (case.num_tokens, longest)
    if case.mask.endswith("per_head"):
        shape = (case.num_q_heads, *shape)
    hidden = rng.random(shape, np.float32) < case.mask_density
    if case.mask.startswith("boolean"):
        return _fill_unseen(case, ~hidden, True)
    mask = rng.standard_normal(shape, np.float32)
    mask[hidden] = -np.inf
    return _fill_unseen(case, mask, np.nan if case.poison != "zero" else 0)


def _fill_unseen(case: Case, mask: np.ndarray, garbage) -> np.ndarray:
    token = 0
    for query_len, context_len in case.sequences:
        mask[..., token : token + query_len, context_len:] = garbage
        token += query_len
    return mask
