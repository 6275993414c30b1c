"""One enabled model in several threads: they take turns, and what cannot be is an error."""

import contextlib
import functools
import random
import threading
from concurrent import futures

import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: pip install mlx-lm")

import mlx.core as mx  # noqa: E402
import mlx_lm_zoo as zoo  # noqa: E402
from mlx_lm.models.cache import make_prompt_cache  # noqa: E402
from paged_mlx.mlx_lm import enable, explain  # noqa: E402

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


def test_a_pass_whose_logits_nobody_asks_for_keeps_no_other_thread_out():
    model, prompt = zoo.tiny("llama"), PROMPTS[0]
    expected = zoo.single(model, prompt, 5)
    logits = model(mx.array([prompt]))
    other = threading.Event()  # another thread is there: a program with one computes when asked
    waiting = threading.Thread(target=other.wait)
    waiting.start()
    with enable(model, page_size=8) as paged:
        cache = make_prompt_cache(model)
        pending = model(mx.array([prompt]), cache=cache)
        assert run_in_threads(lambda: zoo.single(model, prompt, 5)) == [expected]
        following = model(mx.array([[3]]), cache=cache)
        assert run_in_threads(lambda: zoo.single(model, prompt, 5)) == [expected]
        assert mx.allclose(pending, logits, atol=1e-4)
        mx.eval(following)
        assert zoo.single(model, prompt, 5) == expected
        paged.check()
    other.set()
    waiting.join()


def test_what_an_ended_thread_has_left_pending_keeps_nobody_out():
    model, prompt = zoo.tiny("llama"), PROMPTS[0]
    expected = zoo.single(model, prompt, 5)
    left = []
    with enable(model, page_size=8) as paged:
        run_in_threads(lambda: left.append(model(mx.array([prompt]), cache=model.make_cache())))
        assert zoo.single(model, prompt, 5) == expected
        paged.check()


class Fault(Exception):
    pass


def failing(when: str):
    """A processor of logits, or a sampler, that raises the third time it is called."""
    calls = []

    def processor(tokens, logits):
        calls.append(1)
        if len(calls) == 3:
            raise Fault(when)
        return logits

    def sampler(logprobs):
        processor(None, None)
        return mx.argmax(logprobs, axis=-1)

    return {"logits_processors": [processor]} if when == "processor" else {"sampler": sampler}


def generate(model, prompt, **options):
    steps = zoo.GENERATE.generate_step(mx.array(prompt), model, max_tokens=6, **options)
    return [int(token) for token, _ in steps]


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("holds", ["nothing", "its cache and the error"])
@pytest.mark.parametrize("when", ["processor", "sampler"])
def test_a_request_that_fails_keeps_no_other_thread_out(family, holds, when):
    model, prompt = zoo.tiny(family), PROMPTS[0]
    expected = generate(model, prompt)
    with enable(model, page_size=8) as paged, futures.ThreadPoolExecutor(1) as other:
        other.submit(int).result()  # it is there
        for _ in range(2):
            cache = make_prompt_cache(model) if holds != "nothing" else None
            with pytest.raises(Fault) as held:
                generate(model, prompt, prompt_cache=cache, **failing(when))
            if holds == "nothing":
                del held
            assert other.submit(generate, model, prompt).result(timeout=60) == expected
            assert other.submit(mx.synchronize).result() is None
        assert generate(model, prompt) == expected
        paged.check()


def in_the_middle(monkeypatch, model, do):
    """Have ``do(calls so far)`` called in the middle of each of the model's passes."""
    middle, calls = model.layers[1].mlp, []

    def stopping(self, x, before=type(middle).__call__):
        if self is middle:
            calls.append(1)
            do(len(calls))
        return before(self, x)

    monkeypatch.setattr(type(middle), "__call__", stopping)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("kept", [False, True])
def test_a_model_that_fails_in_the_middle_keeps_no_other_thread_out(kept, family, monkeypatch):
    model, prompt = zoo.tiny(family), PROMPTS[0]
    expected = generate(model, prompt)

    def fails(call):
        if call == 3:
            raise Fault

    with enable(model, page_size=8) as paged:
        first, other = futures.ThreadPoolExecutor(1), futures.ThreadPoolExecutor(1)
        with first, other:
            in_the_middle(monkeypatch, model, fails)
            failed = first.submit(generate, model, prompt)
            assert isinstance(failed.exception(timeout=60), Fault)
            if not kept:
                del failed
            assert other.submit(generate, model, prompt).result(timeout=60) == expected
            assert first.submit(generate, model, prompt).result(timeout=60) == expected
            for thread in (first, other):
                thread.submit(mx.synchronize).result()
        paged.check()


def test_a_pass_that_failed_before_there_was_another_thread_keeps_it_out_of_nothing(monkeypatch):
    model, prompt = zoo.tiny("llama"), PROMPTS[0]
    expected = generate(model, prompt)

    def fails(call):
        if call == 2:
            raise Fault

    with enable(model, page_size=8) as paged:
        in_the_middle(monkeypatch, model, fails)
        with pytest.raises(Fault) as held:
            generate(model, prompt)
        assert run_in_threads(lambda: generate(model, prompt)) == [expected]
        assert held.value is not None and generate(model, prompt) == expected
        paged.check()


