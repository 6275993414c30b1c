"""Needles: every page holds a key that exactly one query row must find.

Closeness of random values does not notice a page that is dropped from a long context; a
needle does. Each row that takes part has a code, a direction orthogonal to every other
row's, and scores ``GAIN`` nats with the keys that carry its code, about 0 with all others.
Its output is then the mean of the few values behind those keys:

- the first and the last token of the pages assigned to it, of every page of the sequence;
- for one row of each token, the first and the last key it may see (the edges of window,
  context and causality).

The keys one beyond these edges carry that row's code too, and must not be found.

One row finds at most a few dozen pages, so a long context is asked by several rounds of
queries against the same pages.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from . import dtypes
from .arrays import assemble, page_tables, share_prefixes
from .call import Call
from .problem import Problem
from .tables import Entry

#: Nats between a needle and a key of another row.
GAIN = 24.0

#: Pages that one row finds, unless there are not enough codes.
PAGES_PER_ROW = 8


@dataclass(frozen=True)
class Row:
    """A query row that takes part: its code and the keys ``[first, end)`` it may see."""

    code: int
    round: int
    token: int  # in its sequence
    head: int  # in its group
    first: int
    end: int

    def sees(self, position: int) -> bool:
        return self.first <= position < self.end


def build(case: Call) -> list[Problem]:
    """The rounds of a needle case: same pages, other queries."""
    rng = np.random.default_rng([case.seed, 5])
    entries = page_tables(case).entries
    num_codes = _num_codes(case, entries)
    rows = [_rows(case, s, num_codes) for s in range(len(case.sequences))]
    rounds = 1 + max((row.round for own in rows for row in own), default=0)
    keys, values, bases = _hay(case, rng)
    for s, own in enumerate(entries):
        carried = _plant(case, s, own, rows[s], rng)
        for h in range(case.num_kv_heads):
            _write(keys[s], values[s], h, bases[s][h], carried, rng)
        share_prefixes(case, s, keys)
        share_prefixes(case, s, values)
    keys = [dtypes.round_to(k, case.dtype) for k in keys]
    values = [dtypes.round_to(v, case.dtype) for v in values]
    queries = [_queries(case, r, rows, bases, rng) for r in range(rounds)]
    problem = assemble(case, queries[0], keys, values)
    return [problem] + [problem.with_queries(q) for q in queries[1:]]


def _num_codes(case: Call, entries: list[list[Entry]]) -> int:
    """Codes in use: one row for ``PAGES_PER_ROW`` pages, and no more than dimensions."""
    pages = max((len(own) for own in entries), default=0)
    most_rows = max((n for n, _ in case.sequences), default=0) * case.gqa_factor
    wanted = max(-(-pages // PAGES_PER_ROW), min(most_rows, 16), 2)
    return min(wanted, case.head_dim)


def _rows(case: Call, s: int, num_codes: int) -> list[Row]:
    """The rows of one KV head of a sequence that have a code, round after round."""
    query_len, context_len = case.sequences[s]
    if query_len == 0 or context_len == 0:
        return []
    tokens = _probed_tokens(query_len, max(1, num_codes // case.gqa_factor))
    per_round = len(tokens) * case.gqa_factor
    rows = []
    for code in range(num_codes):
        token = tokens[code % per_round // case.gqa_factor]
        position = context_len - query_len + token
        window = case.sliding_window
        first = 0 if window is None else max(0, position - window + 1)
        end = position + 1 if case.causal else context_len
        head = code % case.gqa_factor
        rows.append(Row(code, code // per_round, token, head, first, end))
    return rows


def _probed_tokens(query_len: int, most: int) -> list[int]:
    """At most ``most`` tokens, spread over the query, the last one always among them."""
    count = min(query_len, most)
    return sorted({query_len - 1 - i * query_len // count for i in range(count)}, reverse=True)


def _hay(case: Call, rng):
    """Background keys and values, and one orthogonal basis per KV head and prefix family."""
    keys, values = [], []
    bases: list[np.ndarray] = []
    for s, (_, context_len) in enumerate(case.sequences):
        shape = (context_len, case.num_kv_heads)
        keys.append(rng.standard_normal((*shape, case.head_dim), np.float32) / 2)
        values.append(rng.standard_normal((*shape, case.value_dim), np.float32) / 4)
        root = min((f for f, last, _ in case.prefixes if f <= s < last), default=s)
        bases.append(bases[root] if root < s else _bases(case, rng))
    return keys, values, bases


def _bases(case: Call, rng) -> np.ndarray:
    """``[num_kv_heads, codes, head_dim]``, rows orthogonal and of norm ``head_dim ** 0.5``."""
    square = rng.standard_normal((case.num_kv_heads, case.head_dim, case.head_dim))
    return np.linalg.qr(square)[0].astype(np.float32) * np.float32(case.head_dim**0.5)


def _plant(case: Call, s: int, entries: list[Entry], rows: list[Row], rng) -> dict[int, set[int]]:
    """``position -> codes`` that its key carries."""
    carried: dict[int, set[int]] = {}
    context_len = case.sequences[s][1]
    found = {row.code: 0 for row in rows}
    for entry in entries:
        finder = _finder(entry, rows, found, rng)
        for position in {max(entry.start, 0), entry.end - 1}:
            row = finder if finder and finder.sees(position) else _any_row(position, rows)
            if row:
                found[row.code] += 1
                carried.setdefault(position, set()).add(row.code)
    for row in {row.token: row for row in rows}.values():
        for edge in (row.first - 1, row.first, row.end - 1, row.end):
            if 0 <= edge < context_len:
                carried.setdefault(edge, set()).add(row.code)
    return carried


def _finder(entry: Entry, rows: list[Row], found: dict[int, int], rng) -> Row | None:
    """The least busy row that sees both ends of an entry."""
    able = [r for r in rows if r.sees(entry.start) and r.sees(entry.end - 1)]
    return min(able, key=lambda r: (found[r.code], rng.random()), default=None)


def _any_row(position: int, rows: list[Row]) -> Row | None:
    return next((row for row in rows if row.sees(position)), None)


def _write(keys, values, h: int, basis, carried: dict[int, set[int]], rng) -> None:
    for position, codes in carried.items():
        keys[position, h] = basis[sorted(codes)].sum(axis=0)
        values[position, h] = rng.standard_normal(values.shape[2], np.float32)


def _queries(case: Call, number: int, rows: list[list[Row]], bases, rng) -> np.ndarray:
    """q of one round: codes where a row takes part, weak random queries elsewhere."""
    shape = (case.num_tokens, case.num_q_heads, case.head_dim)
    q = rng.standard_normal(shape, np.float32) * np.float32(0.1)
    gain = np.float32(GAIN / (case.head_dim * case.softmax_scale))
    begin = 0
    for s, (query_len, _) in enumerate(case.sequences):
        for row in rows[s]:
            if row.round == number:
                for h in range(case.num_kv_heads):
                    head = h * case.gqa_factor + row.head
                    q[begin + row.token, head] = gain * bases[s][h][row.code]
        begin += query_len
    return dtypes.round_to(q, case.dtype)
