"""mlx_lm.server over HTTP, its generating thread on pages."""

import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: pip install mlx-lm")

import mlx_lm_prompts as prompts  # noqa: E402
import mlx_lm_zoo as zoo  # noqa: E402
from mlx_lm.models.cache import LRUPromptCache, make_prompt_cache  # noqa: E402
from mlx_lm_http import serving  # noqa: E402
from paged_mlx.mlx_lm import enable  # noqa: E402

SYSTEM = {"role": "system", "content": "You are a kind machine, and answer in very few words."}
QUESTIONS = ["Hello?", "How are you", "Why is the sky blue?", "Where?", "Who?", "What is it?"]
CHATS = [[SYSTEM, {"role": "user", "content": question}] for question in QUESTIONS]
END = zoo.VOCABULARY - 1


def tokens_of(tokenizer, messages) -> list[int]:
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True)


def answer_of(model, tokenizer, messages) -> str:
    """What mlx-lm answers to one chat, alone and from the start."""
    tokens = zoo.single(model, tokens_of(tokenizer, messages), 12)
    return tokenizer.decode(tokens[: tokens.index(END)] if END in tokens else tokens)


@pytest.fixture
def computed(monkeypatch):
    """Counts the tokens that models compute, padding too."""
    return prompts.count_tokens(monkeypatch, "llama", "gemma3_text", "qwen3_next", "lfm2")


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_next"])
def test_chats_with_one_system_prompt_compute_it_once(family, computed):
    model, tokenizer = zoo.tiny(family), prompts.tokenizer()
    expected = [answer_of(model, tokenizer, chat) for chat in CHATS]
    lengths = [len(tokens_of(tokenizer, chat)) for chat in CHATS]
    assert len(set(expected)) > 1
    with enable(model, page_size=8, prefix_cache=True) as paged:
        # One entry in mlx-lm's own prompt store: what more is known, the pages know.
        paged.prompts.padding_is_seen()  # a pass of its own, once
        with serving(model, tokenizer, prompt_cache_size=1) as client:
            computed.clear()
            assert client.chat(CHATS[0]) == expected[0]
            assert client.chat(CHATS[1], stream=True) == expected[1]
            first = sum(computed)
            # "s:<the system prompt>\nu:" is 59 tokens; the first chat computes all.
            assert first <= lengths[0] + lengths[1] - 59 + 2 * 13
            assert client.chats(CHATS[2:]) == expected[2:]
            # Padding: the longest of a batch for each.
            assert sum(computed) - first <= 4 * (max(lengths) - 59 + 13)
        assert paged.gathered_calls == {} and paged.paged_calls > 0
        paged.check()


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "lfm2"])
def test_a_conversation_of_several_turns_goes_on(family, computed):
    model, tokenizer = zoo.tiny(family), prompts.tokenizer()
    with enable(model, page_size=8, prefix_cache=True) as paged:
        with serving(model, tokenizer, prompt_cache_size=1) as client:
            chat, answers, chats = list(CHATS[0]), [], []
            for question in QUESTIONS[1:4]:
                chats.append(list(chat))
                answers.append(client.chat(chat))
                # Somebody else asks in between, and takes the place in mlx-lm's own store.
                client.chat([{"role": "user", "content": question}])
                chat += [
                    {"role": "assistant", "content": answers[-1]},
                    {"role": "user", "content": question},
                ]
            computed.clear()
            chats.append(list(chat))
            answers.append(client.chat(chat))
            # The last answer is not computed again, nor anything before it.
            assert sum(computed) <= len(f"\nu:{QUESTIONS[3]}\na:") + 12 + 13
        paged.check()
    assert answers == [answer_of(model, tokenizer, chat) for chat in chats]


def test_a_prompt_store_of_the_default_size_with_a_window(computed):
    # retain=32: an entry of the store may be asked to go back further than that.
    model, tokenizer = zoo.tiny("gemma3_text"), prompts.tokenizer()
    expected = [answer_of(model, tokenizer, chat) for chat in CHATS]
    with enable(model, page_size=8) as paged:
        with serving(model, tokenizer) as client:
            assert [client.chat(chat) for chat in CHATS] == expected
            assert client.chats(CHATS) == expected
        paged.check()


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_draft_behind_the_server(family):
    # mlx-lm's own caches answer some of these chats wrongly: the last token of an answer may
    # be in the store's key and not in the cache.
    model, tokenizer, draft = zoo.tiny(family), prompts.tokenizer(), zoo.tiny("llama", seed=7)
    following = [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Why?"}]
    chats = [*CHATS[:2], [*CHATS[0], *following]]
    expected = [answer_of(model, tokenizer, chat) for chat in chats]
    with enable(model, page_size=8, prefix_cache=True) as paged, enable(draft, page_size=8):
        with serving(model, tokenizer, draft) as client:
            assert [client.chat(chat, stream=True) for chat in chats] == expected
            assert client.chat(chats[0]) == expected[0]
        assert paged.prefixes.tokens_reused > 0 or family == "llama"
        paged.check()


def test_a_cache_put_aside_holds_the_tokens_that_it_is_filed_under():
    model, draft = zoo.tiny("llama"), zoo.tiny("llama", seed=7)
    prompt = zoo.prompt(20, seed=1)
    with enable(model, page_size=8, prefix_cache=True) as paged, enable(draft, page_size=16):
        store = LRUPromptCache()
        cache, drafts = make_prompt_cache(model), make_prompt_cache(draft)
        zoo.single(model, prompt, max_tokens=3, cache=cache)
        zoo.single(draft, prompt, max_tokens=2, cache=drafts)
        store.insert_cache("key", prompt + [1, 2, 3], [*cache, *drafts])
        assert [layer.offset for layer in cache + drafts] == [22] * 6
        _, rest = store.fetch_nearest_cache("key", prompt + [1, 2, 3, 4])
        assert rest == [3, 4]
        paged.check()


def test_the_server_serves_what_was_enabled_and_tried_in_another_thread():
    model, tokenizer = zoo.tiny("llama"), prompts.tokenizer()
    expected = [answer_of(model, tokenizer, chat) for chat in CHATS[:2]]
    with enable(model, page_size=8, prefix_cache=True) as paged:
        zoo.single(model, tokens_of(tokenizer, CHATS[0]), 5)
        with serving(model, tokenizer) as client:
            assert [client.chat(chat) for chat in CHATS[:2]] == expected
        assert answer_of(model, tokenizer, CHATS[0]) == expected[0]
        assert paged.prefixes.tokens_reused >= 59
        paged.check()
