"""The prompt store of mlx-lm's server, with paged prompt caches in it."""

import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: pip install mlx-lm")

import mlx.core as mx  # noqa: E402
import mlx_lm_zoo as zoo  # noqa: E402
from mlx_lm.models import cache as stock  # noqa: E402
from paged_mlx.mlx_lm import enable  # noqa: E402

if not hasattr(stock, "LRUPromptCache"):
    pytest.skip("this mlx-lm keeps its prompt store elsewhere", allow_module_level=True)

SYSTEM = zoo.prompt(50, seed=1)


def serve(model, store, tokens) -> tuple[list[int], int]:
    """Answer one request as the server does; return the answer and the tokens it computed."""
    prompt_cache, rest = store.fetch_nearest_cache("key", tokens)
    if prompt_cache is None:
        prompt_cache = stock.make_prompt_cache(model)
    answer = zoo.single(model, rest, max_tokens=6, cache=prompt_cache)
    held = prompt_cache[0].offset
    store.insert_cache("key", (tokens + answer)[:held], prompt_cache)
    return answer, len(rest)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss"])
def test_chats_with_one_system_prompt_reuse_it_even_with_windows(family):
    model = zoo.tiny(family)
    requests = [SYSTEM + zoo.prompt(8, seed=seed) for seed in range(10, 14)]
    expected = [zoo.single(model, request, max_tokens=6) for request in requests]
    with enable(model, page_size=8, retain=None) as paged:
        store = stock.LRUPromptCache()
        served = [serve(model, store, request) for request in requests]
        assert [answer for answer, _ in served] == expected
        assert served[0][1] == 58
        assert max(computed for _, computed in served[1:]) <= 8
        # The six full pages of the system prompt are there once.
        for group in paged.groups.values():
            assert len({tuple(page_ids[:6]) for page_ids in group.page_map()}) == 1
        paged.check()


def test_a_conversation_goes_on_where_it_ended():
    model = zoo.tiny("llama")
    with enable(model, page_size=8):
        store = stock.LRUPromptCache()
        answer, _ = serve(model, store, SYSTEM)
        following = SYSTEM + answer + [3, 4]
        expected = zoo.single(model, following, max_tokens=6)
        assert serve(model, store, following) == (expected, 2)


def test_a_window_without_retained_pages_computes_again_and_is_right():
    model = zoo.tiny("gemma3_text")
    requests = [SYSTEM + zoo.prompt(8, seed=seed) for seed in range(10, 13)]
    expected = [zoo.single(model, request, max_tokens=6) for request in requests]
    with enable(model, page_size=8, retain=0) as paged:
        store = stock.LRUPromptCache()
        served = [serve(model, store, request) for request in requests]
        assert [answer for answer, _ in served] == expected
        assert {computed for _, computed in served} == {58}
        paged.check()


def test_evicted_prompts_give_their_pages_back():
    model = zoo.tiny("llama")
    with enable(model, page_size=8) as paged:
        store = stock.LRUPromptCache(max_size=2)
        for seed in range(5):
            serve(model, store, zoo.prompt(30, seed=seed))
        assert len(store) == 2
        assert paged.groups[None].pages_used == 2 * 5
        assert store.nbytes == paged.nbytes_used
        del store
        assert paged.groups[None].pages_used == 0


def test_a_stored_prompt_is_not_changed_by_those_that_continue_it():
    model = zoo.tiny("llama")
    with enable(model, page_size=8):
        store = stock.LRUPromptCache()
        cache = stock.make_prompt_cache(model)
        model(mx.array([SYSTEM]), cache=cache)
        store.insert_cache("key", SYSTEM, cache)
        first = serve(model, store, SYSTEM + [1, 2])[0]
        assert cache[0].offset == 50
        assert zoo.single(model, [1, 2], max_tokens=6, cache=cache) == first
