"""Where mlx-lm begins, reads and ends prompts: the seams for shared prefixes.

Each passes through unless the model is enabled.
"""

import contextlib
import logging
import sys

import mlx.core as mx
import mlx_lm
from mlx_lm.models import cache as stock

from paged_mlx.errors import fail
from paged_mlx.mlx_lm import batch_hooks, prompt_files, seams, versions
from paged_mlx.mlx_lm.model_seam import paged_model_of
from paged_mlx.mlx_lm.prefixes import layers_of
from paged_mlx.mlx_lm.prompt_run import PromptRun, prefixes_of, tokens_in

log = logging.getLogger("paged_mlx")

_installed = 0
_SHOWS_WHOLE_PROMPTS = versions.is_at_least(mlx_lm.__version__, versions.SHOWS_WHOLE_PROMPTS)

# K and V that do not follow from the tokens, or do not stay in pages.
NOT_BY_TOKENS = ("input_embeddings", "max_kv_size", "kv_bits")


def install() -> None:
    """Put the seams in place, once however often it is asked for."""
    global _installed
    if not _installed:
        import mlx_lm.generate  # noqa: F401

        module = sys.modules["mlx_lm.generate"]
        seams.replace_body(module, "generate_step", _generate_step)
        seams.replace_body(module, "speculative_generate_step", _speculative_generate_step)
        seams.replace_body(stock, "save_prompt_cache", _save_prompt_cache)
        batch_hooks.install(module)
        if hasattr(stock, "LRUPromptCache"):
            seams.replace(stock.LRUPromptCache, "insert_cache", _insert_cache)
    _installed += 1


def uninstall() -> None:
    """Undo one ``install``; the last one leaves mlx-lm as it was."""
    global _installed
    _installed -= 1
    if not _installed:
        seams.put_back()


# One sequence


def _generate_step(before):
    def generate_step(*args, **options):
        given = seams.arguments(before, args, options)
        _check_cache(given)
        with _passes_of(given["model"]):
            yield from steps(given)

    def steps(given):
        run = _run_of(given)
        if run is None:
            yield from before(**given)
            return
        run.count()
        callback, count = given.get("prompt_progress_callback"), len(run.tokens) - run.start
        progress = None if callback is None else lambda done: callback(done, count)
        with mx.stream(_stream(before, given)):
            run.read(len(run.tokens) - 1, given["prefill_step_size"], progress)
        prompt = mx.array(given["prompt"])
        read, given["prompt"] = prompt[: run.num_read], prompt[run.num_read :]
        given["prompt_cache"] = run.prompt_cache
        if callback is not None:
            given["prompt_progress_callback"] = lambda done, total: callback(
                count - total + done, count
            )
        if given.get("logits_processors") and _SHOWS_WHOLE_PROMPTS:
            given["logits_processors"] = [_after(read, p) for p in given["logits_processors"]]
        yield from _steps(before(**given), [run])

    return generate_step


def _check_cache(given) -> None:
    """Refuse the pages of another model, and tell of a cache that is on no pages."""
    prompt_cache = given["prompt_cache"]
    layers = list(layers_of(prompt_cache or []))
    for layer in layers:
        if layer.group.passes.model() is not given["model"]:
            fail("generate_step", "prompt_cache must be of this model", layer)
    if paged_model_of(given["model"]) is not None and prompt_cache and not layers:
        log.info("a prompt cache of mlx-lm's own is used as it is; from_stock puts it on pages")


@contextlib.contextmanager
def _passes_of(*models):
    """A generation: afterwards other threads need not wait for this one."""
    try:
        yield
    finally:
        for paged in filter(None, map(paged_model_of, models)):
            paged.passes.end()


def _run_of(given) -> PromptRun | None:
    """The run of a prompt that prefixes know of, or are to know of."""
    by_tokens = all(given.get(name) is None for name in NOT_BY_TOKENS)
    if prefixes_of(given["model"]) is None or not by_tokens or not len(given["prompt"]):
        return None
    return PromptRun.of(given["model"], given["prompt_cache"], _listed(given["prompt"]))


