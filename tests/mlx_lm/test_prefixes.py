"""prefix_cache=True: prompts that begin alike share pages, and tokens stay stock's."""

import contextlib

import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: pip install mlx-lm")

import mlx.core as mx  # noqa: E402
import mlx_lm  # noqa: E402
import mlx_lm_prompts  # noqa: E402
import mlx_lm_zoo as zoo  # noqa: E402
from mlx_lm import stream_generate  # noqa: E402
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache  # noqa: E402
from paged_mlx.mlx_lm import enable  # noqa: E402

SYSTEM = zoo.prompt(37, seed=1)


@pytest.fixture
def computed(monkeypatch):
    """Counts the tokens that models compute, padding too."""
    return mlx_lm_prompts.count_tokens(monkeypatch, "llama", "gemma3_text", "gpt_oss")


def ask(model, tokens, max_tokens=8, **options):
    steps = zoo.GENERATE.generate_step(
        mx.array(tokens), model, max_tokens=max_tokens, prefill_step_size=16, **options
    )
    return [int(token) for token, _ in steps]


def speculate(model, draft, tokens, max_tokens=8, **options):
    steps = zoo.GENERATE.speculative_generate_step(
        mx.array(tokens), model, draft, max_tokens=max_tokens, prefill_step_size=16, **options
    )
    return [int(token) for token, _, _ in steps]


# One prompt after the other


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss"])
def test_a_second_prompt_computes_only_what_differs(family, computed):
    model = zoo.tiny(family)
    prompts = [SYSTEM + tail for tail in ([3, 4, 5], [6, 7], SYSTEM[:20])]
    expected = [ask(model, prompt) for prompt in prompts]
    with enable(model, page_size=8, prefix_cache=True) as paged:
        computed.clear()
        assert ask(model, prompts[0]) == expected[0]
        assert sum(computed) == 40 + 8
        # The 32 tokens of four full pages and the 5 of the page where they part are known.
        computed.clear()
        assert ask(model, prompts[1]) == expected[1]
        assert sum(computed) == 2 + 8
        assert ask(model, prompts[2]) == expected[2]
        assert paged.prefixes.tokens_reused == 37 + 37
        # So are the answers: the cache ended in the middle of a page.
        told = prompts[0] + expected[0]
        computed.clear()
        assert ask(model, told + [9, 9], max_tokens=1) is not None
        assert sum(computed) == 2 + 1
        paged.check()
        assert paged.gathered_calls == {}


def test_the_same_prompt_again_computes_its_last_token(computed):
    model = zoo.tiny("llama")
    expected = ask(model, SYSTEM)
    with enable(model, page_size=8, prefix_cache=True):
        assert ask(model, SYSTEM) == expected
        computed.clear()
        assert ask(model, SYSTEM) == expected
        assert sum(computed) == 1 + 8


@pytest.mark.parametrize("retain", [0, 32, None])
def test_windows_give_pages_back_and_prefixes_are_found_all_the_same(retain, computed):
    model = zoo.tiny("gemma3_text")
    system = zoo.prompt(150, seed=1)
    prompts = [system + zoo.prompt(60, seed=seed) for seed in (2, 3)]
    expected = [ask(model, prompt) for prompt in prompts]
    with enable(model, page_size=8, prefix_cache=True, retain=retain) as paged:
        window = paged.groups[zoo.WINDOW]
        cache = make_prompt_cache(model)
        assert ask(model, prompts[0], prompt_cache=cache) == expected[0]
        held = window.allocator.num_used - paged.prefixes.caches[zoo.WINDOW].num_evictable
        # The window's 24 keys, a chunk of prompt or the rewind, and no more unless asked for.
        assert held <= (24 + (retain or 0) + 16) // 8 + 2 if retain is not None else held == 28
        computed.clear()
        assert ask(model, prompts[1]) == expected[1]
        assert sum(computed) == 60 + 8
        paged.check()