def test_a_model_that_attends_by_itself_keeps_no_other_thread_out():
    model = zoo.tiny("gemma2")
    expected = [generate(model, prompt) for prompt in PROMPTS[:2]]
    with enable(model, page_size=8) as paged, futures.ThreadPoolExecutor(1) as other:
        for _ in range(2):
            cache = make_prompt_cache(model)
            pending = model(mx.array([PROMPTS[0]]), cache=cache)  # nobody computes it
            assert other.submit(generate, model, PROMPTS[1]).result(timeout=60) == expected[1]
            mx.eval(pending)
        other.submit(mx.synchronize).result()
        assert generate(model, PROMPTS[0]) == expected[0]
        paged.check()


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("grows", [False, True])
def test_a_pass_goes_on_after_another_thread_has_gone_before(family, grows, monkeypatch):
    model = zoo.tiny(family)
    expected = [generate(model, prompt) for prompt in PROMPTS]
    with enable(model, page_size=8) as paged, futures.ThreadPoolExecutor(1) as other:
        before = {window: group.allocator.total_pages for window, group in paged.groups.items()}
        held, found = [], []

        def lets_another_go_first(call):
            if threading.current_thread() is threading.main_thread() and call > 1:
                for prompt in PROMPTS[1:]:
                    found.append(other.submit(generate, model, prompt).result(timeout=60))
                if grows:
                    held.extend(make_prompt_cache(model) for _ in range(12))
                    for cache in held[-12:]:
                        other.submit(generate, model, PROMPTS[1], prompt_cache=cache).result(60)

        in_the_middle(monkeypatch, model, lets_another_go_first)
        assert generate(model, PROMPTS[0]) == expected[0]
        assert found == expected[1:] * (len(found) // 3) and len(found) >= 6
        other.submit(mx.synchronize).result()
        for window, group in paged.groups.items():
            assert (group.allocator.total_pages > before[window]) == grows
        paged.check()


@contextlib.contextmanager
def before_attention(model, do):
    """Have ``do()`` called when a layer of the main thread has brought K and V, and waits."""
    kind = type(make_prompt_cache(model)[0])

    def stopping(self, *kv, before=kind.update_and_fetch):
        fetched = before(self, *kv)
        if threading.current_thread() is threading.main_thread():
            do()
        return fetched

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "update_and_fetch", stopping)
        yield


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("grows", [False, True])
def test_a_layer_attends_after_another_thread_has_gone_before(family, grows):
    model = zoo.tiny(family)
    expected = [generate(model, prompt) for prompt in PROMPTS]
    with enable(model, page_size=8) as paged, futures.ThreadPoolExecutor(1) as other:
        held, found = [], []

        def lets_another_go_first():
            caches = [make_prompt_cache(model) for _ in range(12 if grows else 1)]
            for cache in caches:
                asked = other.submit(generate, model, PROMPTS[1], prompt_cache=cache)
                found.append(asked.result(timeout=60))
            held.extend(caches if grows and len(held) < 48 else ())

        with before_attention(model, lets_another_go_first):
            assert generate(model, PROMPTS[0]) == expected[0]
        assert found == [expected[1]] * len(found) and len(found) >= 12
        other.submit(mx.synchronize).result()
        paged.check()


def test_a_pass_goes_on_after_another_thread_has_changed_the_dtype():
    model = zoo.tiny("llama")
    prompt = mx.array([PROMPTS[0]])
    expected = model(prompt)
    half = zoo.tiny("llama")
    half.set_dtype(mx.float16)
    mx.eval(half.parameters())
    with enable(model, page_size=8) as paged:
        with futures.ThreadPoolExecutor(1) as other:
            kept = model.parameters()

            def changes_the_dtype():
                model.update(half.parameters())
                other.submit(generate, model, PROMPTS[1]).result(timeout=60)
                model.update(kept)

            with before_attention(model, changes_the_dtype):
                logits = model(prompt, cache=make_prompt_cache(model))
            assert mx.allclose(logits, expected, atol=0.02)
            other.submit(mx.synchronize).result()
        paged.check()


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


@pytest.mark.long
@pytest.mark.parametrize(
    "family, options",
    [
        ("llama", {"prefix_cache": True}),
        ("llama", {"prefix_cache": True, "max_bytes": 250_000}),
        ("gemma3_text", {"prefix_cache": True}),
        ("qwen3_5", {"prefix_cache": True}),
        ("gemma2", {}),
    ],
)
def test_faults_in_every_hook_of_four_threads_change_nobodys_tokens(family, options, monkeypatch):
    model = zoo.tiny(family)
    asked = [zoo.prompt(length, seed=length) for length in (20, 45, 70)]
    asked.append(asked[2][:50] + zoo.prompt(10, seed=9))
    expected = [zoo.single(model, prompt, 12) for prompt in asked]
    passes_left = threading.local()

    def may_fail(call):
        passes_left.count = getattr(passes_left, "count", 0) - 1
        if not passes_left.count:
            raise Fault

    def traffic(seed):
        draw, held, wrong = random.Random(seed), [], []
        for _ in range(16):
            i, kind = draw.randrange(len(asked)), draw.choice(["whole", "left", "model", "logits"])
            passes_left.count = draw.randrange(1, 8) if kind == "model" else 0

            def processor(tokens, logits, kind=kind):
                if kind == "logits" and draw.random() < 0.3:
                    raise Fault
                return logits

            chunk, cache = draw.choice([16, 2048]), draw.choice([None, make_prompt_cache(model)])
            steps, found = 12 if kind != "left" else draw.randrange(1, 12), []
            try:
                for token, _ in zoo.GENERATE.generate_step(
                    mx.array(asked[i]),
                    model,
                    max_tokens=steps,
                    prompt_cache=cache,
                    logits_processors=[processor],
                    prefill_step_size=chunk,
                ):
                    found.append(int(token))
            except Fault as error:
                held = [*held[-2:], error]
            if found != expected[i][: len(found)]:
                wrong.append((i, kind, found))
        return wrong

    in_the_middle(monkeypatch, model, may_fail)
    with enable(model, page_size=8, **options) as paged:
        jobs = [functools.partial(traffic, seed) for seed in range(4)]
        assert run_in_threads(*jobs) == [[], [], [], []]
        paged.check()
