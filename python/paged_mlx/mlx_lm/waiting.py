"""Batches on a limited pool: prompts wait for pages, and the youngest sequence makes room.

While a model is enabled with ``num_pages`` or ``max_bytes``, a ``BatchGenerator`` begins only what has
pages. A prompt that can never have them is refused when it is inserted; what fits alone, but not
now, waits. Before anybody waits, stored prompts give their pages back; then the youngest
sequence is put back among those that wait, to be read again. One that has the pool for itself
and fills it ends as at its largest number of tokens: what it has generated is not lost.
"""

import logging
from collections import deque

from mlx_lm.models import cache as stock

from paged_mlx.errors import OutOfPages, fail
from paged_mlx.forward.seams import Seam
from paged_mlx.mlx_lm.beginnings import GENERATE
from paged_mlx.mlx_lm.model_seam import paged_model_of
from paged_mlx.mlx_lm.prefixes import layers_of

log = logging.getLogger("paged_mlx")


def _limited(model):
    paged = paged_model_of(model)
    return paged if paged is not None and paged.is_limited else None


def check_fits(function: str, paged, num_tokens: int, what: str = "a prompt") -> None:
    """Refuse ``what``, of so many tokens, if it can never have its pages.

    Raises:
        ValueError: With how many pages would do.
    """
    paged.meet()
    needs = [(group.pages_for(num_tokens + 1), group.most_pages) for group in paged.groups.values()]
    needed, most = max(needs, key=lambda need: need[0] - need[1])
    if not paged.ranks.all(f"a prompt of {num_tokens} tokens fits", needed <= most):
        must = f"num_pages must be at least {needed} for {what} of {num_tokens} tokens"
        if paged.max_bytes is not None:
            must = f"max_bytes must have room for {needed} pages of {what} of {num_tokens} tokens"
        if needed <= most:
            must = f"every rank must have pages for {what} of {num_tokens} tokens"
        fail(function, must, most)


def _insert_segments(before):
    def insert_segments(self, segments, *args, **options):
        paged = _limited(self.model)
        for prompt in segments if paged is not None else ():
            check_fits("insert", paged, sum(map(len, prompt)))
        return before(self, segments, *args, **options)

    return insert_segments


def _tokenize(before):
    def tokenize(self, tokenizer, request, args):
        answer = before(self, tokenizer, request, args)
        paged = _limited(self.model_provider.model)
        if paged is not None:
            check_fits("generate", paged, len(answer[0]))
        return answer

    return tokenize


def _next(before):
    def next_responses(self):
        paged = _limited(self.model)
        if paged is None or not any(True for _ in _layers(self)):
            return before(self)
        queue = Queue(self, paged)
        ended = queue.make_room()
        if ended is not None:
            return [], [ended]
        waiting = queue.hold_back()
        try:
            with paged.ranks.admitted():
                return before(self)
        finally:
            self._unprocessed_sequences.extend(waiting)

    return next_responses


def _layers(generator):
    """The paged caches of a generator's sequences, those that wait too."""
    for batch in _batches(generator):
        yield from layers_of(batch.prompt_cache)
    for waiting in generator._unprocessed_sequences:
        yield from layers_of(waiting[3])


def _batches(generator) -> tuple:
    """The batch that answers, and the one whose prompts are being read."""
    return generator._generation_batch, generator._prompt_batch


