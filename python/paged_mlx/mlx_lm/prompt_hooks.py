"""Where mlx-lm begins, reads and ends prompts: the seams for shared prefixes.

Each passes through unless the model is enabled.
"""

import contextlib
import inspect
import logging
import sys

import mlx.core as mx
from mlx_lm.models import cache as stock

from paged_mlx.errors import fail
from paged_mlx.mlx_lm import prompt_files, seams
from paged_mlx.mlx_lm.model_seam import paged_model_of
from paged_mlx.mlx_lm.prefixes import layers_of, rows_of
from paged_mlx.mlx_lm.prompt_run import PromptRun, prefixes_of, tokens_in
from paged_mlx.page_hash import TOKEN_BYTES

log = logging.getLogger("paged_mlx")

_installed = 0

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
        seams.replace(module.BatchGenerator, "insert_segments", _insert_segments)
        seams.replace(module.BatchGenerator, "_make_batch", _make_batch)
        seams.replace(module.PromptProcessingBatch, "prompt", _prompt)
        seams.replace(module.GenerationBatch, "extract_cache", _extract_cache)
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
        given = _arguments(before, args, options)
        _tell_of_stock_caches(given)
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
        if given.get("logits_processors"):
            given["logits_processors"] = [_after(read, p) for p in given["logits_processors"]]
        yield from _steps(before(**given), [run])

    return generate_step


def _tell_of_stock_caches(given) -> None:
    prompt_cache = given["prompt_cache"]
    ours = prompt_cache is None or any(True for _ in layers_of(prompt_cache))
    if paged_model_of(given["model"]) is not None and not ours:
        log.info("a prompt cache of mlx-lm's own is used as it is; from_stock puts it on pages")


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
        given = _arguments(before, args, options)
        _check_rewinds(given)
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


def _arguments(function, args, options) -> dict:
    """All arguments of a call by their names, defaults too."""
    call = inspect.signature(function).bind(*args, **options)
    call.apply_defaults()
    return call.arguments


def _stream(function, given):
    """The stream that the call computes on; older versions of mlx-lm have only one."""
    return given.get("stream") or function.__globals__["generation_stream"]


def _listed(prompt) -> list[int]:
    return prompt.tolist() if isinstance(prompt, mx.array) else list(prompt)


def _save_prompt_cache(before):
    def save_prompt_cache(*args, **options):
        given = _arguments(before, args, options)
        if any(True for _ in layers_of(given["cache"])):
            given["cache"] = prompt_files.to_stock(given["cache"])
        return before(**given)

    return save_prompt_cache


# Batches


def _insert_segments(before):
    def insert_segments(self, *args, **options):
        paged = paged_model_of(self.model)
        if paged is None or self.max_kv_size is not None:
            return before(self, *args, **options)
        given = _arguments(before, (self, *args), options)
        if given["caches"]:
            given["caches"] = [cache and _on_pages(paged, cache) for cache in given["caches"]]
        return before(**given)

    return insert_segments


def _on_pages(paged, prompt_cache: list) -> list:
    """A prompt cache that can be in a batch with those of an enabled model."""
    groups = {id(layer.group) for layer in layers_of(prompt_cache)}
    if not groups:
        return paged.from_stock(prompt_cache)
    if not groups <= {id(group) for group in paged.groups.values()}:
        fail("insert", "caches must be of this model", prompt_cache[:1])
    return prompt_cache


def _make_batch(before):
    def make_batch(self, n):
        prefixes = _batch_prefixes(self.model)
        if prefixes is not None and self.max_kv_size is None:
            _begin_waiting(self, prefixes, min(n, len(self._unprocessed_sequences)))
        return before(self, n)

    return make_batch


def _batch_prefixes(model):
    """What knows the model's prompts, unless a batch is no place to share them."""
    prefixes = prefixes_of(model)
    return None if prefixes is None or prefixes.padding_is_seen() else prefixes


