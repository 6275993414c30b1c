"""One model of the zoo on mlx-lm's own caches and on pages: what was equal, and what was read."""

import contextlib
from collections import Counter
from dataclasses import dataclass, field

import mlx.core as mx
import mlx_lm
import mlx_lm_zoo as zoo
from paged_mlx.mlx_lm import PagedKVCache, enable, layout
from paged_mlx.mlx_lm.explain import OWN_ATTENTION

LENGTHS = (5, 33, 17)
MAX_TOKENS = (8, 3, 6)
LATE = {2: 2}
MODES = ("single", "batched", "speculative")

# mlx-lm lets the padding of a batch into their recurrent state, or adds a mask that is no number,
# so that a padded prompt is answered otherwise than alone: rows that are not padded are compared.
PADDING_LEAKS = {
    *("baichuan_m1", "bailing_moe_linear", "jamba", "longcat_flash_ngram", "olmo_hybrid"),
    *("phi3small", "recurrent_gemma"),
}
NOT_PADDED = (1, 2)  # of LENGTHS: the longest, and one that joins later
# Their answers depend on how many tokens are read at once: for the same mask, or because the
# mask lets tokens that are read together see past the window. Speculation is not greedy decoding.
READS_AHEAD = {"phi3small", "plamo3"}
SHORT = {"plamo3": 9}  # prompts of speculation that stay within the window
if mlx_lm.__version__.startswith("0.31."):
    PADDING_LEAKS |= {"afm7", "falcon_h1", "granitemoehybrid", "kimi_linear", "plamo2"}
    # There its shared layers rotate queries by the position after the step.
    READS_AHEAD, SHORT = READS_AHEAD | {"gemma3n"}, SHORT | {"gemma3n": 9}
# It adds its mask, which may be a string: mlx-lm can read its prompts a token at a time.
CHUNK = {"olmo": 1}
REFUSALS = (ValueError, AttributeError, TypeError)
# Largest difference of log-probabilities, of the largest of them, by what the model computes in.
TOLERANCE = 1e-4
HALF = {"muse_spark": 0.05, "prism_hadamard_qwen35": 0.01}


@dataclass
class Answer:
    """Tokens of each prompt, or why there are none."""

    tokens: list = field(default_factory=list)
    logprobs: list = field(default_factory=list)
    refused: str | None = None


def answer(name: str, mode: str, model, draft=None) -> Answer:
    """What a model of the zoo answers in one way of generating."""
    chunk, found = CHUNK.get(name, 16), Answer()
    try:
        if mode == "batched":
            prompts = [zoo.prompt(length, seed=length) for length in LENGTHS]
            found.tokens = zoo.batched(
                model, prompts, MAX_TOKENS, LATE, chunk, logprobs=found.logprobs
            )
            return found
        length = SHORT.get(name, 45) if mode == "speculative" else 45
        prompt, logprobs = zoo.prompt(length, seed=1), []
        options = dict(max_tokens=8, chunk=chunk, logprobs=logprobs)
        if mode == "single":
            tokens = zoo.single(model, prompt, **options)
        else:
            tokens = zoo.speculative(model, draft or model, prompt, num_draft=2, **options)
        return Answer([tokens], [logprobs])
    except REFUSALS as error:
        return Answer(refused=f"{type(error).__name__}: {error}")


def alone(name: str, model) -> Answer:
    """The prompts of the batch, one by one."""
    found, chunk = Answer(), CHUNK.get(name, 16)
    for length, count in zip(LENGTHS, MAX_TOKENS):
        found.logprobs.append([])
        prompt = zoo.prompt(length, seed=length)
        found.tokens.append(zoo.single(model, prompt, count, chunk, logprobs=found.logprobs[-1]))
    return found


def differences(name: str, expected: Answer, found: Answer, rows=None) -> list[str]:
    """What is not equal, of these rows."""
    if expected.refused or found.refused:
        same = expected.refused == found.refused
        return [] if same else [f"{expected.refused} on stock, {found.refused} on pages"]
    problems = []
    for row in range(len(expected.tokens)) if rows is None else rows:
        tokens = (expected.tokens[row], found.tokens[row])
        if tokens[0] != tokens[1]:
            problems.append(f"row {row}: {tokens[0]} on stock, {tokens[1]} on pages")
            continue
        error = largest_error(expected.logprobs[row], found.logprobs[row])
        if error > HALF.get(name, TOLERANCE):
            problems.append(f"row {row}: log-probabilities differ by {error:.1e}")
    return problems


def largest_error(expected: list, found: list) -> float:
    pair = [mx.stack(logprobs).astype(mx.float32) for logprobs in (expected, found)]
    pair = [mx.where(mx.isinf(x), 0, x) for x in pair]
    return float(mx.abs(pair[0] - pair[1]).max() / mx.abs(pair[0]).max())