class Queue:
    """What a generator may do in its next step."""

    def __init__(self, generator, paged):
        self._generator, self._paged, self._ranks = generator, paged, paged.ranks
        self._answering, self._reading = _batches(generator)
        self._progress = generator._currently_processing
        self._waiting = generator._unprocessed_sequences

    def make_room(self):
        """Have pages for the next step of what runs; return the last response of a sequence that
        has filled the pool."""
        while not self._next_has_pages():
            if not self._give_back() and not self._put_back_youngest():
                return self._end_the_last()
        return None

    def hold_back(self) -> deque:
        """Take those prompts out of the generator's queue that have no pages yet."""
        waiting = self._waiting
        admitted: list = []
        running = self._all_tokens()
        while waiting:
            segments, prompt_cache = waiting[0][1], waiting[0][3]
            layer = next(layers_of(prompt_cache), None)
            if layer is not None:
                new = sum(map(len, segments)) + 1
                row = (layer.rows[0], int(layer.lens[0]), new)
                if not self._has_pages([*running, row]):
                    if admitted or running or not self._give_back():
                        break
                    continue
                running.append(row)
            admitted.append(waiting.popleft())
        if waiting and not admitted and not running:
            self._refuse(waiting[0])
        held = deque(waiting)
        waiting.clear()
        waiting.extend(admitted)
        return held

    def _refuse(self, sequence) -> None:
        must = (
            f"the pool must have pages for prompt {sequence[0]}, which others hold: let go of prompt "
            f"caches, or give enable a larger num_pages or max_bytes"
        )
        fail("next", must, list(self._paged.groups.values()), OutOfPages)

    # Counting

    def _rows(self, batch) -> list:
        layer = next(layers_of(batch.prompt_cache), None)
        return [] if layer is None else list(zip(layer.rows, layer.lens.tolist()))

    def _next_tokens(self) -> list:
        """(sequence, tokens held, tokens of the next step) of what runs."""
        reading = zip(self._rows(self._reading), self._progress)
        chunk = self._generator.prefill_step_size
        return [(*row, 1) for row in self._rows(self._answering)] + [
            (*row, min(len(segments[0]), chunk)) for row, (segments, *_) in reading
        ]

    def _all_tokens(self) -> list:
        """The same with all tokens of the prompts that are being read."""
        reading = zip(self._rows(self._reading), self._progress)
        return [(*row, 1) for row in self._rows(self._answering)] + [
            (*row, sum(map(len, segments)) + 1) for row, (segments, *_) in reading
        ]

    def _has_pages(self, rows: list) -> bool:
        return self._ranks.all("pages for a prompt", self._paged.has_pages(rows))

    def _next_has_pages(self) -> bool:
        rows = self._next_tokens()
        if self._ranks.size == 1:
            return self._paged.has_pages(rows)
        of_sequences = tuple(self._answering.uids), tuple(self._reading.uids)
        return self._ranks.may_step(
            of_sequences, self._paged, rows, is_decode=not self._reading.uids
        )

    # Making room

    def _give_back(self) -> bool:
        """Take pages of what is stored, or waits; False if there is nothing, on no rank."""
        stored = self._ranks.any("pages given back", self._give_back_stored())
        return stored or self._give_back_waiting()

    def _give_back_stored(self) -> bool:
        """Have a prompt store drop what it values least, and take what has been handed out."""
        for store in list(self._paged.passes.stores):
            if len(store):
                store.trim_to(n_sequences=len(store) - 1)
                return True
        passes = self._paged.passes
        ours = {row for layer in _layers(self._generator) for row in layer.rows}
        return passes.take_from(passes.aside, ours)

    def _give_back_waiting(self) -> bool:
        """Have the youngest prompt that waits with a cache, whose tokens are known, wait without."""
        waiting = self._waiting
        for i in reversed(range(len(waiting))):
            uid, segments, most, prompt_cache, told, *rest = waiting[i]
            layer = next(layers_of(prompt_cache), None)
            if layer is not None and 0 < int(layer.lens[0]) == len(told):
                fresh = stock.make_prompt_cache(self._generator.model)
                segments = [told + segments[0], *segments[1:]]
                if len(segments) == 1:
                    segments = [segments[0][:-1], segments[0][-1:]]
                waiting[i] = (uid, segments, most, fresh, [], *rest)
                return True
        return False

    def _put_back_youngest(self) -> bool:
        """Have the youngest sequence wait, if it is not the last and can be read again."""
        batches = self._answering, self._reading
        if sum(map(len, batches)) < 2:
            return False
        uid, batch = max((uid, place) for place in (0, 1) for uid in batches[place].uids)
        row = batches[batch].uids.index(uid)
        put_back = self._of_answering(row) if batch == 0 else self._of_reading(row)
        if put_back is None:
            return False
        self._waiting.appendleft(put_back)
        batches[batch].filter([i for i in range(len(batches[batch])) if i != row])
        log.info("prompt %d waits: the pool is full", uid)
        return True

    def _of_answering(self, row: int):
        batch = self._answering
        tokens = batch.tokens[row]
        left = batch.max_tokens[row] - batch._num_tokens[row]
        segments = [tokens[:-1], tokens[-1:]] if len(tokens) > 1 else [tokens[:]]
        return self._as_inserted(batch, row, segments, left, _Resumed(batch._matchers[row]))

    def _of_reading(self, row: int):
        batch, (segments, *_) = self._reading, self._progress[row]
        segments = [batch.tokens[row] + segments[0], *segments[1:]]
        if len(segments) == 1 and len(segments[0]) > 1:
            segments = [segments[0][:-1], segments[0][-1:]]
        stop = batch.stop_sequences[row]
        put_back = self._as_inserted(batch, row, segments, batch.max_tokens[row], stop)
        if put_back is not None:
            del self._progress[row]
        return put_back

    def _as_inserted(self, batch, row: int, segments, max_tokens: int, stop_sequences):
        """A sequence as ``insert`` queues it; None if not all of its tokens are known."""
        held = next(layers_of(batch.prompt_cache)).lens[row]
        if held != len(batch.tokens[row]):
            return None
        prompt_cache = stock.make_prompt_cache(self._generator.model)
        sampler = batch.samplers[row] if batch.samplers else None
        processors = batch.logits_processors[row] if batch.logits_processors else []
        uid = batch.uids[row]
        return (uid, segments, max_tokens, prompt_cache, [], sampler, processors, stop_sequences)

    def _end_the_last(self):
        """End a sequence that has the pool for itself, with all that it has generated."""
        batch = self._answering
        if len(batch) != 1 or len(self._reading):
            self._refuse([*batch.uids, *self._reading.uids])
        token = batch._next_tokens[0].item()
        ended = batch._matchers[0].advance(token)
        log.warning("an answer ends: its sequence has filled the pool. A larger num_pages has room")
        response = batch.Response(
            uid=batch.uids[0],
            token=token,
            logprobs=batch._next_logprobs[0],
            finish_reason="stop" if ended else "length",
            prompt_cache=batch.extract_cache(0),
            all_tokens=batch.tokens[0],
        )
        batch.filter([])
        return response


class _Resumed:
    """The stop sequences of an answer that goes on: matched so far as they were."""

    def __init__(self, matcher):
        self._matcher = matcher

    def matcher(self):
        return self._matcher


def seams() -> list[Seam]:
    """The seams, made when first wanted: one is in mlx-lm's server."""
    if not _seams:
        from mlx_lm.server import ResponseGenerator

        when, generator = "`num_pages` or `max_bytes`", GENERATE.BatchGenerator
        refuses = "refuses a prompt that can never have its pages"
        _seams.extend(
            [
                Seam(generator, "insert_segments", _insert_segments, when, refuses),
                Seam(
                    generator,
                    "_next",
                    _next,
                    when,
                    "begins prompts that there are pages for; the rest waits",
                ),
                Seam(
                    ResponseGenerator, "_tokenize", _tokenize, when, f"{refuses}, as an HTTP error"
                ),
            ]
        )
    return _seams


_seams: list[Seam] = []
