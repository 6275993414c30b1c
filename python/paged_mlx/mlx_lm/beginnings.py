"""The places where mlx-lm begins to read a prompt: its cached beginning is not read again.

Three functions of ``mlx_lm.generate``, replaced by name while a model is enabled with
``prefix_cache=True``; each passes on what is not that model's.
"""

import contextlib
import inspect
import sys
from typing import Any

import mlx.core as mx
import mlx_lm.generate  # noqa: F401
from mlx_lm.models import cache as stock

from paged_mlx.errors import fail
from paged_mlx.forward.seams import Seam
from paged_mlx.mlx_lm.model_seam import paged_model_of
from paged_mlx.mlx_lm.prefixes import NO_TOKEN, layers_of
from paged_mlx.mlx_lm.versions import SHOWS_WHOLE_PROMPTS, is_at_least

GENERATE = sys.modules["mlx_lm.generate"]
_SHOWS_WHOLE_PROMPTS = is_at_least(mlx_lm.__version__, SHOWS_WHOLE_PROMPTS)

# K and V that do not follow from the tokens, or do not stay in pages.
NOT_BY_TOKENS = ("input_embeddings", "max_kv_size", "kv_bits")


def _prompts_of(model):
    paged = paged_model_of(model)
    return None if paged is None else paged.prompts


_SIGNATURES = {
    name: inspect.signature(getattr(GENERATE, name))
    for name in ("generate_step", "speculative_generate_step")
}


def _bind(name: str, args, options) -> inspect.BoundArguments:
    """A call's arguments by their names, defaults too."""
    call = _SIGNATURES[name].bind(*args, **options)
    call.apply_defaults()
    return call


# One sequence


def _generate_step(before):
    def generate_step(*args, **options):
        if SEAMS[0].ours is not generate_step:
            yield from before(*args, **options)
            return
        call = _bind("generate_step", args, options)
        given = call.arguments
        model, prompt = given["model"], given["prompt"]
        paged = paged_model_of(model)
        size = given.get("max_kv_size")
        if paged is not None and size is not None and given["prompt_cache"] is None:
            given["prompt_cache"] = paged.rotating_cache(size)
        if _prompts_of(model) is None or not len(prompt) or _is_not_by_tokens(paged, given):
            yield from before(*call.args, **call.kwargs)
            return
        if given["prompt_cache"] is None:
            given["prompt_cache"] = stock.make_prompt_cache(model)
        asked = _listed(prompt)
        with mx.stream(given.get("stream") or GENERATE.generation_stream):
            known = _begin(paged, given["prompt_cache"], asked, given["prefill_step_size"])
        if known:
            _show_what_is_known(given, mx.array(prompt), known)
        yield from before(*call.args, **call.kwargs)

    return generate_step


def _is_not_by_tokens(paged, given) -> bool:
    others = [name for name in NOT_BY_TOKENS if given.get(name) is not None]
    if others:
        paged.prefixes.decline(f"{others[0]} is given")
    return bool(others)


def _show_what_is_known(given: dict, prompt: mx.array, known: int) -> None:
    """Leave the first tokens out, and show them all the same to those who look on."""
    given["prompt"], total = prompt[known:], len(prompt)
    told = given["prompt_progress_callback"]
    if told is not None:
        given["prompt_progress_callback"] = lambda done, _: told(known + done, total)
    if given["logits_processors"] and _SHOWS_WHOLE_PROMPTS:
        given["logits_processors"] = [
            lambda tokens, logits, each=each: each(mx.concatenate([prompt[:known], tokens]), logits)
            for each in given["logits_processors"]
        ]


