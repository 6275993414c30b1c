"""Passes that fail: nothing has changed and generation goes on, or going on is an error."""

import copy

import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: pip install mlx-lm")

import mlx.core as mx  # noqa: E402
import mlx_lm_zoo as zoo  # noqa: E402
from mlx_lm.generate import BatchGenerator  # noqa: E402
from mlx_lm.models.cache import make_prompt_cache  # noqa: E402
from paged_mlx import OutOfPages  # noqa: E402
from paged_mlx.mlx_lm import enable  # noqa: E402

PROMPTS = [zoo.prompt(14, seed=seed) for seed in range(3)]


def collect(generator, answers: dict) -> None:
    """Take responses until there are none."""
    while responses := generator.next_generated():
        for response in responses:
            answers[response.uid].append(response.token)


@pytest.mark.parametrize("first, last", [(24, None), (None, 24)])
def test_a_pass_that_one_window_cannot_begin_is_taken_back_in_the_others(first, last):
    model = zoo.tiny("gemma3_text")
    expected = zoo.single(model, PROMPTS[0], max_tokens=6)
    with enable(model, page_size=8, num_pages=8) as paged:
        cache = make_prompt_cache(model)
        full = paged.groups[last].allocator
        held = full.allocate_pages(8)
        for _ in range(2):
            with pytest.raises(OutOfPages):
                model(mx.array([PROMPTS[0][:-1]]), cache=cache)
            assert [layer.offset for layer in cache] == [0] * 3
        full.free_pages(held)
        model(mx.array([PROMPTS[0][:-1]]), cache=cache)
        assert [layer.offset for layer in cache] == [13] * 3
        assert zoo.single(model, PROMPTS[0][-1:], max_tokens=6, cache=cache) == expected
        paged.check()


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_next", "falcon_h1"])
@pytest.mark.parametrize("prefix_cache", [False, True])
def test_a_batch_that_runs_out_of_pages_waits_for_them(family, prefix_cache):
    model = zoo.tiny(family)
    expected = zoo.batched(model, PROMPTS, [10] * 3)
    with enable(model, page_size=8, num_pages=7, prefix_cache=prefix_cache) as paged:
        generator = BatchGenerator(model, max_tokens=10, prefill_step_size=16)
        uids = generator.insert(PROMPTS)
        answers = {uid: [] for uid in uids}
        collect(generator, answers)
        assert [answers[uid] for uid in uids] == expected
        paged.check()


def failing_once(monkeypatch, model, layer: int) -> None:
    """Have one layer of a model raise at its next call."""
    broken = model.layers[layer]
    left = [1]

    def call(self, *args, before=type(broken).__call__, **options):
        if self is broken and left:
            left.pop()
            raise RuntimeError("a fault of the model")
        return before(self, *args, **options)

    monkeypatch.setattr(type(broken), "__call__", call)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("layer", [1, 2])
def test_a_cache_that_only_some_layers_have_written_is_an_error(family, layer, monkeypatch):
    model = zoo.tiny(family)
    expected = zoo.single(model, PROMPTS[0], max_tokens=6)
    with enable(model, page_size=8, prefix_cache=True) as paged:
        cache = make_prompt_cache(model)
        model(mx.array([PROMPTS[0][:-1]]), cache=cache)
        before = copy.deepcopy(cache)
        failing_once(monkeypatch, model, layer)
        with pytest.raises(RuntimeError, match="a fault of the model"):
            model(mx.array([PROMPTS[0][-1:]]), cache=cache)
        with pytest.raises(ValueError, match=r"must hold (as many|equally many) tokens of "):
            model(mx.array([[5]]), cache=cache)
        # Copies from before, and other sequences, are as they were.
        assert zoo.single(model, PROMPTS[0][-1:], max_tokens=6, cache=before) == expected
        assert zoo.single(model, PROMPTS[0], max_tokens=6) == expected
        paged.check()


@pytest.mark.parametrize("in_prompt", [True, False])
def test_a_batch_whose_model_fails_is_an_error_until_it_is_begun_anew(in_prompt, monkeypatch):
    model = zoo.tiny("llama")
    expected = zoo.batched(model, PROMPTS, [6] * 3)
    with enable(model, page_size=8, prefix_cache=True) as paged:
        generator = BatchGenerator(model, max_tokens=6)
        uids = generator.insert(PROMPTS)
        if not in_prompt:
            generator.next_generated()
        failing_once(monkeypatch, model, 2)
        with pytest.raises(RuntimeError, match="a fault of the model"):
            generator.next_generated()
        with pytest.raises(
            ValueError, match=r"must hold as many tokens of the sequence as other layers"
        ):
            generator.next_generated()
        generator.remove(uids)
        assert zoo.batched(model, PROMPTS, [6] * 3) == expected
        paged.check()


@pytest.mark.parametrize("prefix_cache", [False, True])
def test_generators_that_are_given_up_give_their_pages_back(prefix_cache):
    model = zoo.tiny("llama")
    with enable(model, page_size=8, prefix_cache=prefix_cache) as paged:
        steps = zoo.GENERATE.generate_step(mx.array(PROMPTS[0]), model, max_tokens=50)
        next(steps)
        generator = BatchGenerator(model, max_tokens=50)
        generator.insert(PROMPTS)
        generator.next_generated()
        unstarted = zoo.GENERATE.generate_step(mx.array(PROMPTS[1]), model, max_tokens=50)
        assert paged.groups[None].pages_used > 0
        del steps, generator, unstarted
        if prefix_cache:
            paged.prefixes.reset()
        assert paged.groups[None].pages_used == 0
        paged.check()
