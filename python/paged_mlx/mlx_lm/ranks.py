"""The ranks of ``mx.distributed`` that compute one model together, and what they agree on.

Every rank has memory of its own: it may know other prompts, and have other pages free. Where that
decides what it does next, all ranks take the smallest answer: once for a prompt, and for a pass
only where pages may run out. All ranks must be asked the same, in the same order, as mlx-lm asks
them: an agreement that finds them at different places is an error on all.
"""

import contextlib
import inspect
import zlib

import mlx.core as mx
import numpy as np

from paged_mlx.errors import OutOfPages, fail
from paged_mlx.forward.seams import Seam
from paged_mlx.mlx_lm.counted_states import CountedStates
from paged_mlx.mlx_lm.model_seam import paged_model_of
from paged_mlx.mlx_lm.prefixes import layers_of

WIDTH = 6  # values in one collective: all have one shape, so that those of two questions can meet
STEPS = (64, 16, 4, 1)  # decode steps that are agreed on ahead, as far as pages reach


def is_shared(model) -> bool:
    """Whether ranks compute a model together: it is sharded, or in a pipeline."""
    return any(
        getattr(module, "pipeline_size", 1) > 1
        or any(isinstance(x, mx.distributed.Group) and x.size() > 1 for x in vars(module).values())
        for module in model.modules()
    )


class Ranks:
    """The ranks of one model: a single one, unless it is shared.

    Attributes:
        rank, size: This rank, and how many there are.
        stream: Where the newest pass, or agreement, communicates.
        have_met: Whether nothing is left to agree on before the model is used.
    """

    def __init__(self, model):
        world = mx.distributed.init()
        shared = world.size() > 1 and is_shared(model)
        self.rank, self.size = (world.rank(), world.size()) if shared else (0, 1)
        self.have_met = world.size() == 1
        self._is_admitted = False
        self.stream: mx.Stream | None = None
        self._leased: tuple = ()
        self._steps = 0  # that the leased sequences may still take

    @staticmethod
    def are_several() -> bool:
        """Whether there are ranks that could share a model."""
        return mx.distributed.init().size() > 1

    @property
    def place(self) -> tuple[int, int]:
        return self.rank, self.size

    # Agreeing

    def least(self, question: str, *values: int) -> list[int]:
        """Of each of ``values`` the smallest on any rank.

        Raises:
            ValueError: The ranks have asked different questions.
        """
        if self.size == 1:
            return list(values)
        if self.stream is not None and self.stream != mx.default_stream(mx.cpu):
            mx.synchronize(self.stream)  # collectives of two streams would meet in any order
        self.stream = mx.default_stream(mx.cpu)
        found: list[int] = []
        for i in range(0, len(values), WIDTH):
            found += self._least(f"{question} {len(values)}", values[i : i + WIDTH])
        return found

    def _least(self, question: str, values) -> list[int]:
        asked = zlib.crc32(question.encode())
        told = [asked, -asked, *values] + [0] * (WIDTH - len(values))
        least = mx.distributed.all_min(mx.array(told, mx.int64))
        low, high, *found = np.array(least).tolist()
        if low != asked or high != -asked:
            must = "all ranks must be given the same prompts and calls, in the same order"
            fail("ranks", must, f"{question!r} on rank {self.rank} and something else on another")
        return found[: len(values)]

    def spread(self, question: str, value: int) -> tuple[int, int]:
        """The smallest and the largest of the ranks' values."""
        least, most = self.least(question, value, -value)
        return least, -most

    def all(self, question: str, answer: bool) -> bool:
        """Whether every rank says yes."""
        return bool(self.least(question, int(answer))[0])

    def any(self, question: str, answer: bool) -> bool:
        """Whether some rank says yes."""
        return not self.all(question, not answer)

    def longest(self, tokens: list[int], find) -> int:
        """The length of the longest beginning of ``tokens`` that every rank finds.

        Args:
            find: Says how much of some tokens, less than all, this rank finds.
        """
        found = find(tokens)
        if self.size == 1:
            return found
        question = f"beginning of {zlib.crc32(repr(tokens).encode())}"
        while True:
            least, most = self.spread(question, found)
            if least == most:
                return least
            found = find(tokens[: least + 1])

    # Passes

    def may_step(self, sequences: tuple, paged, rows: list, is_decode: bool) -> bool:
        """Whether all ranks have pages for the next step of ``sequences``.

        Args:
            rows: (sequence, tokens held, tokens of the step).
            is_decode: Steps of one token follow: agree on several at once.
        """
        if self._leased != sequences or not self._steps:
            mine = _steps_with_pages(paged, rows, STEPS if is_decode else (1,))
            [self._steps] = self.least("pages for a step", mine)
            self._leased = sequences
        if not self._steps:
            return False
        self._steps -= 1
        return True

    def end_lease(self) -> None:
        """Pages were taken otherwise than by passes: ask again before the next."""
        self._leased = ()

    @contextlib.contextmanager
    def admitted(self):
        """While passes run whose pages all ranks are known to have."""
        self._is_admitted = True
        try:
            yield
        finally:
            self._is_admitted = False

    def begin_pass(self, paged, layers: list, batch: int, num_tokens: int) -> None:
        """Tell that a pass over the sequences of ``layers`` begins, on every rank.

        Raises:
            OutOfPages: Some rank has no pages for it; nothing has changed, on any rank.
        """
        self.stream = mx.default_stream(mx.cpu)
        if not paged.is_limited or self._is_admitted:
            return
        first, passes = layers[0], paged.passes
        rows = list(zip(first.rows, first.lens.tolist(), first.counts(num_tokens)))
        rows *= batch // len(rows)  # an empty cache takes a batch of any size
        while not self.may_step(first.names, paged, rows, is_decode=num_tokens == 1):
            if not self.any("pages of others", passes.take_from(passes.starved, first.rows)):
                passes.starved.update(first.rows)
                must = "every rank must have pages for the pass: give enable a larger limit"
                fail("model", must, list(paged.groups.values()), OutOfPages)


def _steps_with_pages(paged, rows: list, most: tuple) -> int:
    """For how many steps a rank has pages. Where it is more than one, a page of each sequence is
    left over: for a last page that comes to be shared, and is copied first."""
    for steps in most:
        spare = paged.page_size if steps > 1 else 0
        if paged.has_pages([(row, held, steps * new + spare) for row, held, new in rows]):
            return steps
    return 0


# The model's passes

_seams: dict[type, Seam] = {}


def seam_of(model) -> Seam:
    """The seam on the class of a model."""
    kind = type(model)
    if kind not in _seams:
        when, does = "there are several ranks", "agrees with the other ranks on passes"
        _seams[kind] = Seam(kind, "__call__", _agreeing, when, does)
    return _seams[kind]


def _agreeing(before):
    names = [*inspect.signature(before).parameters][1:]

    def __call__(self, *args, **options):
        paged = paged_model_of(self)
        given = dict(zip(names, args)) | options
        prompt_cache = given.get("cache") or ()
        layers = list(layers_of(prompt_cache))
        if paged is None or not layers or layers[0].group.passes is not paged.passes:
            return before(self, *args, **options)
        batch, num_tokens = given[names[0]].shape
        paged.ranks.begin_pass(paged, layers, batch, num_tokens)
        out = before(self, *args, **options)
        for cache in prompt_cache:
            if isinstance(cache, CountedStates):
                cache.tokens.count(num_tokens)
        return out

    return __call__