def test_a_window_model_lives_in_a_small_pool_however_long_it_runs():
    model = zoo.tiny("llama")
    model.make_cache = lambda: [RotatingKVCache(zoo.WINDOW) for _ in model.layers]
    prompt = zoo.prompt(300, seed=1)
    expected = ask(model, prompt, max_tokens=100)
    with enable(model, page_size=8, prefix_cache=True, num_pages=16) as paged:
        assert list(paged.groups) == [zoo.WINDOW]
        assert ask(model, prompt, max_tokens=100) == expected
        assert paged.prefixes.caches[zoo.WINDOW].stats.evicted > 0
        paged.check()


def test_a_full_pool_gives_up_cached_pages_for_new_prompts():
    model = zoo.tiny("llama")
    prompts = [zoo.prompt(60, seed=seed) for seed in range(6)]
    expected = [ask(model, prompt) for prompt in prompts]
    with enable(model, page_size=8, num_pages=20, prefix_cache=True) as paged:
        assert [ask(model, prompt) for prompt in prompts] == expected
        assert [ask(model, prompt) for prompt in prompts] == expected
        assert paged.prefixes.caches[None].stats.evicted > 0
        paged.check()


def test_stream_generate_and_generate_find_prefixes_under_any_name(computed):
    model, tokenizer = zoo.tiny("llama"), mlx_lm_prompts.tokenizer()
    with enable(model, page_size=8, prefix_cache=True) as paged:
        first = [r.token for r in stream_generate(model, tokenizer, SYSTEM, max_tokens=3)]
        computed.clear()
        assert [r.token for r in stream_generate(model, tokenizer, SYSTEM, max_tokens=3)] == first
        assert mlx_lm.generate(model, tokenizer, SYSTEM + [5], max_tokens=1) is not None
        assert paged.prefixes.tokens_reused == 36 + 37
        assert sum(computed) == (1 + 3) + (1 + 1)


def test_progress_counts_what_is_known_as_done():
    model = zoo.tiny("llama")

    def progress(prompt):
        calls = []
        ask(model, prompt, prompt_progress_callback=lambda *call: calls.append(call))
        return calls

    prompt = zoo.prompt(40, seed=3)
    expected = progress(prompt)
    assert expected == [(0, 40), (16, 40), (32, 40), (39, 40), (40, 40)]
    with enable(model, page_size=8, prefix_cache=True):
        assert progress(prompt) == expected
        assert progress(prompt[:36] + [1, 2, 3, 4]) == [(36, 40), (39, 40), (40, 40)]


def test_logits_processors_see_what_they_see_without_pages():
    model = zoo.tiny("llama")

    def seen():
        tokens_seen = []

        def processor(tokens, logits):
            tokens_seen.append(tokens.tolist())
            return logits - 5 * (mx.arange(zoo.VOCABULARY) == tokens[-1])

        answer = ask(model, SYSTEM, logits_processors=[processor])
        return tokens_seen, answer

    expected = seen()
    with enable(model, page_size=8, prefix_cache=True) as paged:
        assert seen() == expected
        assert seen() == expected
        assert paged.prefixes.tokens_reused == 36


def test_a_generation_that_is_given_up_is_remembered_as_far_as_it_came(computed):
    model = zoo.tiny("llama")
    expected = ask(model, SYSTEM, max_tokens=20)
    with enable(model, page_size=8, prefix_cache=True):
        steps = zoo.GENERATE.generate_step(mx.array(SYSTEM), model, max_tokens=20)
        told = [int(next(steps)[0]) for _ in range(5)]
        steps.close()
        computed.clear()
        assert told + ask(model, SYSTEM + told, max_tokens=15) == expected
        assert sum(computed) == 1 + 15


# Caches of the caller's own


def test_an_empty_cache_that_is_given_begins_with_what_is_known(computed):
    model = zoo.tiny("llama")
    expected = ask(model, SYSTEM + [1], max_tokens=3), ask(model, SYSTEM + [2, 3], max_tokens=3)
    with enable(model, page_size=8, prefix_cache=True):
        ask(model, SYSTEM)
        computed.clear()
        cache = make_prompt_cache(model)
        assert ask(model, SYSTEM + [1], max_tokens=3, prompt_cache=cache) == expected[0]
        assert sum(computed) == 1 + 3
        assert [layer.offset for layer in cache] == [41] * 3


