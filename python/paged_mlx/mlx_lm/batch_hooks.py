"""Batches of mlx-lm: where prompts join, are read and end, and what happens if one fails.

Each seam passes through unless the model is enabled.
"""

from mlx_lm.models import cache as stock

from paged_mlx.errors import OutOfPages, fail
from paged_mlx.mlx_lm import seams
from paged_mlx.mlx_lm.checkpoints import states_of
from paged_mlx.mlx_lm.model_seam import paged_model_of
from paged_mlx.mlx_lm.prefixes import layers_of, rows_of
from paged_mlx.mlx_lm.prompt_run import PromptRun, prefixes_of, tokens_in
from paged_mlx.pages.tokens import TOKEN_BYTES


def install(module) -> None:
    """Put the seams into mlx_lm.generate."""
    generator, prompts = module.BatchGenerator, module.PromptProcessingBatch
    seams.replace(generator, "insert_segments", _insert_segments)
    seams.replace(generator, "_make_batch", _make_batch)
    seams.replace(generator, "_next", _next)
    seams.replace(prompts, "prompt", _prompt)
    seams.replace(module.GenerationBatch, "_step", _step)
    seams.replace(module.GenerationBatch, "extract_cache", _extract_cache)


def _insert_segments(before):
    def insert_segments(self, *args, **options):
        paged = paged_model_of(self.model)
        if paged is None or self.max_kv_size is not None:
            return before(self, *args, **options)
        given = seams.arguments(before, (self, *args), options)
        if _is_on_stock(self):
            caches = given["caches"] or [None] * len(given["segments"])
            given["caches"] = [cache or paged.stock_cache() for cache in caches]
        elif given["caches"]:
            given["caches"] = [cache and _on_pages(paged, cache) for cache in given["caches"]]
        return before(**given)

    return insert_segments


def _is_on_stock(generator) -> bool:
    """Whether the generator began before its model was enabled: it goes on as it began."""
    batches = generator._prompt_batch, generator._generation_batch
    caches = [batch.prompt_cache for batch in batches]
    caches += [waiting[3] for waiting in generator._unprocessed_sequences]
    return any(caches) and not any(True for each in caches for _ in layers_of(each or []))


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
        try:
            if prefixes is None or not paged or len(tokens) != len(self.uids):
                return before(self, tokens)
            for piece in _pieces(self, prefixes, tokens):
                _read_piece(self, prefixes, piece, before)
        except BaseException as error:
            _break(self.prompt_cache, error)
            raise

    return prompt


def _break(prompt_cache: list, error: BaseException) -> None:
    """What mlx-lm has not fed of a sequence it will not feed again: rather an error then."""
    for layer in layers_of(prompt_cache):
        for row in layer.rows:
            row.broken = repr(error)


def _step(before):
    def step(self):
        states = [(states, list(states.cache)) for states in states_of(self.prompt_cache)]
        try:
            return before(self)
        except OutOfPages:
            # No page has changed, and mlx-lm will feed the same tokens again.
            for cache, arrays in states:
                cache.cache = arrays
            raise
        except BaseException as error:
            _break(self.prompt_cache, error)
            raise

    return step


def _next(before):
    def next_responses(self):
        if paged_model_of(self.model) is None:
            return before(self)
        told, batch = self.__dict__.setdefault("_untold", []), self._generation_batch
        answer = batch.next
        batch.next = lambda: _keep(told, answer())
        try:
            prompts, responses = before(self)
        finally:
            del batch.next
        responses = told[:] or responses
        told.clear()
        return prompts, responses

    return next_responses


def _keep(told: list, responses: list) -> list:
    """Responses are told later if reading prompts fails in the same step."""
    told.extend(responses)
    return responses


def _read_piece(batch, prefixes, tokens, before) -> None:
    known = [_row_tokens(batch.prompt_cache, row) for row in range(len(tokens))]
    before(batch, tokens)
    # Attention that does not read pages may see the padding: mlx-lm's answers depend on it then.
    padded = len({len(new) for new in tokens}) > 1
    if padded and not paged_model_of(batch.model).is_wholly_paged:
        return
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
