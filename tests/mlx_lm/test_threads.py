"""One enabled model in several threads: they take turns, and what cannot be is an error."""

import threading

import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: pip install mlx-lm")

import mlx.core as mx  # noqa: E402
import mlx_lm_zoo as zoo  # noqa: E402
from mlx_lm.models.cache import make_prompt_cache  # noqa: E402
from paged_mlx.mlx_lm import enable, explain, passes  # noqa: E402

PROMPTS = [zoo.prompt(50, seed=seed) for seed in range(4)]


def run_in_threads(*jobs) -> list:
    """The results of jobs in a thread each, or what they raised."""
    results = [None] * len(jobs)

    def run(i):
        try:
            results[i] = jobs[i]()
        except Exception as error:
            results[i] = error
        mx.synchronize()  # MLX aborts at exit if work of an ended thread is under way

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("family, prefix_cache", [("llama", True), ("gemma3_text", False)])
def test_threads_that_generate_at_once_get_stocks_tokens(family, prefix_cache):
    model = zoo.tiny(family)
    single = [zoo.single(model, prompt, 12) for prompt in PROMPTS]
    batch = zoo.batched(model, PROMPTS, [6, 9, 3, 5], late={3: 2})
    with enable(model, page_size=8, prefix_cache=prefix_cache) as paged:

        def alone():
            return [zoo.single(model, prompt, 12) for prompt in PROMPTS]

        def together():
            return [zoo.batched(model, PROMPTS, [6, 9, 3, 5], late={3: 2}) for _ in range(2)]

        found = run_in_threads(alone, together, alone)
        assert found == [single, [batch, batch], single]
        assert alone() == single
        assert paged.gathered_calls == {}
        paged.check()
        for cache in paged.prefixes.caches.values() if prefix_cache else ():
            cache.check()


def test_a_pass_that_its_thread_does_not_compute_keeps_others_out_until_it_does(monkeypatch):
    monkeypatch.setattr(passes, "PATIENCE", 0.2)
    model, prompt = zoo.tiny("llama"), PROMPTS[0]
    expected = zoo.single(model, prompt, 5)
    with enable(model, page_size=8) as paged:
        cache = make_prompt_cache(model)
        pending = model(mx.array([prompt]), cache=cache)
        for _ in range(2):
            (error,) = run_in_threads(lambda: zoo.single(model, prompt, 5))
            assert str(error).startswith("[update_and_fetch] the passes of thread 'MainThread'")
        # This thread goes on, before and after it has computed.
        following = model(mx.array([[3]]), cache=cache)
        mx.eval(pending, following)
        assert run_in_threads(lambda: zoo.single(model, prompt, 5)) == [expected]
        assert zoo.single(model, prompt, 5) == expected
        paged.check()


def test_what_an_ended_thread_has_left_pending_is_an_error_at_once():
    model, prompt = zoo.tiny("llama"), PROMPTS[0]
    left = []
    with enable(model, page_size=8):
        run_in_threads(lambda: left.append(model(mx.array([prompt]), cache=model.make_cache())))
        with pytest.raises(ValueError, match="must be evaluated there before another thread"):
            zoo.single(model, prompt, 5)


def test_a_cache_goes_on_in_another_thread():
    model, prompt = zoo.tiny("gemma3_text"), PROMPTS[0]
    expected = zoo.single(model, prompt, 12)
    with enable(model, page_size=8) as paged:
        cache = make_prompt_cache(model)
        first = zoo.single(model, prompt, 5, cache=cache)
        for layer in cache:
            layer.trim(1)
        (rest,) = run_in_threads(lambda: zoo.single(model, first[-1:], 7, cache=cache))
        assert first + rest == expected
        paged.check()


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_explaining_and_checking_in_another_thread_disturb_nothing(family):
    model = zoo.tiny(family)
    expected = [zoo.single(model, prompt, 8) for prompt in PROMPTS]
    with enable(model, page_size=8) as paged:
        done = []

        def generate():
            try:
                return [zoo.single(model, prompt, 8) for prompt in PROMPTS for _ in range(2)][::2]
            finally:
                done.append(1)

        def look():
            looks = 0
            while not done or looks < 3:
                assert len(explain(model).layers) == 3
                paged.check()
                looks += 1
            return looks

        found, looks = run_in_threads(generate, look)
        assert found == expected and looks >= 3
        paged.check()
