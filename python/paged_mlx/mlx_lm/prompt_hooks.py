"""Where mlx-lm begins, reads and ends prompts: four seams for shared prefixes.

Each passes through unless the model is enabled with ``prefix_cache=True``.
"""

import functools
import inspect
import sys

import mlx.core as mx

from paged_mlx.mlx_lm.model_seam import paged_model_of

_installed = 0
_replaced = []  # (owner, name, what was there)


def install() -> None:
    """Put the seams in place, once however often it is asked for."""
    global _installed
    if not _installed:
        import mlx_lm.generate  # noqa: F401

        module = sys.modules["mlx_lm.generate"]
        _replace(module, "generate_step", _generate_step)
        _replace(module.BatchGenerator, "insert_segments", _insert_segments)
        _replace(module.PromptProcessingBatch, "prompt", _prompt)
        _replace(module.GenerationBatch, "extract_cache", _extract_cache)
    _installed += 1


def uninstall() -> None:
    """Undo one ``install``; the last one leaves mlx-lm as it was."""
    global _installed
    _installed -= 1
    if not _installed:
        while _replaced:
            setattr(*_replaced.pop())


def _replace(owner, name, make) -> None:
    before = getattr(owner, name)
    _replaced.append((owner, name, before))
    setattr(owner, name, functools.wraps(before)(make(before)))


def prefixes_of(model):
    paged = paged_model_of(model)
    return None if paged is None else paged.prefixes


def _generate_step(before):
    def generate_step(prompt, model, *args, **options):
        prefixes = prefixes_of(model)
        # A logits processor must see the whole prompt; embeddings are not known by tokens.
        plain = ("prompt_cache", "logits_processors", "input_embeddings", "max_kv_size", "kv_bits")
        if prefixes is None or any(options.get(name) is not None for name in plain):
            yield from before(prompt, model, *args, **options)
            return
        tokens = prompt.tolist() if isinstance(prompt, mx.array) else list(prompt)
        prompt_cache, known = prefixes.begin(tokens)
        try:
            rest = mx.array(tokens[known:])
            for token, logprobs in before(rest, model, *args, prompt_cache=prompt_cache, **options):
                tokens.append(int(token))
                yield token, logprobs
        finally:
            prefixes.remember(tokens, prompt_cache)

    return generate_step


def _insert_segments(before):
    signature = inspect.signature(before)

    def insert_segments(self, segments, *args, **options):
        prefixes = prefixes_of(self.model)
        if prefixes is None or self.max_kv_size is not None:
            return before(self, segments, *args, **options)
        call = signature.bind(self, segments, *args, **options)
        given = call.arguments
        count = len(segments)
        caches = list(given.get("caches") or [None] * count)
        told = list(given.get("all_tokens") or [[] for _ in range(count)])
        segments = [[list(part) for part in parts] for parts in segments]
        whole = [[token for part in parts for token in part] for parts in segments]
        fresh = [i for i in range(count) if caches[i] is None and whole[i]]
        with mx.stream(self.stream):
            prefixes.read_common([whole[i] for i in fresh])
        for i in fresh:
            caches[i], known = prefixes.begin(whole[i])
            told[i] = whole[i][:known]
            segments[i] = _without_first(segments[i], known)
        given.update(segments=segments, caches=caches, all_tokens=told)
        return before(*call.args, **call.kwargs)

    return insert_segments


def _without_first(segments: list[list[int]], count: int) -> list[list[int]]:
    rest = []
    for segment in segments:
        rest.append(segment[count:])
        count = max(0, count - len(segment))
    return [segment for segment in rest if segment]


def _prompt(before):
    def prompt(self, tokens):
        before(self, tokens)
        prefixes = prefixes_of(self.model)
        if prefixes is not None:
            for row, known in enumerate(self.tokens):
                prefixes.remember(known, self.prompt_cache, row)

    return prompt


def _extract_cache(before):
    def extract_cache(self, idx):
        extracted = before(self, idx)
        prefixes = prefixes_of(self.model)
        if prefixes is not None:
            prefixes.remember(self.tokens[idx], extracted)
        return extracted

    return extract_cache