def test_a_cache_that_goes_on_is_remembered_with_what_it_held(computed):
    model = zoo.tiny("llama")
    with enable(model, page_size=8, prefix_cache=True) as paged:
        cache = make_prompt_cache(model)
        answer = ask(model, SYSTEM, prompt_cache=cache)
        again = ask(model, [7, 8, 9], prompt_cache=cache)
        computed.clear()
        ask(model, SYSTEM + answer + [7, 8, 9] + again + [1], max_tokens=1)
        # The cache may go on: its last page, part-filled, is left to it.
        assert sum(computed) <= 7 + 1 + 1
        paged.check()


def test_a_cache_filled_by_hand_is_known_by_what_was_read_into_it():
    model = zoo.tiny("llama")
    hidden, prompt = zoo.prompt(32, seed=7), zoo.prompt(40, seed=8)
    expected = ask(model, prompt + [5]), ask(model, hidden + [5])
    with enable(model, page_size=8, prefix_cache=True) as paged:
        for tell in (None, [hidden[:]], [prompt[:32]]):  # mlx-lm appends to them
            cache = make_prompt_cache(model)
            model(mx.array([hidden]), cache=cache)
            # Even if the caller says that the cache holds other tokens than it does.
            zoo.batched(model, [prompt], [3], caches=[cache], all_tokens=tell)
            model(mx.array([hidden]), cache=cache)
            ask(model, prompt, prompt_cache=cache)
        assert ask(model, prompt + [5]) == expected[0]
        assert ask(model, hidden + [5]) == expected[1]
        paged.check()


def test_embeddings_beside_tokens_make_a_cache_unknown(computed):
    model = zoo.tiny("llama")
    with enable(model, page_size=8, prefix_cache=True) as paged:
        cache = make_prompt_cache(model)
        model(mx.array([SYSTEM]), cache=cache, input_embeddings=mx.zeros((1, 37, 32)))
        ask(model, [1, 2, 3], prompt_cache=cache)
        assert paged.prefixes.caches[None].num_pages == 0
        assert paged.prefixes.declined["the call has other inputs than tokens"] == 1


def test_tokens_that_were_taken_back_and_replaced_by_hand_are_not_remembered():
    model = zoo.tiny("llama")
    expected = ask(model, SYSTEM + [1, 2, 3])
    with enable(model, page_size=8, prefix_cache=True):
        cache = make_prompt_cache(model)
        ask(model, SYSTEM + [4], max_tokens=2, prompt_cache=cache)
        for layer in cache:
            layer.trim(20)
        model(mx.array([zoo.prompt(20, seed=9)]), cache=cache)
        ask(model, [1, 2, 3], prompt_cache=cache)
        assert ask(model, SYSTEM + [1, 2, 3]) == expected


@pytest.mark.parametrize(
    "options", [{"max_kv_size": 64}, {"kv_bits": 8, "quantized_kv_start": 0, "kv_group_size": 32}]
)
def test_what_does_not_stay_in_pages_is_left_alone(options):
    model = zoo.tiny("llama", head_dim=32)
    expected = ask(model, SYSTEM, **options)
    with enable(model, page_size=8, prefix_cache=True) as paged:
        assert [ask(model, SYSTEM, **options) for _ in range(2)] == [expected] * 2
        assert paged.prefixes.tokens_asked == 0


