"""Fresh prompts go to MLX's attention where the plan says so, and to the pages all the same."""

import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: pip install mlx-lm")

import mlx.core as mx  # noqa: E402
import mlx_lm_zoo as zoo  # noqa: E402
from paged_mlx.forward import fresh_prompt  # noqa: E402
from paged_mlx.machine import thresholds  # noqa: E402
from paged_mlx.mlx_lm import enable  # noqa: E402

LAYERS = 3


@pytest.fixture
def from_4_tokens():
    with thresholds.planned_with("cpu", 4, sdpa_prompt=4):
        yield


def test_the_cpu_reads_pages_of_a_fresh_prompt():
    with enable(zoo.tiny("llama")) as paged:
        zoo.single(paged.model, zoo.prompt(20, seed=1), max_tokens=4)
        assert paged.fresh_prompt_calls == 0 and paged.paged_calls > 0


# gpt_oss has sinks and windows, gemma3_text windows.
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss"])
def test_only_the_first_chunk_is_fresh_and_tokens_equal_stock(from_4_tokens, family):
    model, prompt = zoo.tiny(family), zoo.prompt(30, seed=1)
    expected = zoo.single(model, prompt, max_tokens=12, chunk=6)
    before = fresh_prompt.calls[1]
    with enable(model, page_size=8) as paged:
        assert zoo.single(model, prompt, max_tokens=12, chunk=6) == expected
        layers = len(model.layers)
        assert paged.fresh_prompt_calls == fresh_prompt.calls[1] - before == layers
        assert paged.paged_calls > layers and paged.gathered_calls == {}
        assert paged.is_wholly_paged
        paged.check()


def test_a_prompt_that_continues_another_reads_its_pages(from_4_tokens):
    model = zoo.tiny("llama")
    prompts = [zoo.prompt(24, seed=1) + zoo.prompt(9, seed=seed) for seed in (2, 3)]
    expected = [zoo.single(model, prompt, max_tokens=6) for prompt in prompts]
    with enable(model, page_size=8, prefix_cache=True) as paged:
        assert [zoo.single(model, prompt, max_tokens=6) for prompt in prompts] == expected
        assert paged.fresh_prompt_calls == LAYERS  # the second finds its beginning cached


def test_a_padded_batch_of_fresh_prompts_equals_stock(from_4_tokens):
    model = zoo.tiny("llama")
    prompts = [zoo.prompt(length, seed=length) for length in (9, 30, 17)]
    expected = zoo.batched(model, prompts, [8, 3, 6])
    before = fresh_prompt.calls[3]
    with enable(model, page_size=8) as paged:
        assert zoo.batched(model, prompts, [8, 3, 6]) == expected
        assert paged.fresh_prompt_calls == fresh_prompt.calls[3] - before == LAYERS
        assert paged.gathered_calls == {}


def test_prompts_below_the_threshold_read_pages(from_4_tokens):
    model = zoo.tiny("llama")
    with enable(model) as paged:
        cache = paged.make_cache()
        mx.eval(model(mx.array([[1, 2, 3]]), cache=cache))
        assert paged.fresh_prompt_calls == 0
        mx.eval(model(mx.array([[1, 2, 3, 4]]), cache=paged.make_cache()))
        assert paged.fresh_prompt_calls == LAYERS


def test_queries_of_another_dtype_than_the_pages_read_pages():
    model = zoo.tiny("phi")  # attends with its q in float32
    model.set_dtype(mx.float16)
    with enable(model) as paged, thresholds.planned_with("cpu", 2, sdpa_prompt=4):
        mx.eval(model(mx.array([zoo.prompt(20, seed=1)]), cache=paged.make_cache()))
        assert paged.fresh_prompt_calls == 0 and paged.paged_calls == LAYERS
