"""Trials, named as llama-bench names its tests: ``pp512``, ``tg128 @ d4096``; batches, and what they share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

PAGE_SIZE = 16  # the default; a name says others


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
        page_size: Tokens in a page.
    """

    prompt: int = 0
    generated: int = 0
    depth: int = 0
    batch: int = 1
    shared: int = 0
    ragged: bool = False
    page_size: int = PAGE_SIZE

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
        if self.page_size != PAGE_SIZE:
            words.append(f"pages of {self.page_size}")
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


FIELDS = tuple(Trial.__dataclass_fields__)


def trials(
    prompts: Sequence[int],
    generated: Sequence[int],
    depths: Sequence[int],
    batches: Sequence[int],
    shared: Sequence[int] = (),
    ragged: bool = False,
    page_sizes: Sequence[int] = (PAGE_SIZE,),
) -> Iterator[Trial]:
    """Every prompt at every depth, one sequence at a time; every generation at every depth in
    every batch, and of a batch at a depth also with shared prefixes and ragged, if wanted; all of it
    on pages of every size."""
    for size in page_sizes:
        for depth in depths:
            for prompt in prompts:
                yield Trial(prompt=prompt, depth=depth, page_size=size)
        for depth in depths:
            for count in generated:
                for batch in batches:
                    yield Trial(generated=count, depth=depth, batch=batch, page_size=size)
                    for common in shared:
                        if batch > 1 and 0 < common <= depth:
                            yield Trial(0, count, depth, batch, common, page_size=size)
                    if batch > 1 and ragged and depth >= 4:
                        yield Trial(0, count, depth, batch, ragged=True, page_size=size)


def sweep(prompt: int, generated: int, page_sizes: Sequence[int]) -> Iterator[Trial]:
    """What curves need: one thing grows at a time, context, batch, common prefix or page."""
    yield from trials([prompt], [], (0, 256, 1024), [1])
    yield from trials([], [generated], (64, 256, 1024, 4096, 16384), [1])
    yield from trials([], [generated], [1024], (2, 4, 8, 16))
    yield from trials([], [generated], [2048], [8], (512, 1024, 1536, 2048))
    for size in page_sizes:
        yield Trial(generated=generated, depth=4096, page_size=size)
