"""Malformed metadata: every such call is a typed error of the one form, and changes nothing.

Two ways to find trouble. ``spoilt`` takes sound calls and spoils one thing about each, so
that an error is certain. ``random_tables`` draws tables and lengths freely and asks
``is_sound``, which knows the rules and shares no code with the library, which answer is right.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from .malformed import Call, sound_calls, spoils_of

#: ``[function] name must <what>, <why>; got <what>.``
FORM = re.compile(r"^\[(?P<op>\w+)\] .* must (?s:.*); got (?s:.+)\.$")

_FAR = (2**31 - 1, -(2**31))


@dataclass(frozen=True)
class Mistake:
    """A call that was answered wrongly."""

    call: Call
    wrong: str  # what is wrong with the call
    answer: str

    def __str__(self):
        return f"{self.call.op} with {self.wrong}: {self.answer}\n{self.snippet}"

    @property
    def snippet(self) -> str:
        arguments = ", ".join(f"{n}={_source(v)}" for n, v in self.call.arguments.items())
        imports = "import mlx.core as mx\nimport numpy as np\nfrom paged_mlx import fast\n"
        return f"{imports}fast.{self.call.op}({arguments})"


def spoilt(count: int, seed: int = 0) -> Iterator[tuple[Call, str]]:
    """``count`` calls with one thing spoilt, each kind of call in turn; and what is wrong."""
    rng = np.random.default_rng([seed, 8])
    menu = [(call, list(spoils_of(call).items())) for call in sound_calls()]
    contents = [_contents(call) for call, _ in menu]
    for i in range(count):
        sound, spoils = menu[i % len(menu)]
        call = sound.copy()
        name, spoil = spoils[(i // len(menu)) % len(spoils)]
        spoil(call.arguments, rng)
        yield call, name
    for (call, _), before in zip(menu, contents):
        assert _contents(call) == before, f"a refused {call.op} changed an array"


def _contents(call: Call) -> list[bytes]:
    """The bytes of every array of a call; the spoilt calls share them."""
    values = call.arguments.values()
    listed = [item for v in values for item in (v if isinstance(v, list) else [v])]
    return [bytes(memoryview(item)) for item in listed if isinstance(item, mx.array)]


def run(count: int, *, stream=None, seed: int = 0) -> list[Mistake]:
    """Try ``count`` malformed calls, and as many random tables; the mistakes found.

    Args:
        stream: Where the operations would run.
    """
    mistakes = [m for call, wrong in spoilt(count, seed) if (m := refuse(call, wrong, stream))]
    mistakes += [m for call in random_tables(count, seed) if (m := decide(call))]
    return mistakes


def refuse(call: Call, wrong: str, stream=None) -> Mistake | None:
    """Make a call that must be refused."""
    answer = _answer(call, stream)
    if isinstance(answer, ValueError):
        message = FORM.match(str(answer))
        if message and message["op"] == call.op:
            return None
        return Mistake(call, wrong, f"an error of another form: {answer}")
    if isinstance(answer, Exception):
        return Mistake(call, wrong, f"{type(answer).__name__}: {answer}")
    return Mistake(call, wrong, "accepted")


def decide(call: Call) -> Mistake | None:
    """Make a call that may be sound; the answer must be the one ``is_sound`` gives."""
    if not is_sound(call.arguments):
        return refuse(call, "random tables that are not sound")
    answer = _answer(call, None)
    if isinstance(answer, Exception):
        return Mistake(call, "random tables that are sound", f"refused: {answer}")
    return None


def _answer(call: Call, stream):
    """What the call returns or raises. Nothing is evaluated."""
    from paged_mlx import fast

    where = {} if call.op == "plan" else {"stream": stream}
    try:
        return getattr(fast, call.op)(**call.arguments, **where)
    except Exception as error:
        return error


def random_tables(count: int, seed: int = 0) -> Iterator[Call]:
    """Calls of ``plan`` with tables and lengths drawn freely, about half of them sound."""
    rng = np.random.default_rng([seed, 9])
    for _ in range(count):
        yield Call("plan", _random_arguments(rng))


def _random_arguments(rng: np.random.Generator) -> dict:
    batch, columns, page_size = (int(n) for n in rng.integers((1, 1, 1), (4, 5, 6)))
    num_pages = int(rng.integers(1, 12))
    lens = rng.integers(0, columns * page_size + 1, batch)
    query_lens = np.minimum(rng.integers(0, 4, batch), np.where(lens > 0, lens, 3))
    arguments = {
        "num_q_heads": 2,
        "num_kv_heads": 1,
        "page_size": page_size,
        "num_pages": num_pages,
        "block_tables": rng.integers(0, num_pages, (batch, columns)).astype(np.int32),
        "context_lens": lens.astype(np.int32),
        "cu_seqlens_q": np.concatenate([[0], np.cumsum(query_lens)]).astype(np.int32),
        "sliding_window": int(rng.integers(1, 9)) if rng.random() < 0.5 else None,
        "causal": bool(rng.random() < 0.8),
    }
    if rng.random() < 0.4:
        _make_ragged(arguments, rng)
    _disturb(arguments, rng)
    return arguments


def _make_ragged(arguments: dict, rng) -> None:
    shape, page_size = arguments["block_tables"].shape, arguments["page_size"]
    page_lens = rng.integers(1, page_size + 1, shape).astype(np.int32)
    page_starts = (np.cumsum(page_lens, axis=1) - page_lens).astype(np.int32)
    if rng.random() < 0.3:
        page_starts += rng.integers(0, 3)
    arguments |= {"page_starts": page_starts, "page_lens": page_lens}


def _disturb(arguments: dict, rng) -> None:
    """Change up to two numbers to something that may or may not matter."""
    names = ["block_tables", "context_lens", "cu_seqlens_q", "page_starts", "page_lens"]
    for _ in range(int(rng.integers(0, 3))):
        name = str(rng.choice([n for n in names if n in arguments]))
        array = arguments[name]
        at = tuple(int(rng.integers(n)) for n in array.shape)
        total = name == "cu_seqlens_q" and at[0] == len(array) - 1
        array[at] = rng.choice(_near(array[at]) if total else [*_near(array[at]), *_FAR])


def _near(value) -> list[int]:
    """Small numbers; the plan of a huge total of empty rows is sound, and only large."""
    return [max(value, 1 - 2**31) - 1, min(value, 2**31 - 2) + 1, -1, 0, 12]


def is_sound(a: dict) -> bool:
    """The rules of tables and lengths, from their definition."""
    bounds, lens = a["cu_seqlens_q"].tolist(), a["context_lens"].tolist()
    if bounds[0] != 0 or any(x > y for x, y in zip(bounds, bounds[1:])):
        return False
    return all(_is_sound_sequence(a, s, bounds[s + 1] - bounds[s]) for s in range(len(lens)))


def _is_sound_sequence(a: dict, s: int, query_len: int) -> bool:
    context_len = int(a["context_lens"][s])
    if context_len < 0 or (context_len > 0 and query_len > context_len):
        return False
    if context_len == 0 or query_len == 0:
        return True
    window = a["sliding_window"]
    first = 0 if window is None else max(0, context_len - query_len - window + 1)
    entries = _entries(a, s)
    expected = None
    for page_id, start, length in entries:
        if not 0 <= length <= a["page_size"]:
            return False
        if start > first if expected is None else start != expected:
            return False
        if start < 0:
            return False
        expected = start + length
        if expected > first and not 0 <= page_id < a["num_pages"]:
            return False
        if expected >= context_len:
            return True
    return False


def _entries(a: dict, s: int) -> list[tuple[int, int, int]]:
    """``(page_id, first position, tokens)`` of each column."""
    pages = a["block_tables"][s].tolist()
    if "page_starts" in a:
        return list(zip(pages, a["page_starts"][s].tolist(), a["page_lens"][s].tolist()))
    size = a["page_size"]
    return [(page_id, i * size, size) for i, page_id in enumerate(pages)]


def _source(value) -> str:
    """Python that makes an argument."""
    if isinstance(value, mx.array):
        return f"mx.zeros({value.shape}, {str(value.dtype).replace('mlx.core', 'mx')})"
    if isinstance(value, np.ndarray):
        return f"np.array({value.tolist()}, np.{value.dtype})"
    if isinstance(value, list):
        return f"[{', '.join(_source(item) for item in value)}]"
    return repr(value).replace("nan", "float('nan')").replace("inf", "float('inf')")
