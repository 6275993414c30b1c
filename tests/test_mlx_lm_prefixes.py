"""prefix_cache=True: prompts that begin alike share pages, and tokens stay stock's."""

import sys

import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: pip install mlx-lm")

import mlx_lm.generate  # noqa: E402, F401
import mlx_lm_zoo as zoo  # noqa: E402
from mlx_lm.models.cache import ArraysCache, KVCache  # noqa: E402

from paged_mlx.mlx_lm import enable  # noqa: E402

GENERATE = sys.modules["mlx_lm.generate"]
SYSTEM = zoo.prompt(37, seed=1)


def ask(model, tokens, max_tokens=8):
    # By the module's name: one imported before enable() is mlx-lm's own.
    steps = GENERATE.generate_step(
        zoo.mx.array(tokens), model, max_tokens=max_tokens, prefill_step_size=16
    )
    return [int(token) for token, _ in steps]


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss"])
def test_a_second_prompt_computes_only_what_differs(family):
    model = zoo.tiny(family)
    prompts = [SYSTEM + tail for tail in ([3, 4, 5], [6, 7], SYSTEM[:20])]
    expected = [ask(model, prompt) for prompt in prompts]
    with enable(model, page_size=8, prefix_cache=True) as paged:
        assert ask(model, prompts[0]) == expected[0]
        assert paged.prefixes.tokens_reused == 0
        # The 32 tokens of the four full pages and the 5 of the page where they part.
        assert ask(model, prompts[1]) == expected[1]
        assert paged.prefixes.tokens_reused == 37
        assert ask(model, prompts[2]) == expected[2]
        # The answer's tokens are known too.
        told = prompts[0] + expected[0]
        reused = paged.prefixes.tokens_reused
        ask(model, told + [9, 9])
        assert paged.prefixes.tokens_reused - reused >= len(told) // 8 * 8 - 8
        paged.check()


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_batch_reads_what_its_prompts_begin_with_once(family):
    model = zoo.tiny(family)
    prompts = [SYSTEM + zoo.prompt(n, seed=n) for n in (3, 9, 1, 14)] + [zoo.prompt(12, seed=5)]
    max_tokens = [6, 3, 9, 5, 4]
    expected = zoo.batched(model, prompts, max_tokens, late={3: 2})
    with enable(model, page_size=8, prefix_cache=True) as paged:
        assert zoo.batched(model, prompts, max_tokens, late={3: 2}) == expected
        # Four full pages: computed for the first three together, found by the late one.
        assert paged.prefixes.tokens_reused >= 4 * 32
        assert zoo.batched(model, prompts, max_tokens, late={3: 2}) == expected
        paged.check()
        held = {page for cache in paged.prefixes.caches.values() for page in cache.page_ids}
        for window, group in paged.groups.items():
            assert group.pages_used == paged.prefixes.caches[window].num_pages
        assert held
        paged.prefixes.reset()
        assert [group.pages_used for group in paged.groups.values()] == [0] * len(paged.groups)


def test_a_full_pool_gives_up_cached_pages_for_new_prompts():
    model = zoo.tiny("llama")
    prompts = [zoo.prompt(60, seed=seed) for seed in range(6)]
    expected = [ask(model, prompt) for prompt in prompts]
    with enable(model, page_size=8, num_pages=20, prefix_cache=True) as paged:
        assert [ask(model, prompt) for prompt in prompts] == expected
        assert [ask(model, prompt) for prompt in prompts] == expected
        assert paged.prefixes.caches[None].stats.evicted > 0
        paged.check()


def test_logits_processors_see_what_they_see_without_pages():
    model = zoo.tiny("llama")

    def seen():
        sizes = []

        def processor(tokens, logits):
            sizes.append(tokens.size)
            return logits

        steps = GENERATE.generate_step(
            zoo.mx.array(SYSTEM), model, max_tokens=2, logits_processors=[processor]
        )
        assert len([token for token, _ in steps]) == 2
        return sizes

    expected = seen()
    with enable(model, page_size=8, prefix_cache=True):
        ask(model, SYSTEM)
        assert seen() == expected


def test_disable_puts_mlx_lms_functions_back():
    owners = (
        GENERATE,
        GENERATE.BatchGenerator,
        GENERATE.PromptProcessingBatch,
        GENERATE.GenerationBatch,
    )
    before = [dict(vars(owner)) for owner in owners]
    with enable(zoo.tiny("llama"), prefix_cache=True), enable(zoo.tiny("llama"), prefix_cache=True):
        assert GENERATE.generate_step is not before[0]["generate_step"]
    assert [dict(vars(owner)) for owner in owners] == before


def test_a_model_without_prefix_cache_passes_through():
    model = zoo.tiny("llama")
    with enable(zoo.tiny("llama"), prefix_cache=True) as other, enable(model) as paged:
        ask(model, SYSTEM)
        zoo.batched(model, [SYSTEM], [3])
        assert paged.prefixes is None
        assert other.prefixes.tokens_asked == 0


def test_a_model_that_remembers_more_than_kv_is_refused():
    model = zoo.tiny("llama")
    model.make_cache = lambda: [KVCache(), ArraysCache(2), KVCache()]
    with pytest.raises(ValueError, match="prefix_cache must be False.*ArraysCache"):
        enable(model, prefix_cache=True)