def _after(read: mx.array, processor):
    """A processor of logits that is shown the tokens read before, too."""
    return lambda tokens, logits: processor(mx.concatenate([read, tokens]), logits)


def _speculative_generate_step(before):
    def speculative_generate_step(*args, **options):
        given = seams.arguments(before, args, options)
        _check_rewinds(given)
        with _passes_of(given["model"], given["draft_model"]):
            yield from steps(given)

    def steps(given):
        runs = _speculative_runs(given)
        if runs is None:
            yield from before(**given)
            return
        with mx.stream(_stream(before, given)):
            for run in reversed(runs):
                run.count()
                run.read(len(run.tokens) - 1, given["prefill_step_size"])
        given["prompt"] = mx.array(given["prompt"])[-1:]
        given["prompt_cache"] = [cache for run in runs for cache in run.prompt_cache]
        yield from _steps(before(**given), runs)

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


def _speculative_runs(given) -> list[PromptRun] | None:
    """The runs of the model and of its draft, read apart: they may know different beginnings."""
    models = given["model"], given["draft_model"]
    by_tokens = all(given.get(name) is None for name in NOT_BY_TOKENS)
    if prefixes_of(models[0]) is None or not by_tokens or not len(given["prompt"]):
        return None
    if given["prompt_cache"] is None:
        caches = [stock.make_prompt_cache(model) for model in models]
    else:
        count = len(models[0].layers)
        caches = [given["prompt_cache"][:count], given["prompt_cache"][count:]]
    before = [_before(model, cache) for model, cache in zip(models, caches)]
    if None in before or len(caches[0]) != len(models[0].layers):
        return None
    if not stock.can_trim_prompt_cache(caches[0]):
        return None
    prompt = _listed(given["prompt"])
    return [PromptRun(*of, tokens, prompt) for *of, tokens in zip(models, caches, before)]


def _before(model, prompt_cache) -> list[int] | None:
    """The tokens that a cache holds, [] for one that is not known and empty."""
    if prefixes_of(model) is not None:
        return tokens_in(paged_model_of(model), prompt_cache)
    return [] if all(cache.empty() for cache in prompt_cache) else None


def _steps(steps, runs: list[PromptRun]):
    """The steps as they come; unless one fails, what the caches hold is remembered then."""
    failed = True
    try:
        with contextlib.closing(steps):
            for step in steps:
                for run in runs:
                    run.tokens.append(int(step[0]))
                failed = False
                yield step
                failed = True
        failed = False
    finally:
        for run in runs if not failed else ():
            run.finish()


def _stream(function, given):
    """The stream that the call computes on; older versions of mlx-lm have only one."""
    return given.get("stream") or function.__globals__["generation_stream"]


def _listed(prompt) -> list[int]:
    return prompt.tolist() if isinstance(prompt, mx.array) else list(prompt)


def _save_prompt_cache(before):
    def save_prompt_cache(*args, **options):
        given = seams.arguments(before, args, options)
        if any(True for _ in layers_of(given["cache"])):
            given["cache"] = prompt_files.to_stock(given["cache"])
        return before(**given)

    return save_prompt_cache


# Prompt caches put aside


def _insert_cache(before):
    def insert_cache(self, model, tokens, prompt_cache, **options):
        layers = list(layers_of(prompt_cache))
        if layers:
            tokens = _agree(tokens, prompt_cache)
        for layer in layers:
            layer.stored = True
        return before(self, model, tokens, prompt_cache, **options)

    return insert_cache


def _agree(tokens: list[int], prompt_cache: list) -> list[int]:
    """Have all caches hold the same tokens, and return those.

    mlx-lm's server puts a speculative answer aside with its last token, which is in no cache
    if it was not the draft's; a draft's cache may lack one more.
    """
    counting = [cache for cache in prompt_cache if isinstance(getattr(cache, "offset", None), int)]
    length = min([len(tokens), *(cache.offset for cache in counting)])
    for cache in counting:
        if cache.offset > length and cache.is_trimmable():
            cache.trim(cache.offset - length)
    return tokens[:length]
