"""Numbers on pages are those of mlx-lm's own caches; the zoo has every model."""

import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: pip install mlx-lm")

import mlx.core as mx  # noqa: E402
import mlx_lm_zoo as zoo  # noqa: E402
from mlx_lm.models.cache import make_prompt_cache  # noqa: E402
from paged_mlx._native import BUILT  # noqa: E402
from paged_mlx.mlx_lm import enable  # noqa: E402


@pytest.mark.parametrize("page_size", [1, 7, 16, 64])
def test_page_size_does_not_change_tokens(page_size):
    model, prompt = zoo.tiny("gemma3_text"), zoo.prompt(45, seed=3)
    expected = zoo.single(model, prompt, max_tokens=16)
    with enable(model, page_size=page_size) as paged:
        assert zoo.single(model, prompt, max_tokens=16) == expected
        assert (paged.paged_calls > 0) == BUILT
        assert paged.gathered_calls == {}


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
# phi attends with its q in float32, stablelm with its q and K.
@pytest.mark.parametrize("family", ["llama", "phi", "stablelm"])
def test_half_precision_logits_equal_stock_to_their_rounding(family, dtype):
    model, tokens = zoo.tiny(family), mx.array([zoo.prompt(40, seed=4)])
    model.set_dtype(dtype)
    expected = model(tokens, cache=make_prompt_cache(model)).astype(mx.float32)
    with enable(model) as paged:
        found = model(tokens, cache=make_prompt_cache(model)).astype(mx.float32)
        mx.eval(found)
        assert paged.paged_calls == 3 * BUILT
        assert [pool.dtype for pool in paged.groups[None].pools] == [dtype]
    precision = {mx.float16: 2**-10, mx.bfloat16: 2**-7}[dtype]
    assert mx.abs(found - expected).max() < 8 * precision * mx.abs(expected).max()


def test_a_batch_on_a_single_cache_equals_stock():
    model = zoo.tiny("llama")
    tokens = mx.array([zoo.prompt(20, seed=seed) for seed in range(3)])

    def logits():
        cache = make_prompt_cache(model)
        model(tokens[:, :15], cache=cache)
        return model(tokens[:, 15:], cache=cache)

    expected = logits()
    with enable(model, page_size=8) as paged:
        assert mx.abs(logits() - expected).max() < 1e-5
        assert paged.paged_calls == 6 * BUILT


def test_gathered_kv_are_right_when_a_model_reads_them_itself():
    model, tokens = zoo.tiny("llama"), mx.array([zoo.prompt(20, seed=5)])
    stock = make_prompt_cache(model)
    model(tokens, cache=stock)
    with enable(model, page_size=8):
        cache = make_prompt_cache(model)
        model(tokens, cache=cache)
        for ours, theirs in zip(cache, stock):
            for found, expected in zip(ours.keys_and_values(), (theirs.keys, theirs.values)):
                expected = expected[:, :, : theirs.offset]
                assert found.shape == expected.shape
                assert mx.abs(found - expected).max() < 1e-5


def test_window_pages_are_freed_as_the_sequence_grows():
    model, prompt = zoo.tiny("gemma3_text"), zoo.prompt(60, seed=6)
    with enable(model, page_size=8, retain=0) as paged:
        cache = make_prompt_cache(model)
        zoo.single(model, prompt, max_tokens=40, cache=cache)
        # 24 keys lie on at most 4 pages of 8, and the step that frees pages comes first.
        assert paged.groups[zoo.WINDOW].pages_used <= 5
        assert paged.groups[None].pages_used == -(-100 // 8)