# Drafts


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("enabled", ["both", "model"])
def test_speculation_begins_with_what_each_model_knows(family, enabled, computed):
    model, draft = zoo.tiny(family), zoo.tiny("llama", seed=7)
    system = zoo.prompt(90, seed=1)
    prompts = [system + tail for tail in ([3, 4, 5], [6, 7])]
    expected = [ask(model, prompt, max_tokens=24) for prompt in prompts]
    with contextlib.ExitStack() as stack:
        paged = stack.enter_context(enable(model, page_size=8, prefix_cache=True))
        if enabled == "both":
            stack.enter_context(enable(draft, page_size=16, prefix_cache=True))
        assert speculate(model, draft, prompts[0], max_tokens=24) == expected[0]
        computed.clear()
        assert speculate(model, draft, prompts[1], max_tokens=24) == expected[1]
        assert paged.prefixes.tokens_reused == 90
        # What is left of the prompts but their last tokens: one, and all of a plain draft's.
        assert sum(computed[: computed.index(1, 1)]) == {"both": 1, "model": 90}[enabled]
        paged.check()


def test_an_answer_of_speculation_is_known_afterwards(computed):
    model, draft = zoo.tiny("llama"), zoo.tiny("llama", seed=7)
    expected = ask(model, SYSTEM, max_tokens=21)
    with enable(model, page_size=8, prefix_cache=True) as paged, enable(draft):
        for stop in (3, 10, 20):
            steps = zoo.GENERATE.speculative_generate_step(
                mx.array(SYSTEM), model, draft, max_tokens=40
            )
            told = [int(next(steps)[0]) for _ in range(stop)]
            steps.close()
            computed.clear()
            assert told + ask(model, SYSTEM + told, max_tokens=21 - stop) == expected
            assert sum(computed) <= 2 + 21 - stop
        paged.check()


def test_a_window_that_keeps_too_little_for_speculation_is_refused():
    model, draft = zoo.tiny("gemma3_text"), zoo.tiny("llama", seed=7)
    with enable(model, retain=2, prefix_cache=True), enable(draft, retain=0):
        assert len(speculate(model, draft, SYSTEM, num_draft_tokens=2)) == 8
        with pytest.raises(
            ValueError,
            match=r"\[speculative_generate_step\] num_draft_tokens must be at most 2, enable's "
            r"retain for the model; got 3",
        ):
            speculate(model, draft, SYSTEM, num_draft_tokens=3)


# Weights


def test_other_weights_forget_what_was_computed_with_the_old_ones():
    model, other = zoo.tiny("llama"), zoo.tiny("llama", seed=5)
    expected = ask(other, SYSTEM)
    with enable(model, page_size=8, prefix_cache=True) as paged:
        steps = zoo.GENERATE.generate_step(mx.array(SYSTEM[:20]), model, max_tokens=9)
        next(steps)
        ask(model, SYSTEM)
        model.update(other.parameters())
        assert ask(model, SYSTEM) == expected
        # One that began with the old weights is not remembered when it ends.
        steps.close()
        reused = paged.prefixes.tokens_reused
        assert ask(model, SYSTEM) == expected
        assert paged.prefixes.tokens_reused == reused + 36


def test_the_old_weights_are_not_held():
    model = zoo.tiny("llama")
    with enable(model, prefix_cache=True):
        ask(model, SYSTEM)
        before = mx.get_active_memory()
        model.update(zoo.tiny("llama", seed=5).parameters())
        mx.eval(model.parameters())
        assert mx.get_active_memory() <= before + 1000


# Coming and going


def test_a_model_without_prefix_cache_passes_through():
    model = zoo.tiny("llama")
    with enable(zoo.tiny("llama"), prefix_cache=True) as other, enable(model) as paged:
        ask(model, SYSTEM)
        zoo.batched(model, [SYSTEM], [3])
        assert paged.prefixes is None
        assert other.prefixes.tokens_asked == 0


def test_other_weights_in_place_and_plain_attributes_are_noticed():
    model = zoo.tiny("llama")
    changed = zoo.tiny("llama")
    changed.layers[1].self_attn.rope.base = 100.0
    changed.model.embed_tokens.weight[5] = 3.0
    expected = ask(changed, SYSTEM)
    with enable(model, page_size=8, prefix_cache=True) as paged:
        ask(model, SYSTEM)
        model.model.embed_tokens.weight[5] = 3.0
        ask(model, SYSTEM)
        assert paged.prefixes.tokens_reused == 0
        model.layers[1].self_attn.rope.base = 100.0
        assert ask(model, SYSTEM) == expected
        assert paged.prefixes.tokens_reused == 0
        assert ask(model, SYSTEM) == expected
        assert paged.prefixes.tokens_reused == 36


