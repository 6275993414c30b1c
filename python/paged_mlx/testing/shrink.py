"""From a case that fails to a small case that fails, and the text to paste."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import fields, replace

from paged_mlx.reference.case import Case

from .backends import Backend
from .checks import Check, run

_DEFAULTS = {f.name: f.default for f in fields(Case)}

#: Options that a smaller case does without, if it still fails.
_OPTIONAL = (
    "mask sinks alibi softcap sliding_window prefixes ragged v_head_dim shift packed scale "
    "causal spread k_format v_format dtype"
).split()


def shrink(check: Check, backend: Backend, seconds: float = 10.0) -> Check:
    """The smallest failing check found by making one thing smaller at a time."""
    deadline = time.monotonic() + seconds
    again = True
    while again and time.monotonic() < deadline:
        again = False
        for case in _smaller(check.case):
            if time.monotonic() > deadline:
                break
            smaller = replace(check, case=case)
            if not run(smaller, backend).right:
                check, again = smaller, True
                break
    return check


def snippet(check: Check, backend: Backend) -> str:
    """Python that runs one check again."""
    return (
        "from paged_mlx.testing import Case, Check, backends, run\n"
        f"print(run({check!r}, {backend.snippet or backend.name}))"
    )


def _smaller(case: Case) -> Iterator[Case]:
    """Cases with one thing less, the largest steps first."""
    for changes in _changes(case):
        try:
            smaller = case.replace(**changes)
        except ValueError:
            continue
        if smaller != case:
            yield smaller


def _changes(case: Case) -> Iterator[dict]:
    for s in range(len(case.sequences)):
        if len(case.sequences) > 1:
            rest = case.sequences[:s] + case.sequences[s + 1 :]
            yield {"sequences": rest, "prefixes": ()}
            yield {"sequences": rest}
    yield {"num_q_heads": case.gqa_factor, "num_kv_heads": 1}
    yield {"num_q_heads": case.num_kv_heads}
    for name in _OPTIONAL:
        yield {name: _DEFAULTS[name]}
    for s, (query_len, context_len) in enumerate(case.sequences):
        for query, context in _shorter(query_len, context_len):
            sequences = list(case.sequences)
            sequences[s] = (query, context)
            yield {"sequences": tuple(sequences)}
    for head_dim in (8, 16, 32, 64):
        if head_dim < case.head_dim:
            yield {"head_dim": head_dim}
    for page_size in (1, 4, 8, 16):
        if page_size < case.page_size:
            yield {"page_size": page_size}


def _shorter(query_len: int, context_len: int) -> Iterator[tuple[int, int]]:
    for query in {1, query_len // 2, query_len - 1}:
        if 0 < query < query_len:
            yield query, context_len
    for context in (context_len // 2, context_len - 16, context_len - 1):
        if 0 < context < context_len:
            yield min(query_len, context), context
