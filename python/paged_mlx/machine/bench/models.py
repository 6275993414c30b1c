"""Trials of a model of mlx-lm: on pages, and beside it on mlx-lm's own caches."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.generate import generate_step

from paged_mlx.machine.bench.measure import Candidate, Case, check_close
from paged_mlx.machine.bench.trials import Trial

PAGED, STOCK = "paged", "mlx-lm"
CHUNK = 2048  # tokens of a prompt in one pass, mlx-lm's default
CLOSE = 0.05  # of the largest logit: half precision, in another order of summation
COARSE = 0.5  # K and V in few bits


class ModelBench:
    """Runs trials on one model.

    Args:
        model: A model of mlx-lm.
        vocabulary: Tokens to draw from.
        ways: How prompt caches are made, by the name that tables call it.
    """

    def __init__(self, model, vocabulary: int, ways: dict[str, Callable[[], list]]):
        self._model, self._vocabulary, self._ways = model, vocabulary, ways

    def cases(self, trials: Iterator[Trial], rounds: int) -> Iterator[Case]:
        """The cases of trials, one after the other: the caches of one are gone before the next."""
        for trial in trials:
            candidates = [
                _Run(self._model, make_cache, trial, self._vocabulary).candidate(name)
                for name, make_cache in self._ways.items()
            ]
            yield Case(trial.name, candidates, close, rounds, about={"trial": trial})
            del candidates
            gc.collect()
            mx.clear_cache()


def close(outputs: dict[str, Any]) -> None:
    """All ways give the same logits, up to rounding; on quantised pages, roughly."""
    rough = {name: COARSE for name in outputs if name.startswith(f"{PAGED},")}
    check_close(outputs, "logits", CLOSE, rough, least=1.0)


class _Run:
    """A trial on caches of one kind."""

    def __init__(self, model, make_cache: Callable[[], list], trial: Trial, vocabulary: int):
        self._model, self._make_cache, self._trial = model, make_cache, trial
        rng = np.random.default_rng(0)
        self._tokens = rng.integers(0, vocabulary, (trial.batch, trial.depth + 1))
        self._tokens[:, : trial.shared] = self._tokens[0, : trial.shared]
        self._prompt = mx.array(rng.integers(0, vocabulary, trial.prompt))
        self._steps = mx.array(rng.integers(0, vocabulary, (trial.generated, trial.batch, 1)))
        self._base: list[list] = []
        self._cache: Any = None

    def candidate(self, name: str) -> Candidate:
        run = self._process if self._trial.prompt else self._generate
        return Candidate(name, run, before=self._prepare, after=self._forget)

    def _prepare(self) -> None:
        """Caches as deep as the trial says, and theirs alone: no copy is left for the time."""
        if not self._base:
            self._fill()
        rows = [copy.deepcopy(cache) for cache in self._base]
        self._cache = rows[0]
        if len(rows) > 1:
            self._cache = [layers[0].merge(list(layers)) for layers in zip(*rows)]
        if self._trial.depth:
            mx.eval(self._model(mx.array(self._tokens[:, -1:]), cache=self._cache))
        mx.synchronize()

    def _fill(self) -> None:
        """Prompts read once: what sequences share, once for all."""
        shared = self._make_cache()
        self._read(shared, self._tokens[0, : self._trial.shared])
        for tokens, depth in zip(self._tokens, self._trial.depths):
            cache = copy.deepcopy(shared)
            self._read(cache, tokens[self._trial.shared : depth])
            self._base.append(cache)

    def _read(self, cache: list, tokens: np.ndarray) -> None:
        for begin in range(0, len(tokens), CHUNK):
            mx.eval(self._model(mx.array(tokens[None, begin : begin + CHUNK]), cache=cache))

    def _forget(self) -> None:
        self._cache = None

    def _process(self) -> mx.array:
        """Read a prompt as mlx-lm does, up to the first token's probabilities."""
        steps = generate_step(
            self._prompt,
            self._model,
            prompt_cache=self._cache,
            max_tokens=1,
            prefill_step_size=CHUNK,
        )
        _, logits = next(steps)
        mx.eval(logits)
        return logits

    def _generate(self) -> mx.array:
        """Decode given tokens, a step built while the one before runs, as mlx-lm does."""
        logits = mx.zeros(0)
        for tokens in self._steps:
            before = logits
            logits = self._model(tokens, cache=self._cache)[:, -1]
            mx.async_eval(mx.argmax(logits, axis=-1), logits)
            mx.eval(before)
        mx.eval(logits)
        return logits