def test_the_scale_of_an_adapter_is_noticed():
    from mlx_lm.tuner.lora import LoRALinear
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model = zoo.tiny("llama")
    keys = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
    linear_to_lora_layers(model, 3, {"rank": 4, "scale": 20.0, "dropout": 0.0, "keys": keys})
    adapters = [module for _, module in model.named_modules() if isinstance(module, LoRALinear)]
    for adapter in adapters:
        adapter.lora_b = mx.random.normal(adapter.lora_b.shape, key=mx.random.key(5))

    def answers():
        found = []
        for scale in (20.0, 0.0, 20.0):
            for adapter in adapters:
                adapter.scale = scale
            found.append((ask(model, SYSTEM), zoo.batched(model, [SYSTEM], [8])))
        return found

    expected = answers()
    assert expected[0] != expected[1]
    with enable(model, page_size=8, prefix_cache=True):
        assert answers() == expected


@pytest.mark.parametrize("kind", [KVCache, lambda: RotatingKVCache(16, keep=4)])
def test_a_model_that_remembers_more_than_pages_and_states_is_refused(kind):
    model = zoo.tiny("llama")
    model.make_cache = lambda: [KVCache(), kind(), KVCache()]
    if kind is KVCache:
        enable(model, prefix_cache=True).disable()
    else:
        with pytest.raises(ValueError, match="prefix_cache must be False.*keeps the first tokens"):
            enable(model, prefix_cache=True)


@pytest.mark.parametrize("notice", ["another prompt", "reset"])
def test_what_was_begun_before_everything_was_forgotten_is_not_remembered(notice):
    model, other = zoo.tiny("llama"), zoo.tiny("llama", seed=1)
    expected = ask(other, SYSTEM)
    with enable(model, page_size=8, prefix_cache=True) as paged:
        begun = zoo.GENERATE.generate_step(mx.array(SYSTEM), model, max_tokens=50)
        next(begun)
        model.update(other.parameters())
        if notice == "reset":
            paged.prefixes.reset()
        else:
            ask(model, [5, 6, 7])
        begun.close()
        assert ask(model, SYSTEM) == expected
        paged.check()


def test_functions_imported_before_enable_find_known_prefixes():
    from mlx_lm import generate, stream_generate

    model, tokenizer, prompt = zoo.tiny("llama"), mlx_lm_prompts.tokenizer(), zoo.prompt(60, seed=3)
    expected = generate(model, tokenizer, prompt, max_tokens=4)
    with enable(model, page_size=8, prefix_cache=True) as paged:
        assert generate(model, tokenizer, prompt, max_tokens=4) == expected
        assert generate(model, tokenizer, prompt, max_tokens=4) == expected
        assert paged.prefixes.tokens_reused == 59
        texts = [r.text for r in stream_generate(model, tokenizer, prompt, max_tokens=4)]
        assert "".join(texts) == expected and paged.prefixes.tokens_reused == 2 * 59


def test_a_function_imported_before_enable_finds_nothing_and_that_is_said_once(caplog):
    model, prompt, before = zoo.tiny("llama"), zoo.prompt(40, seed=1), zoo.GENERATE.generate_step
    with enable(model, page_size=8, prefix_cache=True) as paged:
        for _ in range(3):
            list(before(mx.array(prompt), model, max_tokens=2))
        assert caplog.text.count("a prompt was read from its first token, though") == 1
        caplog.clear()
        list(zoo.GENERATE.generate_step(mx.array(prompt), model, max_tokens=2))
        assert paged.prefixes.tokens_reused > 0 and not caplog.text
