"""A limited pool behind batches and the server: prompts wait, and no answer is lost."""

import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: pip install mlx-lm")

import mlx_lm_prompts as prompts  # noqa: E402
import mlx_lm_zoo as zoo  # noqa: E402
from mlx_lm import batch_generate  # noqa: E402
from mlx_lm.generate import BatchGenerator, StopSequences  # noqa: E402
from mlx_lm.models.cache import make_prompt_cache  # noqa: E402
from mlx_lm_http import serving  # noqa: E402
from paged_mlx import OutOfPages  # noqa: E402
from paged_mlx.mlx_lm import enable  # noqa: E402

PROMPTS = [zoo.prompt(20 + seed, seed=seed) for seed in range(20)]


def run(generator, uids) -> list[list[int]]:
    """All tokens of each prompt."""
    answers = {uid: [] for uid in uids}
    for _ in range(1000):
        for response in generator.next()[1]:
            answers[response.uid].append(response.token)
            if response.finish_reason is not None:
                answers[response.uid] = tuple(answers[response.uid])
        if all(isinstance(answer, tuple) for answer in answers.values()):
            break
    return [list(answers[uid]) for uid in uids]


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_next"])
@pytest.mark.parametrize("prefix_cache", [False, True])
def test_twenty_prompts_over_a_pool_for_eleven_are_all_answered(family, prefix_cache):
    model, tokenizer = zoo.tiny(family), prompts.tokenizer()
    expected = batch_generate(model, tokenizer, PROMPTS, max_tokens=12).texts
    with enable(model, page_size=8, num_pages=11 * 5, prefix_cache=prefix_cache) as paged:
        assert batch_generate(model, tokenizer, PROMPTS, max_tokens=12).texts == expected
        assert max(group.peak_pages for group in paged.groups.values()) > 40
        paged.check()


@pytest.mark.parametrize("chunk", [8, 64])
def test_the_youngest_is_put_back_and_goes_on_where_it_was(chunk):
    model = zoo.tiny("llama")
    asked = PROMPTS[:4]
    expected = zoo.batched(model, asked, [40] * 4)
    with enable(model, page_size=8, num_pages=18) as paged:
        generator = BatchGenerator(model, max_tokens=40, prefill_step_size=chunk)
        uids = generator.insert(asked)
        most = 0
        answers = {uid: [] for uid in uids}
        ended = set()
        while len(ended) < 4:
            for response in generator.next()[1]:
                answers[response.uid].append(response.token)
                ended |= {response.uid} if response.finish_reason else set()
            most = max(most, len(generator._unprocessed_sequences))
        assert [answers[uid] for uid in uids] == expected
        assert most > 0  # 4 x 60 tokens do not fit in 144
        paged.check()


def test_stop_sequences_go_on_where_they_were_matched():
    model = zoo.tiny("llama")
    (free,) = zoo.batched(model, PROMPTS[1:2], [60])

    def answers():
        generator = BatchGenerator(model, max_tokens=60)
        stops = [StopSequences(), StopSequences([free[20:29]])]
        return run(generator, generator.insert(PROMPTS[:2], stop_sequences=stops))

    expected = answers()
    with enable(model, page_size=8, num_pages=12):
        assert answers() == expected


def test_a_prompt_that_never_fits_is_refused_with_the_number_that_would():
    model = zoo.tiny("llama")
    (expected,) = zoo.batched(model, PROMPTS[:1], [6])
    with enable(model, page_size=8, num_pages=20):
        generator = BatchGenerator(model, max_tokens=6)
        with pytest.raises(
            ValueError,
            match=r"\[insert\] num_pages must be at least 38 for a prompt of 300 tokens; got 20",
        ):
            generator.insert([PROMPTS[0], zoo.prompt(300, seed=1)])
        assert run(generator, generator.insert(PROMPTS[:1])) == [expected]


def test_an_answer_that_fills_the_pool_alone_ends_there(caplog):
    model = zoo.tiny("llama")
    (expected,) = zoo.batched(model, PROMPTS[:1], [60])
    with enable(model, page_size=8, num_pages=6) as paged:
        generator = BatchGenerator(model, max_tokens=60)
        (answer,) = run(generator, generator.insert(PROMPTS[:1]))
        # 20 tokens of the prompt and 28 of the answer are in pages; one more was sampled.
        assert answer == expected[:29]
        assert "has filled the pool" in caplog.text
        paged.check()