def _begin_waiting(generator, prefixes, count: int) -> None:
    """Skip what is known of the prompts that are about to be read."""
    waiting = [generator._unprocessed_sequences[i] for i in range(count)]
    prompts = {}
    for i, (_, segments, _, prompt_cache, *_) in enumerate(waiting):
        before = tokens_in(paged_model_of(generator.model), prompt_cache)
        if before is not None:
            prompts[i] = [*before, *(token for part in segments for token in part)]
    _read_common(generator, list(prompts.values()))
    for i, tokens in prompts.items():
        uid, segments, limit, prompt_cache, told, *rest = waiting[i]
        held = next(layers_of(prompt_cache)).offset
        if not held or prefixes.known(tokens) > held:
            prompt_cache = stock.make_prompt_cache(generator.model)
            known = prefixes.begin(tokens, prompt_cache)
            prefixes.count(len(tokens) - held, known - held)
            told = [*told, *tokens[held:known]]
            segments = _without_first(segments, known - held)
            generator._unprocessed_sequences[i] = (
                uid, segments, limit, prompt_cache, told, *rest,
            )  # fmt: skip


def _read_common(generator, prompts: list[list[int]]) -> None:
    """Read once what several of these prompts begin with."""
    paged = paged_model_of(generator.model)
    size = next(iter(paged.groups.values())).page_size
    ordered = sorted(prompts)
    for prompt, following in zip(ordered, ordered[1:]):
        common = _common_length(prompt, following) // size * size
        begun = [*prompt[:common], -1]  # a token that no prompt has: nothing is left to compute
        if common > paged.prefixes.known(begun):
            run = PromptRun(generator.model, stock.make_prompt_cache(generator.model), [], begun)
            paged.prefixes.count(0, run.known - common)
            run.read(common, generator.prefill_step_size)


def _common_length(left: list[int], right: list[int]) -> int:
    for i, (a, b) in enumerate(zip(left, right)):
        if a != b:
            return i
    return min(len(left), len(right))


def _without_first(segments: list[list[int]], count: int) -> list[list[int]]:
    rest = []
    for segment in segments:
        rest.append(segment[count:])
        count = max(0, count - len(segment))
    return [segment for segment in rest if segment]


def _prompt(before):
    def prompt(self, tokens):
        prefixes = _batch_prefixes(self.model)
        paged = any(True for _ in layers_of(self.prompt_cache))
        if prefixes is None or not paged or len(tokens) != len(self.uids):
            return before(self, tokens)
        for piece in _pieces(self, prefixes, tokens):
            _read_piece(self, prefixes, piece, before)

    return prompt


def _read_piece(batch, prefixes, tokens, before) -> None:
    known = [_row_tokens(batch.prompt_cache, row) for row in range(len(tokens))]
    before(batch, tokens)
    for row, (start, new) in enumerate(zip(known, tokens)):
        if start is not None:
            prefixes.remember([*start, *new], batch.prompt_cache, row)


def _pieces(batch, prefixes, tokens: list[list[int]]) -> list[list[list[int]]]:
    """The tokens of a pass, in several where recurrent states must be kept on the way."""
    if prefixes.checkpoints is None:
        return [tokens]
    cuts = {max(map(len, tokens))}
    for row, new in enumerate(tokens):
        start = _row_tokens(batch.prompt_cache, row)
        if start is not None:
            parting = prefixes.parting([*start, *new]) - len(start)
            cuts.update([parting] if 0 < parting < len(new) else [])
    ends = sorted(cuts)
    return [[new[a:b] for new in tokens] for a, b in zip([0, *ends], ends)]


def _row_tokens(prompt_cache: list, row: int) -> list[int] | None:
    """The tokens that a row of a batch holds; None if they are not known."""
    layers = list(layers_of(prompt_cache))
    lens = {int(layer.lens[row]) for layer in layers}
    told = [each.all_told(max(lens)) for each in rows_of(layers, row)]
    return told[0] if len(lens) == 1 and all(tokens == told[0] for tokens in told) else None


def _extract_cache(before):
    def extract_cache(self, idx):
        extracted = before(self, idx)
        prefixes = _batch_prefixes(self.model)
        tokens = None if prefixes is None else _answered(extracted, self, idx)
        if tokens is not None:
            prefixes.remember(tokens, extracted, finished=True)
        return extracted

    return extract_cache


def _answered(extracted: list, batch, idx: int) -> list[int] | None:
    """The tokens that a row of a generating batch holds; None if its prompt is not known."""
    layers = list(layers_of(extracted))
    if not layers:
        return None
    row = rows_of(layers, 0)[0]
    known = len(row.told) // TOKEN_BYTES
    new = layers[0].offset - known
    fed = batch._num_tokens[idx] + 1  # the prompt's last token, and the answer
    if not 0 <= new <= min(fed, len(batch.tokens[idx])):
        return None
    return [*row.all_told(known), *batch.tokens[idx][len(batch.tokens[idx]) - new :]]


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
