"""A real model answers several questions at once, its K and V in pages.

All prompts begin with the same system prompt: its pages are stored once and shared. The
same batch runs through mlx-lm's own caches beside it, and every token is compared.

    paged-mlx demo [--tokens N] [--plain]
"""

from __future__ import annotations

import contextlib
import copy
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import mlx.core as mx
from mlx_lm.generate import BatchGenerator

from paged_mlx.mlx_lm import enable
from paged_mlx.mlx_lm.demo import smollm2
from paged_mlx.mlx_lm.demo.screen import make_screen

SYSTEM = """You are Ada, a friendly guide in a science museum for children. Visitors ask \
short questions and you answer each of them in two or three plain sentences. You never use \
difficult words without explaining them, and you stay kind and cheerful. When a question is \
about animals, name one animal. When a question is about space, name one planet or star. \
The museum opens at nine and closes at five."""

QUESTIONS = [
    "Why is the sky blue?",
    "How do birds fly?",
    "Why does the moon change its shape?",
    "What do bees eat?",
]

PAGE_SIZE = 16


def run(tokens: int, plain: bool, as_json: bool = False) -> int:
    """Run the demo; 0: all tokens are equal, 1: they are not, 2: there is no model to be had.

    Args:
        tokens: Of each answer, at most.
        plain: Lines of text, no live display.
        as_json: Print the figures alone; what else is said goes to stderr.
    """
    if as_json:
        with contextlib.redirect_stdout(sys.stderr):
            batch = answered(tokens, make_screen(plain=True))
        if batch is not None:
            print(json.dumps(batch.figures, indent=1))
    else:
        batch = answered(tokens, make_screen(plain=plain or not sys.stdout.isatty()))
    return 2 if batch is None else int(not batch.all_equal)


def answered(tokens: int, screen) -> Batch | None:
    """The batch with its answers, shown as they come; None: there is no model to be had."""
    started = time.perf_counter()
    try:
        model, tokenizer = smollm2.load(screen.say)
    except RuntimeError as error:  # no network, no room: one sentence says it
        print(error, file=sys.stderr)
        return None
    with enable(model, page_size=PAGE_SIZE) as paged:
        batch = Batch(model, tokenizer, paged, tokens, screen)
        batch.prefill()
        batch.generate()
    screen.report(batch)
    screen.say(f"{time.perf_counter() - started:.0f} s in all")
    return batch


@dataclass
class Answer:
    """One question's answer: tokens from pages, and those of mlx-lm's own caches."""

    question: str
    decode: Callable[[list[int]], str]
    tokens: list[int] = field(default_factory=list)
    stock_tokens: list[int] = field(default_factory=list)
    finished: bool = False

    @property
    def text(self) -> str:
        return self.decode(self.tokens)

    @property
    def marks(self) -> list[bool]:
        """Whether each token equals the stock one, as far as both have come."""
        return [ours == theirs for ours, theirs in zip(self.tokens, self.stock_tokens)]

    @property
    def is_equal(self) -> bool:
        return self.tokens == self.stock_tokens


@dataclass
class Memory:
    """Bytes of K and V at their peaks: allocated, and in use where pages tell."""

    pages: int = 0
    pages_in_use: int = 0
    stock: int = 0


class Batch:
    """The questions as one batch, twice: on pages, and on mlx-lm's own caches.

    Attributes:
        answers: One for each question.
        page_map: Page ids of each sequence, the last time that all were there.
        memory: Of both at their peaks.
    """

    def __init__(self, model, tokenizer, paged, max_tokens, screen):
        self.model = model
        self.tokenizer = tokenizer
        self.paged = paged
        self.max_tokens = max_tokens
        self.screen = screen
        self.system, self.prompts = split_prompts(tokenizer)
        self.answers = [
            Answer(question, lambda ids: tokenizer.decode(ids, skip_special_tokens=True))
            for question in QUESTIONS
        ]
        self.page_map: list[list[int]] = []
        self.memory = Memory()
        (self.group,) = paged.groups.values()

    def prefill(self) -> None:
        """Read the system prompt into both kinds of cache, and hand out copies."""
        length = f"{len(self.system)} tokens"
        self.screen.say(f"reading the system prompt, {length}, into pages")
        on_pages = self._read(self.paged.make_cache())
        self.screen.say(f"reading the system prompt, {length}, into mlx-lm's own cache")
        stock = self._read(self.paged.stock_cache())
        self.on_pages = self._batch(self.paged.fork(on_pages, len(self.prompts)))
        self.paged.disable()  # a batch that begins now stays on mlx-lm's own caches
        self.stock = self._batch([copy.deepcopy(stock) for _ in self.prompts])
        self.paged.enable()

    def _read(self, cache):
        self.model(mx.array([self.system]), cache=cache)
        mx.eval([layer.state for layer in cache])
        return cache

    def _batch(self, caches):
        generator = BatchGenerator(
            self.model,
            stop_tokens=[[token] for token in self.tokenizer.eos_token_ids],
            max_tokens=self.max_tokens,
        )
        generator.insert(self.prompts, caches=caches)
        return generator

    def generate(self) -> None:
        """Step both batches in turn: each token is compared as it comes."""
        self.screen.say(f"reading {len(self.prompts)} questions, then answering them")
        self._measure()
        with self.screen.answering(self.answers) as refresh:
            going = True
            while going:
                ours = self.on_pages.next_generated()
                theirs = self.stock.next_generated()
                self._take(ours, theirs)
                self._measure()
                refresh()
                going = bool(ours or theirs)

    def _take(self, ours, theirs) -> None:
        for response in ours:
            answer = self.answers[response.uid]
            answer.tokens.append(response.token)
            answer.finished = response.finish_reason is not None
        for response in theirs:
            self.answers[response.uid].stock_tokens.append(response.token)

    def _measure(self) -> None:
        page_map = self.group.page_map()
        if len(page_map) == len(self.answers):
            self.page_map = page_map
        self.memory.pages = max(self.memory.pages, self.paged.nbytes)
        self.memory.pages_in_use = max(self.memory.pages_in_use, self.paged.nbytes_used)
        self.memory.stock = max(self.memory.stock, self.stock.prompt_cache_nbytes)

    @property
    def all_equal(self) -> bool:
        return all(answer.is_equal for answer in self.answers)

    @property
    def figures(self) -> dict[str, Any]:
        """What a run has shown, as JSON can hold it."""
        answers = [
            {"question": a.question, "text": a.text, "tokens": len(a.tokens), "equal": sum(a.marks)}
            for a in self.answers
        ]
        return {
            "all_equal": self.all_equal,
            "answers": answers,
            "page_size": self.group.page_size,
            "pages": self.page_map,
            "memory": asdict(self.memory),
            "routes": self.paged.routes,
        }


def split_prompts(tokenizer) -> tuple[list[int], list[list[int]]]:
    """The tokens that all prompts begin with, and the rest of each."""
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}],
            add_generation_prompt=True,
        )
        for question in QUESTIONS
    ]
    common = 0
    while len({prompt[common] for prompt in prompts}) == 1:
        common += 1
    return prompts[0][:common], [prompt[common:] for prompt in prompts]
