"""Prompt caches in files, and to and from mlx-lm's own."""

import os

import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: pip install mlx-lm")

import mlx.core as mx  # noqa: E402
import mlx_lm_zoo as zoo  # noqa: E402
from mlx_lm.models.cache import (  # noqa: E402
    can_trim_prompt_cache,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)

from paged_mlx.mlx_lm import enable  # noqa: E402

FAMILIES = ["llama", "gemma3_text", "gpt_oss"]
PROMPT = zoo.prompt(61, seed=1)


def read_prompt(model, cache):
    model(mx.array([PROMPT[:40]]), cache=cache)
    for i in range(40, 61):
        model(mx.array([PROMPT[i : i + 1]]), cache=cache)
    mx.eval([layer.state for layer in cache])
    return cache


@pytest.fixture(params=FAMILIES)
def model(request):
    return zoo.tiny(request.param)


@pytest.fixture
def expected(model):
    return zoo.single(model, [5], max_tokens=30, cache=read_prompt(model, make_prompt_cache(model)))


def test_a_saved_prompt_goes_on_after_a_restart(model, expected, tmp_path):
    path = str(tmp_path / "prompt.safetensors")
    with enable(model, page_size=8) as paged:
        paged.save(path, read_prompt(model, paged.make_cache()), {"about": "a test"})
        assert os.path.getsize(path) < paged.nbytes / 2
    with enable(model, page_size=16) as paged:
        cache, metadata = paged.load(path, return_metadata=True)
        assert metadata == {"about": "a test"}
        assert zoo.single(model, [5], max_tokens=30, cache=cache) == expected
        assert paged.gathered_calls == {}
        paged.check()


def test_mlx_lm_reads_our_file(model, expected, tmp_path):
    path = str(tmp_path / "prompt.safetensors")
    with enable(model, page_size=8) as paged:
        paged.save(path, read_prompt(model, paged.make_cache()))
    assert zoo.single(model, [5], max_tokens=30, cache=load_prompt_cache(path)) == expected


def test_we_read_mlx_lms_file(model, expected, tmp_path):
    path = str(tmp_path / "prompt.safetensors")
    save_prompt_cache(path, read_prompt(model, make_prompt_cache(model)))
    with enable(model, page_size=8) as paged:
        assert zoo.single(model, [5], max_tokens=30, cache=paged.load(path)) == expected
        assert paged.paged_calls > 0


def test_a_window_cache_that_holds_more_than_its_window_is_read(model):
    def read_at_once(cache):
        model(mx.array([PROMPT]), cache=cache)
        return cache

    stock = read_at_once(make_prompt_cache(model))
    expected = zoo.single(model, [5], max_tokens=20, cache=read_at_once(make_prompt_cache(model)))
    with enable(model, page_size=8) as paged:
        assert zoo.single(model, [5], max_tokens=20, cache=paged.from_stock(stock)) == expected


def test_a_window_read_from_a_file_cannot_be_rewound_before_its_first_token():
    model = zoo.tiny("gemma3_text")
    stock = read_prompt(model, make_prompt_cache(model))
    with enable(model, page_size=64) as paged:
        cache = paged.from_stock(stock)
        assert can_trim_prompt_cache(cache)
        # One page holds all; what was not in the file is not in it.
        with pytest.raises(ValueError, match=r"\[trim\] n must leave the window's pages"):
            trim_prompt_cache(cache, 20)


def test_a_batch_can_be_joined_by_a_prompt_from_mlx_lm(model, expected):
    stock = read_prompt(model, make_prompt_cache(model))
    with enable(model, page_size=8) as paged:
        caches = [paged.from_stock(stock), paged.make_cache()]
        found = zoo.batched(model, [[5], PROMPT[:9]], [30, 4], caches=caches)
        assert found[0] == expected


@pytest.mark.parametrize(
    "other, message",
    [
        ({"num_hidden_layers": 2}, "must have 3 caches"),
        ({"num_key_value_heads": 4}, r"must hold \(batch, heads, dim of K, dim of V\)"),
    ],
)
def test_a_prompt_of_another_model_is_refused(other, message):
    cache = make_prompt_cache(zoo.tiny("llama", **other))
    zoo.tiny("llama", **other)(mx.array([[1, 2]]), cache=cache)
    with enable(zoo.tiny("llama")) as paged:
        with pytest.raises(ValueError, match=message):
            paged.from_stock(cache)
        assert paged.groups[None].pages_used == 0


def test_a_prompt_with_another_kind_of_cache_is_refused():
    cache = make_prompt_cache(zoo.tiny("llama"))
    with enable(zoo.tiny("gemma3_text")) as paged:
        with pytest.raises(ValueError, match="must have a RotatingKVCache of 24"):
            paged.from_stock(cache)


def test_several_sequences_have_no_file(tmp_path):
    model = zoo.tiny("llama")
    with enable(model) as paged:
        cache = paged.make_cache()
        model(mx.array([[1, 2], [3, 4]]), cache=cache)
        with pytest.raises(ValueError, match="must hold one sequence"):
            paged.save(str(tmp_path / "two.safetensors"), cache)