@dataclass
class Report:
    """How a model did on pages.

    Attributes:
        problems: What was not as it must be, of each way of generating.
        notes: Where mlx-lm's own answer is refused or is another than plain greedy decoding.
        share: Reads of K and V that read pages, of all of them, in single generation.
        reasons: Why the others did not.
    """

    stock: dict
    problems: dict
    notes: list
    share: float
    reasons: list

    @property
    def cells(self) -> list[str]:
        return [*map(self._cell, MODES), f"{self.share:.0%}"]

    def _cell(self, mode: str) -> str:
        if self.problems[mode]:
            return "**differs**"
        return "stock refuses" if self.stock[mode].refused else "equal"


def report(name: str, thorough: bool = False, page_size: int = 8, **options) -> Report:
    """Run a model of the zoo in every way, on stock caches and on pages.

    Args:
        thorough: Also speculate with the model as its own draft, and look where stock's
            answers are not greedy decoding of one prompt.
        options: Of ``enable``.
    """
    model, family = zoo.tiny(name), name.split(":")[0]
    draft = zoo.tiny("llama", seed=7) if family != "phi3small" else None
    stock = {mode: answer(name, mode, model, draft) for mode in MODES}
    notes = _notes(name, model, stock) if thorough else []
    rows = NOT_PADDED if family in PADDING_LEAKS else None
    right = {mode: expected(family, mode, stock) for mode in MODES}
    problems, found = {}, {}
    with enable(model, page_size=page_size, **options) as paged, counted_writes() as writes:
        for mode in MODES:
            found[mode] = answer(name, mode, model, draft)
            compared = rows if mode == "batched" else None
            problems[mode] = differences(name, right[mode], found[mode], compared)
            if mode == "single":
                share, reasons = share_paged(paged, writes), reasons_of(paged, writes)
        if thorough and not stock["speculative"].refused:
            itself = answer(name, "speculative", model)
            problems["speculative"] += differences(name, right["speculative"], itself)
        paged.check()
        left = [group.pages_used for group in paged.groups.values()]
    if problems["batched"] and not found["batched"].refused:
        # Stock's batch may be refused, or wrong: what a prompt gets alone is right.
        problems["batched"] = differences(name, alone(name, model), found["batched"], rows)
    if any(left):
        problems["single"].append(f"pages are left in use: {left}")
    return Report(stock, problems, notes, share, reasons)


def expected(family: str, mode: str, stock: dict) -> Answer:
    """The right answer: stock's, but past a window its speculation is wrong, and greedy right."""
    greedy = mode == "speculative" and not stock[mode].refused and family not in READS_AHEAD
    return stock["single" if greedy else mode]


def _notes(name, model, stock) -> list[str]:
    """Where stock is refused or not itself."""
    refused = [(mode, stock[mode].refused) for mode in MODES if stock[mode].refused]
    notes = [f"{mode}: {error.partition(': ')[2].rstrip('.')}" for mode, error in refused]
    if not stock["batched"].refused and stock["batched"].tokens != alone(name, model).tokens:
        notes.append("stock answers otherwise in a batch than alone")
    if not stock["speculative"].refused and stock["speculative"].tokens != stock["single"].tokens:
        notes.append("stock's speculative answer is not the greedy one")
    return notes


@contextlib.contextmanager
def counted_writes():
    """Count the writes of each layer: (group, layer) -> number."""
    writes, before = Counter(), PagedKVCache.update_and_fetch

    def update_and_fetch(self, keys, values):
        writes[self.group, self.layer] += 1
        return before(self, keys, values)

    PagedKVCache.update_and_fetch = update_and_fetch
    try:
        yield writes
    finally:
        PagedKVCache.update_and_fetch = before


def share_paged(paged, writes: Counter) -> float:
    """Reads of K and V that read pages: a layer reads once a step, or as often as it attends."""
    calls = calls_of(paged)
    reads = sum(max(writes[layer], calls[layer]) for layer in writes)
    reads += len(left_to_stock(paged)) * max(writes.values())
    return paged.paged_calls / reads


def left_to_stock(paged) -> list[str]:
    """Why caches of K and V are mlx-lm's own, one reason for each that is."""
    reasons = (reason for _, reason in layout.unpaged(paged.stock_cache(), paged.layout.places))
    return [reason for reason in reasons if not reason.startswith("ArraysCache")]


def reasons_of(paged, writes: Counter) -> list[str]:
    """Why layers did not read pages."""
    left = layout.unpaged(paged.stock_cache(), paged.layout.places)
    reasons = {reason for _, reason in left}
    reasons |= set(paged.gathered_calls)
    if writes.keys() - calls_of(paged).keys():
        reasons.add(OWN_ATTENTION)
    return sorted(reasons)


def calls_of(paged) -> Counter:
    """Attention calls of each layer."""
    calls = Counter()
    for group in paged.groups.values():
        for (layer, _), count in group.calls.items():
            calls[group, layer] += count
    return calls
