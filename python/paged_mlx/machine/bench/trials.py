"""Trials, named as llama-bench names its tests: ``pp512``, ``tg128 @ d4096``; batches, and what they share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Trial:
    """What is run once and timed.

    Attributes:
        prompt: Tokens of a prompt to process; 0: tokens are generated.
        generated: Tokens to generate for each sequence, one step after the other.
        depth: Tokens that are in the cache before.
        batch: Sequences.
        shared: Of the depth, tokens that all sequences begin with.
        ragged: Depths from a quarter of ``depth`` up to it, evenly.
    """

    prompt: int = 0
    generated: int = 0
    depth: int = 0
    batch: int = 1
    shared: int = 0
    ragged: bool = False

    @property
    def name(self) -> str:
        words = [f"pp{self.prompt}" if self.prompt else f"tg{self.generated}"]
        if self.depth:
            words.append(f"@ d{self.depth}")
        if self.batch > 1:
            words.append(f"x{self.batch}")
        if self.shared:
            words.append(f"shared {self.shared}")
        if self.ragged:
            words.append("ragged")
        return " ".join(words)

    @property
    def tokens(self) -> int:
        """Tokens that one run processes."""
        return self.batch * (self.prompt or self.generated)

    @property
    def depths(self) -> list[int]:
        """Tokens in each sequence's cache."""
        if not self.ragged:
            return [self.depth] * self.batch
        least = max(1, self.depth // 4)
        steps = max(1, self.batch - 1)
        return [least + (self.depth - least) * i // steps for i in range(self.batch)]


def trials(
    prompts: Sequence[int],
    generated: Sequence[int],
    depths: Sequence[int],
    batches: Sequence[int],
    shared: int = 0,
    ragged: bool = False,
) -> Iterator[Trial]:
    """Every prompt at every depth, one sequence at a time; every generation at every depth in
    every batch, and of a batch at a depth also with a shared prefix and ragged, if wanted."""
    for depth in depths:
        for prompt in prompts:
            yield Trial(prompt=prompt, depth=depth)
    for depth in depths:
        for count in generated:
            for batch in batches:
                yield Trial(generated=count, depth=depth, batch=batch)
                if batch > 1 and 0 < shared <= depth:
                    yield Trial(generated=count, depth=depth, batch=batch, shared=shared)
                if batch > 1 and ragged and depth >= 4:
                    yield Trial(generated=count, depth=depth, batch=batch, ragged=True)