def test_a_last_token_that_finds_no_page_waits():
    model = zoo.tiny("llama")
    asked = [zoo.prompt(17, seed=1), zoo.prompt(9, seed=2)]
    expected = zoo.batched(model, asked, [4, 4])
    with enable(model, page_size=8, num_pages=3) as paged:
        generator = BatchGenerator(model, max_tokens=4, prefill_step_size=64)
        assert run(generator, generator.insert(asked)) == expected
        paged.check()


def test_pages_that_nobody_gives_back_are_an_error_that_says_so():
    model = zoo.tiny("llama")
    with enable(model, page_size=8, num_pages=6):
        cache = make_prompt_cache(model)
        zoo.single(model, PROMPTS[9], 1, cache=cache)
        generator = BatchGenerator(model, max_tokens=4)
        generator.insert(PROMPTS[:1])
        with pytest.raises(OutOfPages, match="let go of prompt caches"):
            generator.next()
        del cache
        assert len(generator.next_generated()) == 1


def test_a_held_error_keeps_no_pages():
    model = zoo.tiny("llama")
    expected = zoo.single(model, PROMPTS[0], 10)
    with enable(model, page_size=8, num_pages=8) as paged:
        with pytest.raises(OutOfPages, match=r"give enable num_pages of \d+ or none") as held:
            zoo.single(model, PROMPTS[0], 100)
        assert zoo.single(model, PROMPTS[0], 10) == expected
        assert held.value is not None
        paged.check()


def test_max_bytes_holds_whatever_is_asked():
    model, tokenizer = zoo.tiny("gemma3_text"), prompts.tokenizer()
    expected = batch_generate(model, tokenizer, PROMPTS, max_tokens=12).texts
    most = 60 * 8 * 2 * 2 * 8 * 4 * 3
    with enable(model, page_size=8, max_bytes=most, prefix_cache=True) as paged:
        for _ in range(2):
            assert batch_generate(model, tokenizer, PROMPTS, max_tokens=12).texts == expected
            assert most / 2 < paged.nbytes <= most
        paged.check()
    with pytest.raises(ValueError, match=r"\[enable\] max_bytes must be at least \d+, two pages"):
        enable(model, max_bytes=100)


# Behind the server


def chat(client, text):
    return client.chat([{"role": "user", "content": text}])


@pytest.mark.parametrize("prefix_cache", [False, True])
def test_the_server_refuses_what_never_fits_and_serves_what_comes_after(prefix_cache):
    model, tokenizer = zoo.tiny("llama"), prompts.tokenizer()
    with serving(model, tokenizer) as client:
        expected = chat(client, "hi")
    with enable(model, page_size=8, num_pages=20, prefix_cache=prefix_cache):
        with serving(model, tokenizer, prompt_cache_size=1) as client:
            assert chat(client, "hi") == expected
            with pytest.raises(RuntimeError, match="num_pages must be at least"):
                chat(client, "word " * 60)
            assert chat(client, "hi") == expected


@pytest.mark.parametrize("prefix_cache", [False, True])
def test_chats_that_do_not_fit_together_are_all_answered(prefix_cache):
    model, tokenizer = zoo.tiny("llama"), prompts.tokenizer()
    asked = [[{"role": "user", "content": f"{i} word " * 7}] for i in range(6)]
    with serving(model, tokenizer, prompt_cache_size=1) as client:
        expected = client.chats(asked)
    with enable(model, page_size=8, num_pages=20, prefix_cache=prefix_cache) as paged:
        with serving(model, tokenizer, prompt_cache_size=10) as client:
            assert client.chats(asked) == expected
            assert client.chats(asked) == expected
        paged.check()


@pytest.mark.parametrize("prefix_cache", [False, True])
def test_stored_prompts_give_their_pages_back_before_anybody_waits(prefix_cache):
    model, tokenizer = zoo.tiny("llama"), prompts.tokenizer()
    asked = [f"{i} is?" for i in range(14)]
    with serving(model, tokenizer) as client:
        expected = [chat(client, text) for text in asked]
    with enable(model, page_size=8, num_pages=24, prefix_cache=prefix_cache):
        with serving(model, tokenizer) as client:
            assert [chat(client, text) for text in asked] == expected
