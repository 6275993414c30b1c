"""One prompt on its way into a prompt cache: what is known is skipped, the rest is read."""

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from paged_mlx.mlx_lm.checkpoints import states_of
from paged_mlx.mlx_lm.model_seam import paged_model_of
from paged_mlx.mlx_lm.prefixes import layers_of, rows_of


def prefixes_of(model):
    """What knows this model's prompts, if it is enabled with ``prefix_cache=True``."""
    paged = paged_model_of(model)
    return None if paged is None else paged.prefixes


class PromptRun:
    """A prompt and the cache it is read into, of one model.

    Attributes:
        tokens: All tokens that the cache will hold, those before the prompt too.
        prompt_cache: The cache.
        start: Tokens that it held before the prompt.
        known: Tokens that it holds by now.
    """

    def __init__(self, model, prompt_cache: list, before: list[int], prompt: list[int]):
        self.model = model
        self.prefixes = prefixes_of(model)
        self.prompt_cache = prompt_cache
        self.tokens = [*before, *prompt]
        self.start = self.known = len(before)
        if self.prefixes is not None and not before:
            self.known = self.prefixes.begin(self.tokens, prompt_cache)

    @classmethod
    def of(cls, model, prompt_cache: list | None, prompt: list[int]) -> "PromptRun | None":
        """The run of a prompt; None if nobody knows what the cache holds already."""
        if prompt_cache is None:
            return cls(model, make_prompt_cache(model), [], prompt)
        before = tokens_in(paged_model_of(model), prompt_cache)
        return None if before is None else cls(model, prompt_cache, before, prompt)

    def count(self) -> None:
        """Count the prompt among those asked for."""
        if self.prefixes is not None:
            self.prefixes.count(len(self.tokens) - self.start, self.num_read)

    @property
    def num_read(self) -> int:
        """Tokens of the prompt that the cache holds."""
        return self.known - self.start

    def read(self, stop: int, chunk: int, progress=None) -> None:
        """Read the prompt up to ``stop``, in chunks as mlx-lm does.

        Args:
            progress: Called before each chunk with the number of tokens that are known.
        """
        for end in self._ends(stop, chunk):
            if progress is not None:
                progress(self.num_read)
            tokens = mx.array([self.tokens[self.known : end]])
            self.model(tokens, cache=self.prompt_cache)
            mx.eval([cache.state for cache in self.prompt_cache])
            self.known = end
            self.remember(self.tokens[:end])
            mx.clear_cache()

    def _ends(self, stop: int, chunk: int):
        """Where chunks end: also where the prompt parts from others that are known, since
        recurrent states must be kept there for the next prompt that begins like this."""
        parting = 0
        if self.prefixes is not None and self.prefixes.checkpoints is not None:
            parting = self.prefixes.parting(self.tokens[: stop + 1])
        while self.known < stop:
            end = min(self.known + chunk, stop)
            yield parting if self.known < parting < end else end

    def remember(self, tokens: list[int], finished: bool = False) -> None:
        """Let later prompts begin with ``tokens``, which the cache holds."""
        if self.prefixes is not None:
            self.prefixes.remember(tokens, self.prompt_cache, finished=finished)

    def finish(self) -> None:
        """Remember all that the cache holds, after the last token."""
        held = {int(layer.lens[0]) for layer in layers_of(self.prompt_cache)}
        if len(held) == 1:
            self.remember(self.tokens[: held.pop()], finished=True)


def tokens_in(paged, prompt_cache: list) -> list[int] | None:
    """The tokens that a prompt cache of one sequence, of this PagedModel, holds; None if they
    are not known."""
    layers = list(layers_of(prompt_cache))
    ours = bool(layers) and all(
        layer.group is paged.groups.get(layer.group.window) and len(layer.rows) == 1
        for layer in layers
    )
    if not ours:
        return None
    lens = {int(layer.lens[0]) for layer in layers}
    if len(lens) > 1:
        return None
    length = lens.pop()
    if not length and not all(states.empty() for states in states_of(prompt_cache)):
        return None
    told = [row.all_told(length) for row in rows_of(layers, 0)]
    return told[0] if all(tokens == told[0] for tokens in told) else None