def _begin(paged, prompt_cache: list, prompt: list[int], chunk: int, upto: int = 0) -> int:
    """Have a prompt cache hold what is known of the prompt that is about to be read into it, and
    read on to where recurrent states must be kept, and to ``upto``.

    Returns:
        How many tokens of the prompt it holds then: less than all.
    """
    whole = _whole(paged, prompt_cache, prompt)
    if not paged.ranks.all("the cache is known", whole is not None) or whole is None:
        return 0
    start, prefixes = len(whole) - len(prompt), paged.prefixes
    known = prefixes.begin(whole, prompt_cache)
    prefixes.count(len(prompt), known - start)
    keys = next(layers_of(prompt_cache)).rows[0].history.keys
    stops = [start + upto]
    if prefixes.checkpoints is not None:
        stops.insert(0, prefixes.parting(whole, keys))
    for stop in stops:
        _read(paged.model, prompt_cache, whole[:stop], known, chunk)
        known = max(known, stop)
    return known - start


def _whole(paged, prompt_cache: list, prompt: list[int], row: int = 0) -> list[int] | None:
    """All tokens that a row will hold; None if those that it holds are not known."""
    layers = list(layers_of(prompt_cache))
    if not layers or layers[0].group.passes is not paged.passes:
        return None
    held, history = int(layers[0].lens[row]), layers[0].rows[row].history
    before = history.first(held)
    empty = held or all(c.empty() for c in prompt_cache if not any(True for _ in layers_of([c])))
    is_known = not held or history.generation == paged.prefixes.generation
    if before is None or not is_known or not empty:
        paged.prefixes.decline("what the cache holds already is not known")
        return None
    return before + prompt


def _read(model, prompt_cache: list, tokens: list[int], start: int, chunk: int) -> None:
    """Read tokens as mlx-lm reads prompts."""
    while start < len(tokens):
        model(mx.array([tokens[start : start + chunk]]), cache=prompt_cache)
        mx.eval([cache.state for cache in prompt_cache])
        mx.clear_cache()
        start += chunk


def _speculative_generate_step(before):
    def speculative_generate_step(*args, **options):
        call = _bind("speculative_generate_step", args, options)
        given = call.arguments
        model, draft, prompt = given["model"], given["draft_model"], _listed(given["prompt"])
        _check_rewinds(given)
        if _prompts_of(model) is not None and prompt and given["kv_bits"] is None:
            cache = given["prompt_cache"]
            if cache is None:
                cache = stock.make_prompt_cache(model) + stock.make_prompt_cache(draft)
            split, chunk = len(model.layers), given["prefill_step_size"]
            ours, theirs = cache[:split], cache[split:]
            if stock.can_trim_prompt_cache(ours):
                with mx.stream(given.get("stream") or GENERATE.generation_stream):
                    drafts = 0
                    if _prompts_of(draft) is not None:
                        drafts = _begin(paged_model_of(draft), theirs, prompt, chunk)
                    paged = paged_model_of(model)
                    _, upto = paged.ranks.spread("the draft's tokens", drafts)
                    known = _begin(paged, ours, prompt, chunk, upto=upto)
                    _read(draft, theirs, prompt[:known], drafts, chunk)
                given["prompt"], given["prompt_cache"] = mx.array(prompt)[known:], ours + theirs
        with contextlib.closing(before(*call.args, **call.kwargs)) as steps:
            yield from steps

    return speculative_generate_step


def _check_rewinds(given) -> None:
    """A window must keep what speculation takes back; mlx-lm would go on with wrong tokens."""
    for name in ("model", "draft_model"):
        paged = paged_model_of(given[name])
        for group in paged.groups.values() if paged is not None else ():
            kept = group.retain
            if group.window is not None and kept is not None and kept < given["num_draft_tokens"]:
                must = f"num_draft_tokens must be at most {kept}, enable's retain for the {name}"
                fail("speculative_generate_step", must, given["num_draft_tokens"])


def _listed(prompt) -> list[int]:
    tokens: Any = prompt.tolist() if isinstance(prompt, mx.array) else prompt
    return list(tokens)


# A batch


