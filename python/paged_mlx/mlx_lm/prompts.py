"""The tokens of every sequence of a model, as it is called with them.

The seam is ``__call__`` of the model's class, which only looks: whoever calls the model, mlx-lm's
functions under any name or a program of its own, hands in tokens and a prompt cache. So it is
known what each cache holds, and later prompts may begin with it.
"""

import inspect
import logging

import mlx.core as mx

from paged_mlx.errors import fail
from paged_mlx.forward.seams import Seam
from paged_mlx.mlx_lm.checkpoints import padding_is_seen, rows_of
from paged_mlx.mlx_lm.model_seam import paged_model_of
from paged_mlx.mlx_lm.prefixes import layers_of

log = logging.getLogger("paged_mlx")

_seams: dict[type, Seam] = {}


def seam_of(model) -> Seam:
    """The seam on the class of a model."""
    kind = type(model)
    if kind not in _seams:
        _seams[kind] = Seam(kind, "__call__", _noting_tokens, "`prefix_cache=True`", "notes tokens")
    return _seams[kind]


def _noting_tokens(before):
    names = [*inspect.signature(before).parameters][1:]

    def __call__(self, *args, **options):
        paged = paged_model_of(self)
        if paged is None or paged.prompts is None:
            return before(self, *args, **options)
        given = dict(zip(names, args)) | options
        with paged.prompts.call(given.pop(names[0], None), given):
            return before(self, *args, **options)

    return __call__


class Prompts:
    """Notes the calls of one model.

    Attributes:
        paged: The PagedModel.
        prefixes: Where prompts are found again.
    """

    def __init__(self, paged):
        self.paged = paged
        self.prefixes = paged.prefixes
        self._page_size = next(iter(paged.groups.values())).page_size
        self._padding_is_seen = None
        self._has_warned = False

    def call(self, tokens, options: dict) -> "Call":
        """A call of the model with ``tokens`` and, among others, ``cache``; a context manager."""
        prompt_cache = options.get("cache")
        layers = list(layers_of(prompt_cache))
        passes = layers[0].group.passes if layers else None
        if passes is not None and passes.model() is not self.paged.model:
            fail("model", "cache must be of this model", layers[0])
        if passes is not self.paged.passes:
            return Call(self, None, prompt_cache, [])  # none on pages, or the model is explained
        others = [name for name, given in options.items() if name != "cache" and given is not None]
        if others or tokens is None or len(tokens) != len(layers[0].rows):
            self.prefixes.decline("the call has other inputs than tokens")
            return Call(self, None, prompt_cache, [])
        first = layers[0]
        rows = zip(first.rows, first.lens.tolist(), first.counts(tokens.shape[1]))
        return Call(self, tokens, prompt_cache, list(rows), first.reads_drafts)

    def note(self, call: "Call") -> None:
        """Note a call that has come to its end."""
        is_prompt = call.tokens.shape[1] > self._page_size and not call.reads_drafts
        read = call.tokens.tolist() if is_prompt else None
        may_remember = read is not None and self._may_remember(call)
        if read is not None and may_remember and not self.prefixes.tokens_asked:
            self._warn_of_known(call, read)
        for row, (sequence, start, count) in enumerate(call.rows):
            history = sequence.history
            if not len(history):
                history.generation = self.prefixes.generation
            if read is None:
                for i in range(count):
                    history.add_sampled(start + i, call.tokens, row, i)
                if (start + count) % self._page_size == 0 and self.prefixes.checkpoints is not None:
                    states = rows_of(call.prompt_cache, row)
                    mx.async_eval(states)  # here: another thread cannot
                    history.states = (start + count, states)
            elif may_remember and count:
                history.add(start, read[row][:count])
                if len(history) == start + count:
                    tokens = history.first(start + count)
                    self.prefixes.remember(tokens, call.prompt_cache, row)

    def _warn_of_known(self, call: "Call", read: list) -> None:
        """Say so, once, where prompts are read whose beginnings nobody has looked for."""
        for row, (sequence, start, count) in enumerate(call.rows):
            if start or self._has_warned or self.paged.ranks.size > 1:
                continue
            known = self.prefixes.known(read[row][:count], sequence.history.keys)
            if known >= self._page_size:
                self._has_warned = True
                log.warning(
                    "a prompt was read from its first token, though %d are cached: functions of "
                    "mlx-lm imported by name before enable do not look; import them after it, or "
                    "use PagedModel.begin",
                    known,
                )

    def _may_remember(self, call: "Call") -> bool:
        counts = {count for _, _, count in call.rows}
        if len(call.rows) > 1 and self.padding_is_seen():
            return False
        if len(counts) > 1 and not self.paged.is_wholly_paged:
            self.prefixes.decline("attention that reads no pages may see padding")
            return False
        return True

    def padding_is_seen(self) -> bool:
        """Whether the model's recurrent states are wrong in a batch that mlx-lm has padded."""
        if self._padding_is_seen is None:
            model = self.paged.model
            self._padding_is_seen = self.prefixes.checkpoints is not None and (
                self.paged.ranks.any(
                    "padding is seen", padding_is_seen(model, self.paged.stock_cache)
                )
            )
            if self._padding_is_seen:
                log.warning(
                    "%s goes on into the padding of a batch: its prompts are shared in "
                    "single generation alone",
                    type(model).__module__,
                )
        if self._padding_is_seen:
            self.prefixes.decline("the model goes on into the padding of a batch")
        return self._padding_is_seen


class Call:
    """One call of a model; rows are (sequence, tokens it holds, tokens that are new)."""

    def __init__(self, prompts: Prompts, tokens, prompt_cache, rows: list, reads_drafts=False):
        self._prompts, self.reads_drafts = prompts, reads_drafts
        self.tokens, self.prompt_cache, self.rows = tokens, prompt_cache, rows

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if error is None and self.rows:
            self._prompts.note(self)
