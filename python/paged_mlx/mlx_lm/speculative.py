"""Speculative decoding of a batch: every row drafts, is checked and rolls back for itself.

A few tokens are drafted for each row. One pass of the model reads all of them, and a row keeps
those that the model would have given, and the model's token after them (Leviathan, Kalman,
Matias, "Fast Inference from Transformers via Speculative Decoding", arXiv 2211.17192). The rest
is taken back in that row alone. Drafts are a smaller model's most likely tokens, or those that
followed the row's last tokens before (Saxena, "Prompt Lookup Decoding", 2023,
https://github.com/apoorvumang/prompt-lookup-decoding).

The paper keeps a drafted x with probability p(x) / q(x). Here q is 1 for the drafted token: so a
token is sampled from p, and the draft is kept if it is the same. Greedy answers are those of
greedy decoding, and sampled ones have its distribution.
"""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import PromptProcessingBatch, wired_limit

from paged_mlx.errors import as_list, check_flag, fail, kind_of, whole_number
from paged_mlx.mlx_lm.enable import enable
from paged_mlx.mlx_lm.layout import unpaged
from paged_mlx.mlx_lm.model_seam import paged_model_of
from paged_mlx.mlx_lm.prefixes import layers_of
from paged_mlx.mlx_lm.waiting import check_fits

OP = "speculative_batch_generate"
RETAIN = 32  # tokens of a window that can be taken back, at least
NGRAMS = (3, 2)  # tokens that prompt look-up compares
PADDING = 512  # vocabularies of one tokenizer may differ by one in so many, by padding


@dataclass
class SpeculativeStats:
    """What a generator has done so far; times in seconds."""

    prompt_tokens: int = 0
    prompt_time: float = 0.0
    generation_tokens: int = 0
    generation_time: float = 0.0
    generation_steps: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0


@dataclass
class SpeculativeResponse:
    """Answers, in the order of the prompts.

    Attributes:
        texts, token_ids: Without the token that ended an answer.
        stats: Of all of them together.
        accepted_lengths: Of each prompt and step, how many drafted tokens were kept.
    """

    texts: list[str]
    stats: SpeculativeStats
    token_ids: list[list[int]]
    accepted_lengths: list[list[int]]


def speculative_batch_generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: list[list[int]],
    draft_model: nn.Module | None = None,
    num_draft_tokens: int = 3,
    *,
    max_tokens: int | list[int] = 128,
    verbose: bool = False,
    **options: Any,
) -> SpeculativeResponse:
    """Answer a batch of prompts as ``mlx_lm.batch_generate`` does, several tokens a step.

    Args:
        model: A model of mlx-lm; it is enabled for the run if it is not.
        tokenizer: Its tokenizer.
        prompts: Token ids.
        draft_model: A smaller model of the same vocabulary, likewise; None: prompt look-up.
        num_draft_tokens: Tokens drafted for a row in a step, at most.
        max_tokens: Tokens of an answer at most, of all or of each.
        verbose: Print how far it is, and the figures.
        options: Of ``SpeculativeBatchGenerator``.

    Raises:
        ValueError: Tokens of a model cannot be taken back (it has recurrent layers), or another
            argument is wrong; nothing has run.
    """
    verbose = check_flag(OP, "verbose", verbose)
    if not hasattr(tokenizer, "eos_token_ids"):
        fail(OP, "tokenizer must be one of mlx-lm, with eos_token_ids", kind_of(tokenizer))
    options = dict(options, num_draft_tokens=num_draft_tokens, stop_tokens=tokenizer.eos_token_ids)
    with SpeculativeBatchGenerator(model, draft_model, **options) as generator, wired_limit(model):
        uids = generator.insert(prompts, max_tokens)
        tokens: dict[int, list[int]] = {uid: [] for uid in uids}
        accepted: dict[int, list[int]] = {uid: [] for uid in uids}
        finished = 0
        while responses := generator.next():
            for each in responses:
                stops = each.finish_reason == "stop"
                tokens[each.uid] += each.tokens[:-1] if stops else each.tokens
                accepted[each.uid].append(each.accepted)
                finished += each.finish_reason is not None
            if verbose:
                print(f"[{OP}] Finished processing {finished}/{len(uids)} ...", end="\r")
        if verbose:
            print(f"\n[{OP}] {generator.stats}; peak memory {mx.get_peak_memory() / 1e9:.3f} GB")
        texts = [tokenizer.decode(each) for each in tokens.values()]
        answers = list(tokens.values()), list(accepted.values())
        return SpeculativeResponse(texts, generator.stats, *answers)


