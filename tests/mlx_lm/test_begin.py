"""begin, remember and the drop-in prompt store: prefixes reused with nothing replaced."""

import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: pip install mlx-lm")

import json  # noqa: E402

import mlx_lm_prompts as prompts  # noqa: E402
import mlx_lm_zoo as zoo  # noqa: E402
from mlx_lm.models.cache import make_prompt_cache  # noqa: E402
from paged_mlx.mlx_lm import PromptStore, enable  # noqa: E402

SYSTEM = zoo.prompt(37, seed=1)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_next"])
def test_a_prompt_begins_with_what_was_remembered(family):
    model = zoo.tiny(family)
    expected = [zoo.single(model, SYSTEM + tail, 6) for tail in ([], [3, 4, 5])]
    generate = zoo.GENERATE.generate_step
    with enable(model, page_size=8) as paged:
        cache, rest = paged.begin(SYSTEM)
        assert rest == SYSTEM
        answer = zoo.single(model, rest, 6, cache=cache)
        assert answer == expected[0]
        paged.remember(SYSTEM + answer, cache)
        assert paged.known(SYSTEM + answer + [9]) == 43 and paged.known(SYSTEM[:20]) == (
            0 if family == "qwen3_next" else 19
        )
        if family != "qwen3_next":
            cache, rest = paged.begin(SYSTEM + [3, 4, 5])
            assert rest == [3, 4, 5]
            assert zoo.single(model, rest, 6, cache=cache) == expected[1]
        assert zoo.GENERATE.generate_step is generate
        paged.check()


def test_what_was_remembered_under_one_key_is_not_found_under_another():
    model = zoo.tiny("llama")
    with enable(model, page_size=8) as paged:
        for key in ("tenant 1", 7, None):
            cache, rest = paged.begin(SYSTEM, key=key)
            assert rest == SYSTEM
            zoo.single(model, rest, 1, cache=cache)
            paged.remember(SYSTEM, cache)  # which holds one token more: the full pages are known
            assert paged.known(SYSTEM, key=key) == 32
        assert paged.known(SYSTEM, key="tenant 2") == 0
        with pytest.raises(ValueError, match=r"\[begin\] key must be"):
            paged.begin(SYSTEM, key=1.5)


def test_tokens_that_a_cache_does_not_hold_are_refused():
    model = zoo.tiny("llama")
    with enable(model, page_size=8, prefix_cache=True) as paged:
        cache = make_prompt_cache(model)
        zoo.single(model, SYSTEM, 1, cache=cache)
        with pytest.raises(ValueError, match=r"\[remember\] tokens must be those that"):
            paged.remember([5] * 60, cache)
        assert paged.known([5] * 60) == 0


def test_the_store_finds_the_longest_beginning_and_the_server_counts_it(monkeypatch):
    import http.client

    import mlx_lm_http

    model, tokenizer = zoo.tiny("llama"), prompts.tokenizer()
    system = {"role": "system", "content": "You are short and to the point."}
    chats = [[system, {"role": "user", "content": text}] for text in ("hi", "who?", "why?")]
    with mlx_lm_http.serving(model, tokenizer) as client:
        expected = [client.chat(chat) for chat in chats]
    with enable(model, page_size=8) as paged:
        stores = []

        def store(size):
            stores.append(PromptStore(paged, max_size=1))
            return stores[0]

        monkeypatch.setattr(mlx_lm_http, "LRUPromptCache", store)
        with mlx_lm_http.serving(model, tokenizer) as client:
            assert [client.chat(chat) for chat in chats] == expected
            connection = http.client.HTTPConnection("127.0.0.1", client._port, timeout=60)
            connection.request("POST", "/v1/chat/completions", json.dumps({"messages": chats[0]}))
            usage = json.loads(connection.getresponse().read())["usage"]
            connection.close()
        # One cache is filed; the pages know the first chat all the same.
        assert len(stores[0]) <= 1
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        assert cached == usage["prompt_tokens"] - 1
        paged.check()