def _prompt(before):
    def prompt(self, tokens):
        prompts = _prompts_of(self.model)
        paged = any(True for _ in layers_of(self.prompt_cache))
        if not tokens or prompts is None or not paged or len(tokens) != len(self.uids):
            return before(self, tokens)
        if prompts.padding_is_seen():
            return before(self, tokens)
        for piece in _pieces(self, prompts, _without_known(self, prompts, tokens)):
            if any(piece):
                before(self, piece)

    return prompt


def _without_known(batch, prompts, tokens: list[list[int]]) -> list[list[int]]:
    """The tokens of a pass that are not known; what several rows begin with is read once."""
    prefixes, rest = prompts.prefixes, []
    whole = _wholes(batch, prompts, tokens)
    _read_common(batch, prompts, [each for each in whole if each is not None])
    for row, (new, each) in enumerate(zip(tokens, whole)):
        if each is None:
            rest.append(new)
            continue
        start = len(each) - len(new)
        known = prefixes.begin([*each, NO_TOKEN], batch.prompt_cache, row) - start
        prefixes.count(len(new), known)
        batch.tokens[row] += new[:known]
        rest.append(new[known:])
    return rest


def _wholes(batch, prompts, tokens: list[list[int]]) -> list[list[int] | None]:
    """All tokens that each row will hold; None where some rank does not know those it holds."""
    whole = [_whole(prompts.paged, batch.prompt_cache, new, i) for i, new in enumerate(tokens)]
    known = prompts.paged.ranks.least("rows are known", *[each is not None for each in whole])
    return [each if ours else None for each, ours in zip(whole, known)]


def _read_common(batch, prompts, whole: list[list[int]]) -> None:
    layer = next(layers_of(batch.prompt_cache))
    keys = {row.history.keys for row in layer.rows}
    ordered, size = sorted(whole) if len(keys) == 1 else [], layer.group.page_size
    for prompt, following in zip(ordered, ordered[1:]):
        common = _common_length(prompt, following) // size * size
        begun = [*prompt[:common], NO_TOKEN]
        is_known = all(prompts.prefixes.known(p, *keys) >= common for p in (prompt, following))
        if not is_known and common > int(layer.lens.min()):
            cache = prompts.paged.make_cache(*keys)
            known = prompts.prefixes.begin(begun, cache)
            _read(batch.model, cache, prompt[:common], known, batch.prefill_step_size)
            prompts.prefixes.remember(prompt[:common], cache)
            prompts.prefixes.count(0, known - common)


def _common_length(left: list[int], right: list[int]) -> int:
    for i, (a, b) in enumerate(zip(left, right)):
        if a != b:
            return i
    return min(len(left), len(right))


def _pieces(batch, prompts, tokens: list[list[int]]) -> list[list[list[int]]]:
    """The tokens of a pass, in several where recurrent states must be kept on the way."""
    if prompts.prefixes.checkpoints is None:
        return [tokens]
    cuts = {max(map(len, tokens))}
    for row, (new, whole) in enumerate(zip(tokens, _wholes(batch, prompts, tokens))):
        if whole is not None:
            keys = next(layers_of(batch.prompt_cache)).rows[row].history.keys
            begun = [*whole, NO_TOKEN]  # a prompt that goes on as known ones do does not part here
            parting = prompts.prefixes.parting(begun, keys) - (len(whole) - len(new))
            cuts.update([parting] if 0 < parting < len(new) else [])
    ends = sorted(cuts)
    return [[new[a:b] for new in tokens] for a, b in zip([0, *ends], ends)]


WHEN = "`prefix_cache=True`"
SEAMS = [
    Seam(
        GENERATE,
        "generate_step",
        _generate_step,
        WHEN,
        "reads the tokens of a prompt that are not cached",
    ),
    Seam(
        GENERATE,
        "speculative_generate_step",
        _speculative_generate_step,
        WHEN,
        "the same, for the model and its draft",
    ),
    Seam(
        GENERATE.PromptProcessingBatch,
        "prompt",
        _prompt,
        WHEN,
        "reads, for each row, the tokens that are not cached",
    ),
]