@dataclass
class Response:
    """A row's part of a step.

    Attributes:
        tokens: The next tokens of the prompt ``uid``: one at least.
        accepted: How many of them were drafted.
        finish_reason: "stop", after a stop token, or "length"; None: there are more to come.
    """

    uid: int
    tokens: list[int]
    accepted: int
    finish_reason: str | None


@dataclass(eq=False)
class Row:
    """A prompt and its answer so far, of which the model has read all tokens but the last.

    Attributes:
        trust: Drafts of look-up that it may have: twice as many after a step that all were right
            in, down to none where they were not. Without any, what is looked up is compared with
            the model's token all the same.
    """

    uid: int
    tokens: list[int]
    left: int
    trust: int = 1
    _looked_up: list = field(default_factory=list)
    _ends: dict = field(default_factory=dict)  # n tokens -> where they ended last, with more behind
    _num_seen: int = 0

    def look_up(self, most: int) -> list[int]:
        """What followed the last n tokens when they last occurred, for the largest n that did."""
        tokens = self.tokens
        for end in range(self._num_seen, len(tokens)):
            self._ends.update({tuple(tokens[end - n : end]): end for n in NGRAMS if n <= end})
        self._num_seen = len(tokens)
        ends = [self._ends.get(tuple(tokens[-n:])) for n in NGRAMS]
        end = next((end for end in ends if end), len(tokens))
        self._looked_up = (tokens[end : end + most] * most)[:most]
        return self._looked_up[: self.trust]

    def learn(self, new: list[int], most: int) -> None:
        """Trust look-up more or less, up to ``most`` drafts, after the model has given ``new``."""
        if not self._looked_up:
            return
        right = 0
        while self._looked_up[right : right + 1] == new[right : right + 1] != []:
            right += 1
        if right >= max(1, min(self.trust, len(self._looked_up))):
            self.trust = min(most, max(1, 2 * self.trust))
        else:
            self.trust = max(right, self.trust // 2)


class SpeculativeBatchGenerator(contextlib.AbstractContextManager):
    """Answers prompts that come and go, several tokens a step; a context manager.

    Args:
        model, draft_model, num_draft_tokens: As of ``speculative_batch_generate``.
        stop_tokens: Tokens that end an answer.
        sampler: As mlx-lm's, from log-probabilities ``[n, vocabulary]``; None: greedy.
        completion_batch_size: Prompts that are answered together, at most.
        prefill_batch_size: Prompts that are read together, at most.
        prefill_step_size: Tokens of a prompt that are read together.

    Attributes:
        stats: What it has done so far.
    """

    def __init__(
        self,
        model: nn.Module,
        draft_model: nn.Module | None = None,
        *,
        num_draft_tokens: int = 3,
        stop_tokens: Iterable[int] = (),
        sampler: Callable[[mx.array], mx.array] | None = None,
        completion_batch_size: int = 32,
        prefill_batch_size: int = 8,
        prefill_step_size: int = 2048,
    ):
        self._num_drafts = whole_number(OP, "num_draft_tokens", num_draft_tokens, 1)
        stop_tokens = as_list(OP, "stop_tokens", stop_tokens, "token ids")
        self._stop_tokens = {whole_number(OP, "a stop token", token) for token in stop_tokens}
        if sampler is not None and not callable(sampler):
            fail(OP, "sampler must be a function of log-probabilities, or None", kind_of(sampler))
        self._sampler = sampler
        self._most = whole_number(OP, "completion_batch_size", completion_batch_size, 1)
        self._most_read = whole_number(OP, "prefill_batch_size", prefill_batch_size, 1)
        step_size = whole_number(OP, "prefill_step_size", prefill_step_size, 1)
        self.stats = SpeculativeStats()
        self._rows: list[Row] = []
        self._waiting: deque[Row] = deque()
        self._num_inserted = 0
        models = {"model": model} | ({} if draft_model is None else {"draft_model": draft_model})
        with contextlib.ExitStack() as enabled:
            paged = {name: self._paged(name, each, enabled) for name, each in models.items()}
            self._caches = [BatchCache(name, each, step_size) for name, each in paged.items()]
            self._target, *drafts = self._caches
            self._draft = drafts[0] if drafts else None
            sizes = [cache.vocabulary for cache in self._caches]
            self._vocabulary = min(sizes)
            if max(sizes) - min(sizes) > max(sizes) // PADDING:
                fail(OP, f"draft_model must have the vocabulary of model, {sizes[0]}", sizes[1])
            self._enabled = enabled.pop_all()

    def _paged(self, name: str, model, enabled):
        """The model's PagedModel, if tokens of each row can be taken back."""
        paged = paged_model_of(model)
        if paged is None:
            paged = enabled.enter_context(enable(model, retain=max(RETAIN, self._num_drafts)))
        for _, reason in unpaged(paged.stock_cache(), paged.layout.places):
            fail(OP, f"{name} must be one whose tokens can be taken back row by row", reason)
        windows = [group.retain for group in paged.groups.values() if group.window is not None]
        kept = min((each for each in windows if each is not None), default=self._num_drafts)
        if kept < self._num_drafts:
            must = f"num_draft_tokens must be at most {kept}, enable's retain for {name}"
            fail(OP, must, self._num_drafts)
        return paged

    def close(self) -> None:
        """Let go of all prompts, and disable what was enabled for the run."""
        self._waiting.clear()
        self._leave(self._rows)
        self._enabled.close()

    def __exit__(self, *error):
        self.close()

    # Coming and going

    def insert(self, prompts: list[list[int]], max_tokens: int | list[int] = 128) -> list[int]:
        """Have prompts wait for their turn; returns a uid for each.

        Raises:
            ValueError: One is empty, no list of token ids, or can never have pages for itself and
                its answer; none of them waits.
        """
        if not isinstance(prompts, (list, tuple)) or not prompts:
            fail("insert", "prompts must be a list of lists of token ids", kind_of(prompts))
        most = max_tokens if isinstance(max_tokens, (list, tuple)) else [max_tokens] * len(prompts)
        if len(most) != len(prompts):
            fail("insert", f"max_tokens must be one number or {len(prompts)} of them", len(most))
        rows: list = []
        for prompt, count in zip(prompts, most):
            is_list = hasattr(prompt, "__len__") and not isinstance(prompt, (str, bytes, dict))
            if not is_list or not len(prompt):
                fail("insert", "a prompt must be a list of one token id at least", kind_of(prompt))
            last = self._vocabulary - 1
            tokens = [whole_number("insert", "a token id", token, 0, last) for token in prompt]
            left = whole_number("insert", "max_tokens", count, 1)
            rows.append(Row(self._num_inserted + len(rows), tokens, left))
            for cache in self._caches:
                if cache.paged.is_limited:
                    longest = self._longest(rows[-1])
                    check_fits("insert", cache.paged, longest, "a prompt and its answer")
        self._waiting.extend(rows)
        self._num_inserted += len(rows)
        return [row.uid for row in rows]

    def remove(self, uids: list[int]) -> None:
        """Let go of prompts, whether they wait or are being answered.

        Raises:
            ValueError: One is not there, or is named twice; all are as they were.
        """
        there = {row.uid: row for row in [*self._rows, *self._waiting]}
        uids = [whole_number("remove", "a uid", u) for u in as_list("remove", "uids", uids, "uids")]
        gone = [there.pop(uid, None) for uid in uids]
        if None in gone:
            fail("remove", "uids must be of prompts that are there, each once", list(uids))
        self._waiting = deque(row for row in self._waiting if row.uid in there)
        self._leave([row for row in self._rows if row.uid not in there])

    def _leave(self, rows: list[Row]) -> None:
        keep = [i for i, row in enumerate(self._rows) if row not in rows]
        if len(keep) < len(self._rows):
            self._rows = [self._rows[i] for i in keep]
            for cache in self._caches:
                cache.keep(keep)

    def _longest(self, row: Row) -> int:
        """Tokens of a row that need pages, at most."""
        return len(row.tokens) + row.left + self._num_drafts

    def _have_pages(self, new: list[Row]) -> bool:
        """Whether there are pages now for all that runs, and for ``new`` rows, up to their ends."""
        limited = [cache for cache in self._caches if cache.paged.is_limited]
        to_come: dict = {cache.paged: [] for cache in limited}  # a model may draft for itself
        for cache in limited:
            ends = [list(map(self._longest, rows)) for rows in (self._rows, new)]
            to_come[cache.paged] += cache.to_come(*ends)
        return all(p.ranks.all("pages", p.has_pages(rows)) for p, rows in to_come.items())

    def _join(self) -> None:
        """Read the prompts whose turn it is."""
        most = min(self._most_read, self._most - len(self._rows), len(self._waiting))
        rows = [self._waiting[i] for i in range(most)]
        while rows and not self._have_pages(rows) and (self._rows or len(rows) > 1):
            rows.pop()
        if rows:
            began = time.perf_counter()
            read = [cache.read_prompts([row.tokens for row in rows]) for cache in self._caches]
            for cache, batch in zip(self._caches, read):
                cache.extend(batch)
            self._rows += [self._waiting.popleft() for _ in rows]
            self.stats.prompt_tokens += sum(len(row.tokens) for row in rows)
            self.stats.prompt_time += time.perf_counter() - began

    # A step

    def next(self) -> list[Response]:
        """Answer one step of every row, after those that have room to join are read.

        Returns:
            Nothing once nothing is left. A row that has finished is gone, and its pages are free.
        """
        for cache in self._caches:
            cache.take_back([len(row.tokens) - 1 for row in self._rows])
        self._join()
        if not self._rows:
            return []
        began = time.perf_counter()
        most = [min(self._num_drafts, row.left - 1) for row in self._rows]
        drafts, counts = self._look_up(most) if self._draft is None else self._drafted(most)
        last = mx.array([row.tokens[-1:] for row in self._rows], mx.int32)
        logits = self._target.read(mx.concatenate([last, drafts], 1), [n + 1 for n in counts])
        chosen = self._chosen(logits)
        mx.eval(chosen, drafts)
        step = zip(self._rows, np.array(drafts).tolist(), np.array(chosen).tolist(), counts)
        responses = [self._advance(*each) for each in step]
        self._leave([row for row, each in zip(self._rows, responses) if each.finish_reason])
        self.stats.generation_steps += 1
        self.stats.drafted_tokens += sum(counts)
        self.stats.generation_time += time.perf_counter() - began
        return responses

    def _chosen(self, logits: mx.array) -> mx.array:
        if self._sampler is None:
            return mx.argmax(logits, axis=-1)
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        return self._sampler(logprobs.flatten(0, 1)).reshape(logits.shape[:2])

    def _advance(self, row: Row, drafted: list[int], chosen: list[int], count: int) -> Response:
        accepted = 0
        while accepted < count and drafted[accepted] == chosen[accepted]:
            accepted += 1
        new = chosen[: accepted + 1]
        stops = [i for i, token in enumerate(new) if token in self._stop_tokens]
        new = new[: stops[0] + 1] if stops else new
        accepted = min(accepted, len(new))
        row.learn(new, self._num_drafts)
        row.tokens += new
        row.left -= len(new)
        self.stats.generation_tokens += len(new)
        self.stats.accepted_tokens += accepted
        return Response(row.uid, new, accepted, "stop" if stops else None if row.left else "length")

    # Drafts: an array [rows, n], and how many of each row's n are drafts

    def _look_up(self, most: list[int]) -> tuple[mx.array, list[int]]:
        found = [row.look_up(n) for row, n in zip(self._rows, most)]
        return padded(found), [len(tokens) for tokens in found]

    def _drafted(self, most: list[int]) -> tuple[mx.array, list[int]]:
        """Tokens of the draft model, which first reads what it has not read of each row."""
        assert self._draft is not None
        new = [row.tokens[held:] for row, held in zip(self._rows, self._draft.lens)]
        read, counts = padded(new), [len(tokens) for tokens in new]
        drafts = [read[:, :0]]
        for _ in range(max(most)):
            logits = self._draft.read(read, counts)[..., : self._vocabulary]
            logits = logits[mx.arange(len(new)), mx.array(counts) - 1]
            read, counts = mx.argmax(logits, axis=-1).astype(mx.int32)[:, None], [1] * len(new)
            mx.async_eval(read)
            drafts.append(read)
        return mx.concatenate(drafts, axis=1), most


def padded(rows: list[list[int]]) -> mx.array:
    """``int32 [rows, longest]``, with zeros behind the shorter ones."""
    longest = max(map(len, rows))
    return mx.array([row + [0] * (longest - len(row)) for row in rows], mx.int32)


class BatchCache:
    """One model's prompt cache of the rows that are answered.

    Attributes:
        paged: The PagedModel.
        vocabulary: How many logits the model gives.
    """

    def __init__(self, name: str, paged, prefill_step_size: int):
        self.paged = paged
        self.vocabulary = _vocabulary_of_a_batch(name, paged)
        self._step_size = prefill_step_size
        self._cache: list = []

    @property
    def lens(self) -> list[int]:
        """Tokens of each row that it holds."""
        return next(layers_of(self._cache)).lens.tolist()

    def to_come(self, running: list[int], new: list[int]) -> list[tuple]:
        """(sequence, tokens held, tokens to come) of the rows, and of new ones, up to these lengths."""
        empty = next(layers_of(self.paged.make_cache())).rows[0]
        rows = [row for layer in list(layers_of(self._cache))[:1] for row in layer.rows]
        held = zip(rows, self.lens if rows else (), running)
        return [(row, n, end - n) for row, n, end in held] + [(empty, 0, end) for end in new]

    def read_prompts(self, prompts: list[list[int]]) -> list:
        """A batch that holds all tokens but the last of each prompt, read as mlx-lm reads them."""
        caches = [self.paged.make_cache() for _ in prompts]
        uids = list(range(len(prompts)))
        batch = PromptProcessingBatch(
            self.paged.model, uids, caches, prefill_step_size=self._step_size
        )
        batch.prompt([prompt[:-1] for prompt in prompts])
        return batch.prompt_cache

    def extend(self, batch: list) -> None:
        for cache, other in zip(self._cache, batch):
            cache.extend(other)
        self._cache = self._cache or batch
        for layer in layers_of(self._cache):
            layer.reads_drafts = True

    def keep(self, rows: list[int]) -> None:
        self._cache = self._cache if rows else []
        for cache in self._cache:
            cache.filter(rows)

    def read(self, tokens: mx.array, counts: list[int]) -> mx.array:
        """Logits after ``tokens [rows, n]``, the first ``counts`` of each row; others are padding."""
        padding = [tokens.shape[1] - count for count in counts]
        for cache in self._cache:
            cache.prepare(lengths=counts, right_padding=padding)
        try:
            return self.paged.model(tokens, cache=self._cache)
        finally:
            for cache in self._cache:
                cache.finalize()

    def take_back(self, lengths: list[int]) -> None:
        """Hold so many tokens of each row at most, and no pages behind them."""
        layers = list(layers_of(self._cache))
        over = [max(0, held - most) for held, most in zip(self.lens if layers else (), lengths)]
        if not any(over):
            return
        layers[0].trim(over)
        with self.paged.passes.turn:
            for row, length in zip(layers[0].rows, self.lens):
                for window in row.tables:
                    row.truncate(window, length)
        for layer in layers:
            layer.lens = layers[0].lens


def _vocabulary_of_a_batch(name: str, paged) -> int:
    """How many logits a model gives to a padded batch. Builds its graph and evaluates nothing."""
    caches = zip(*[paged.stock_cache() for _ in range(3)])
    try:
        batch = [layers[0].merge(list(layers)) for layers in caches]
        for cache in batch:
            cache.prepare(lengths=[1, 2, 2], right_padding=[1, 0, 0])
        return paged.model(mx.zeros((3, 2), mx.int32), cache=batch).shape[-1]
    except Exception as error:
        fail(OP, f"{name} must be one that mlx-lm can run in batches", error)
