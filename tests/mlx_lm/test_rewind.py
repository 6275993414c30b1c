"""Tokens taken back: speculative decoding, trimming, and windows that must allow for it."""

import copy

import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: pip install mlx-lm")

import mlx.core as mx  # noqa: E402
import mlx_lm_zoo as zoo  # noqa: E402
from mlx_lm.models.cache import (  # noqa: E402
    can_trim_prompt_cache,
    make_prompt_cache,
    trim_prompt_cache,
)
from paged_mlx.mlx_lm import enable  # noqa: E402


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss"])
@pytest.mark.parametrize("same_draft", [True, False])
def test_speculative_tokens_equal_plain_greedy(family, same_draft):
    # Long enough that the windows have dropped keys: stock mlx-lm goes wrong there.
    model, prompt = zoo.tiny(family), zoo.prompt(45, seed=1)
    draft = zoo.tiny(family, seed=0 if same_draft else 7)
    expected = zoo.single(model, prompt, max_tokens=24)
    with enable(model, page_size=8) as paged, enable(draft, page_size=8):
        assert zoo.speculative(model, draft, prompt, max_tokens=24) == expected
        assert paged.gathered_calls == {}
        paged.check()


def test_a_paged_model_takes_a_draft_on_stock_caches():
    model, prompt = zoo.tiny("llama"), zoo.prompt(45, seed=1)
    draft = zoo.tiny("llama", seed=7)
    expected = zoo.single(model, prompt, max_tokens=24)
    with enable(model):
        assert zoo.speculative(model, draft, prompt, max_tokens=24) == expected


@pytest.mark.parametrize("n", [1, 7, 8, 9, 20])
def test_trimmed_tokens_are_forgotten(n):
    model, prompt = zoo.tiny("llama"), zoo.prompt(40, seed=1)
    expected = zoo.single(model, prompt[: 40 - n] + [5, 6], max_tokens=6)
    with enable(model, page_size=8):
        cache = make_prompt_cache(model)
        model(mx.array([prompt]), cache=cache)
        assert trim_prompt_cache(cache, n) == n
        assert [layer.offset for layer in cache] == [40 - n] * 3
        assert zoo.single(model, [5, 6], max_tokens=6, cache=cache) == expected


def test_trim_takes_back_no_more_than_there_is():
    model = zoo.tiny("llama")
    with enable(model):
        cache = make_prompt_cache(model)
        assert trim_prompt_cache(cache, 3) == 0
        model(mx.array([[1, 2]]), cache=cache)
        assert trim_prompt_cache(cache, 3) == 2
        assert cache[0].empty()


def test_trimming_a_fork_leaves_the_other_tokens_alone():
    model, prompt = zoo.tiny("llama"), zoo.prompt(20, seed=1)
    expected = zoo.single(model, prompt + [5], max_tokens=6)
    with enable(model, page_size=8):
        cache = make_prompt_cache(model)
        model(mx.array([prompt]), cache=cache)
        fork = copy.deepcopy(cache)
        trim_prompt_cache(fork, 10)
        zoo.single(model, [8, 9, 10], max_tokens=10, cache=fork)
        assert zoo.single(model, [5], max_tokens=6, cache=cache) == expected


def test_a_rewind_beyond_what_the_window_kept_is_refused():
    model = zoo.tiny("gemma3_text")
    with enable(model, page_size=8, retain=8):
        cache = make_prompt_cache(model)
        zoo.single(model, zoo.prompt(90, seed=1), max_tokens=2, cache=cache)
        assert can_trim_prompt_cache(cache)
        before = [layer.offset for layer in cache]
        with pytest.raises(ValueError, match=r"\[trim\] n must leave the window's pages in place"):
            trim_prompt_cache(cache, 50)
        assert [layer.offset for layer in cache] == before


def test_without_retain_a_window_says_that_it_cannot_be_trimmed():
    model = zoo.tiny("gemma3_text")
    with enable(model, page_size=8, retain=0):
        cache = make_prompt_cache(model)
        model(mx.array([zoo.prompt(20, seed=1)]), cache=cache)
        zoo.single(model, zoo.prompt(60, seed=1), max_tokens=2, cache=cache)
        assert not can_trim_prompt_cache(cache)
        assert trim_prompt_cache(cache, 1) == 0


def test_retaining_everything_allows_any_rewind_of_a_window():
    model, prompt = zoo.tiny("gemma3_text"), zoo.prompt(90, seed=1)
    expected = zoo.single(model, prompt[:30] + [5], max_tokens=8)
    with enable(model, page_size=8, retain=None):
        cache = make_prompt_cache(model)
        model(mx.array([prompt]), cache=cache)
        assert trim_prompt_cache(cache, 60) == 60
        assert zoo.single(model, [5], max_tokens=8, cache=cache) == expected


def test_a_window_that_keeps_everything_can_be_rewound_after_a_known_prompt():
    model, prompt = zoo.tiny("cohere2"), zoo.prompt(60, seed=1)
    expected = zoo.single(model, prompt, 8)
    with enable(model, retain=None, prefix_cache=True) as paged:
        for _ in range(2):
            assert zoo.speculative(model, model, prompt, 8) == expected
        assert paged.prefixes.tokens_reused > 0
        paged.check()
