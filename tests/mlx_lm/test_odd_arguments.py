"""Whatever a caller passes, a public call for mlx-lm takes it or refuses it, and changes nothing."""

import inspect

import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: pip install mlx-lm")

import mlx.core as mx  # noqa: E402
import mlx_lm_zoo as zoo  # noqa: E402
from bad_input.odd_values import COMMON, OTHERS, complaints, parameters  # noqa: E402
from paged_mlx.mlx_lm import (  # noqa: E402
    PagedModel,
    SpeculativeBatchGenerator,
    enable,
    explain,
    speculative_batch_generate,
)
from paged_mlx.mlx_lm.model_seam import paged_model_of  # noqa: E402

PROMPT = list(range(1, 20))
MODEL = zoo.tiny("llama")


class Tokenizer:
    eos_token_ids = {0}

    def decode(self, tokens):
        return str(tokens)


class World:
    """A model on pages, a prompt that it has read, and a file of it."""

    folder = None

    def __init__(self):
        if paged_model_of(MODEL) is not None:
            paged_model_of(MODEL).disable()
        self._paged = self._cache = self._generator = None

    @property
    def paged(self):
        if self._paged is None:
            self._paged = enable(MODEL, page_size=8, prefix_cache=True)
            self._cache, rest = self._paged.begin(PROMPT)
            mx.eval(MODEL(mx.array([rest]), cache=self._cache))
            self._paged.remember(PROMPT, self._cache)
            self._paged.save(self.path, self._cache)
        return self._paged

    @property
    def path(self):
        return str(self.folder / "cache.safetensors")

    @property
    def cache(self):
        return self.paged and self._cache

    @property
    def generator(self):
        if self._generator is None:
            self._generator = SpeculativeBatchGenerator(MODEL)
            self._generator.insert([PROMPT], 3)
        return self._generator

    def state(self):
        enabled = paged_model_of(MODEL) is not None
        if self._paged is None:
            return enabled
        self._paged.passes.reclaim()
        counts = [list(group.allocator.counts) for group in self._paged.groups.values()]
        return enabled, counts, [layer.offset for layer in self._cache]

    def check(self):
        if self._paged is not None:
            self._paged.check()


CALLS = {
    "enable": lambda w: (enable, {"model": MODEL}),
    "explain": lambda w: (explain, {"model": MODEL}),
    "begin": lambda w: (w.paged.begin, {"tokens": PROMPT}),
    "known": lambda w: (w.paged.known, {"tokens": PROMPT}),
    "remember": lambda w: (w.paged.remember, {"tokens": PROMPT, "prompt_cache": w.cache}),
    "fork": lambda w: (w.paged.fork, {"prompt_cache": w.cache, "n": 2}),
    "make_cache": lambda w: (w.paged.make_cache, {}),
    "rotating_cache": lambda w: (w.paged.rotating_cache, {"size": 8}),
    "to_stock": lambda w: (w.paged.to_stock, {"prompt_cache": w.cache}),
    "from_stock": lambda w: (w.paged.from_stock, {"prompt_cache": w.paged.to_stock(w.cache)}),
    "save": lambda w: (w.paged.save, {"path": w.path, "prompt_cache": w.cache}),
    "load": lambda w: (w.paged.load, {"path": w.path}),
    "estimate": lambda w: (w.paged.estimate, {"lengths": [5], "max_new_tokens": 5}),
    "trim_prefixes": lambda w: (w.paged.trim_prefixes, {"nbytes": 0}),
    "speculative_batch_generate": lambda w: (
        speculative_batch_generate,
        {"model": MODEL, "tokenizer": Tokenizer(), "prompts": [PROMPT], "max_tokens": 2},
    ),
    "SpeculativeBatchGenerator": lambda w: (SpeculativeBatchGenerator, {"model": MODEL}),
    "insert": lambda w: (w.generator.insert, {"prompts": [PROMPT], "max_tokens": 2}),
    "remove": lambda w: (w.generator.remove, {"uids": [0]}),
}


@pytest.fixture(autouse=True)
def the_model_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    World.folder = tmp_path
    yield
    World()


@pytest.mark.parametrize("name", CALLS)
def test_an_odd_argument_is_taken_or_refused_in_the_one_form(name):
    assert (
        complaints(World, CALLS[name], COMMON, (OSError,) if name in ("save", "load") else ()) == []
    )


@pytest.mark.long
@pytest.mark.parametrize("name", CALLS)
def test_so_is_an_argument_of_any_other_kind(name):
    assert (
        complaints(World, CALLS[name], OTHERS, (OSError,) if name in ("save", "load") else ()) == []
    )


def test_every_public_call_is_tried():
    methods = inspect.getmembers(PagedModel, inspect.isfunction)
    methods += inspect.getmembers(SpeculativeBatchGenerator, inspect.isfunction)
    public = {key for key, one in methods if key[0] != "_" and len(parameters(one)) > 1}
    assert public - set(CALLS) == {"has_pages"}  # which waiting prompts ask


def test_a_limit_may_be_larger_than_an_int32():
    with enable(MODEL, max_bytes=2**33) as paged:
        assert paged.passes.max_bytes == 2**33
