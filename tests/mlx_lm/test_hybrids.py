"""prefix_cache=True on models with recurrent states: checkpoints beside the pages."""

import copy
import gc

import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: pip install mlx-lm")

import mlx.core as mx  # noqa: E402
import mlx_lm_prompts as prompts  # noqa: E402
import mlx_lm_zoo as zoo  # noqa: E402
from mlx_lm.models.cache import ArraysCache, make_prompt_cache  # noqa: E402
from paged_mlx.mlx_lm import enable  # noqa: E402
from paged_mlx.mlx_lm.checkpoints import padding_is_seen, states_of  # noqa: E402

SYSTEM = zoo.prompt(37, seed=1)
PADDED = sorted(prompts.PADDED)  # wrong states behind mlx-lm's padding
GOOD = [family for family in prompts.HYBRIDS if family not in PADDED]


@pytest.fixture
def computed(monkeypatch):
    """Counts the tokens that models compute, padding too."""
    return prompts.count_tokens(monkeypatch, *prompts.HYBRIDS)


def ask(model, tokens, max_tokens=6, chunk=512, cache=None):
    return zoo.single(model, tokens, max_tokens, chunk, cache)


@pytest.mark.parametrize("family", GOOD + PADDED)
def test_a_prompt_begins_at_the_last_position_that_has_pages_and_states(family, computed):
    model = zoo.tiny(family)
    asked = [SYSTEM + tail for tail in ([3, 4, 5], [6, 7], [8, 9, 10, 11])]
    expected = [ask(model, prompt) for prompt in asked]
    with enable(model, page_size=8, prefix_cache=True) as paged:

        def answered(i):
            computed.clear()
            assert ask(model, asked[i]) == expected[i]
            return sum(computed) - 6

        assert answered(0) == 40
        # Pages of 37 tokens are known and no states: they are kept there in passing.
        assert answered(1) == 39
        assert answered(2) == 4
        # Before the last token of a prompt, and where the last page of the answer ended.
        assert answered(0) == 1
        told = asked[2] + expected[2]
        computed.clear()
        following = ask(model, told + [1, 2, 3])
        assert sum(computed) <= 7 + 3 + 6
        paged.check()
    assert following == ask(model, told + [1, 2, 3])


def test_chunks_of_a_long_prompt_leave_states_where_they_end(computed):
    model = zoo.tiny("qwen3_next")
    document = zoo.prompt(200, seed=3)
    expected = ask(model, document[:150] + [1])
    with enable(model, page_size=8, prefix_cache=True):
        ask(model, document, chunk=64)
        computed.clear()
        assert ask(model, document[:150] + [1]) == expected
        assert sum(computed) == (151 - 128) + 6


@pytest.mark.parametrize("family", GOOD)
def test_batches_share_pages_and_states(family, computed):
    model = zoo.tiny(family)
    asked = [SYSTEM + zoo.prompt(n, seed=n) for n in (3, 9, 1, 14)] + [zoo.prompt(12, seed=5)]
    max_tokens = [6, 3, 9, 5, 4]
    expected = [ask(model, prompt, n) for prompt, n in zip(asked, max_tokens)]
    assert zoo.batched(model, asked, max_tokens, late={3: 2}) == expected
    with enable(model, page_size=8, prefix_cache=True) as paged:
        computed.clear()
        for _ in range(2):
            assert zoo.batched(model, asked, max_tokens, late={3: 2}) == expected
        # Together 32 tokens, twice not computed; the late one finds where the others part.
        assert paged.prefixes.tokens_reused >= 2 * 32 + 32 + sum(len(p) - 1 for p in asked)
        told = asked[1] + expected[1]
        computed.clear()
        ask(model, told + [5], 1)
        assert sum(computed) <= 7 + 1 + 1
        paged.check()


def test_a_batch_reads_on_to_where_a_prompt_parts_from_a_known_one(computed):
    model = zoo.tiny("lfm2")
    expected = [ask(model, SYSTEM + [n] * 4) for n in range(4)]
    with enable(model, page_size=8, prefix_cache=True) as paged:
        assert ask(model, SYSTEM + [0] * 4) == expected[0]
        # 37 tokens are computed again, 4 of padding at most, and the states after them kept.
        assert zoo.batched(model, [SYSTEM + [1] * 4], [6], chunk=64) == expected[1:2]
        asked = [SYSTEM + [2] * 4, SYSTEM + [3] * 4]
        assert zoo.batched(model, asked, [6, 6], chunk=64) == expected[2:]
        assert paged.prefixes.tokens_reused == 2 * 37
        paged.check()


@pytest.mark.parametrize("family", PADDED)
def test_a_model_that_sees_padding_shares_nothing_in_batches_and_says_so(family, caplog):
    model = zoo.tiny(family)
    asked = [SYSTEM + zoo.prompt(n, seed=n) for n in (3, 9, 1)]
    with enable(model, page_size=8):
        expected = zoo.batched(model, asked, [6] * 3)
    with enable(model, page_size=8, prefix_cache=True) as paged:
        for _ in range(2):
            assert zoo.batched(model, asked, [6] * 3) == expected
        assert paged.prefixes.tokens_asked == 0
        assert caplog.text.count("goes on into the padding of a batch") == 1
        assert ask(model, asked[0]) == ask(model, asked[0])
        assert paged.prefixes.tokens_reused == 39
        paged.check()


def test_padding_is_seen_where_it_is():
    for family in GOOD + PADDED:
        model = zoo.tiny(family)
        seen = padding_is_seen(model, lambda: make_prompt_cache(model))
        assert seen == (family in PADDED), family


def test_a_stored_state_is_not_changed_by_a_model_that_assigns_to_parts_of_it():
    model = zoo.tiny("qwen3_next")
    expected = ask(model, SYSTEM + [1])
    with enable(model, page_size=8, prefix_cache=True) as paged:
        ask(model, SYSTEM, max_tokens=1)
        for _ in range(2):
            cache = make_prompt_cache(model)
            assert paged.prefixes.begin(SYSTEM + [1], cache) == 36
            for states in states_of(cache):
                states[0][:] = 100.0
        assert ask(model, SYSTEM + [1]) == expected


def test_states_take_no_more_bytes_than_they_may_and_the_least_useful_go():
    model = zoo.tiny("qwen3_next")
    with enable(model, page_size=8, prefix_cache=True) as paged:
        checkpoints = paged.prefixes.checkpoints
        ask(model, SYSTEM, 1)
        ask(model, SYSTEM + [1], 1)  # begins at 36: used once
        assert paged.prefixes.tokens_reused == 36
        one = max(checkpoint.nbytes for checkpoint in checkpoints._all)
        checkpoints._most_bytes = 3 * one
        for seed in range(4):
            ask(model, zoo.prompt(20, seed=seed), 1)
            assert checkpoints.nbytes <= 3 * one
        # The one that was of use is still there, and the newest of the others.
        assert paged.prefixes.known(SYSTEM + [2]) == 36
        assert paged.prefixes.known(zoo.prompt(20, seed=3) + [2]) == 19
        assert paged.prefixes.known(zoo.prompt(20, seed=0) + [2]) == 0
        checkpoints._most_bytes = one - 1
        ask(model, zoo.prompt(20, seed=9), 1)
        assert paged.prefixes.known(zoo.prompt(20, seed=9) + [2]) == 0


def test_states_leave_with_the_pages_they_belong_to():
    model = zoo.tiny("qwen3_next")
    asked = [zoo.prompt(60, seed=seed) for seed in range(5)]
    expected = [ask(model, prompt) for prompt in asked]
    with enable(model, page_size=8, num_pages=20, prefix_cache=True) as paged:
        for _ in range(2):
            assert [ask(model, prompt) for prompt in asked] == expected
        assert paged.prefixes.caches[None].stats.evicted > 0
        gc.collect()
        assert len(paged.prefixes.checkpoints) <= 2 * 2 + 1
        paged.prefixes.reset()
        assert len(paged.prefixes.checkpoints) == 0
        paged.check()


def test_an_interrupted_pass_keeps_no_states(monkeypatch):
    model = zoo.tiny("qwen3_next")
    expected = ask(model, SYSTEM, 8)
    with enable(model, page_size=8, prefix_cache=True) as paged:
        last = model.model.layers[-1]
        calls = []

        def failing(self, *args, before=type(last).__call__, **options):
            if self is last:
                calls.append(1)
                if len(calls) == 5:
                    raise KeyboardInterrupt
            return before(self, *args, **options)

        monkeypatch.setattr(type(last), "__call__", failing)
        with pytest.raises(KeyboardInterrupt):
            ask(model, SYSTEM, 8)
        assert ask(model, SYSTEM, 8) == expected
        assert ask(model, SYSTEM + expected[:4], 4) == expected[4:]
        paged.check()


def test_forks_of_a_hybrid_share_pages_and_keep_states_apart():
    model = zoo.tiny("falcon_h1")
    tails = [[3], [9], [27]]
    expected = [ask(model, SYSTEM + tail) for tail in tails]
    with enable(model, page_size=8) as paged:
        cache = make_prompt_cache(model)
        model(mx.array([SYSTEM]), cache=cache)
        used = paged.groups[None].pages_used
        forks = paged.fork(cache, 3)
        assert paged.groups[None].pages_used == used
        found = [ask(model, tail, cache=fork) for tail, fork in zip(tails, forks)]
        assert found == expected
        assert ask(model, tails[0], cache=copy.deepcopy(cache)) == expected[0]
        paged.check()


def test_a_given_cache_with_states_and_no_tokens_is_not_begun_anew():
    model = zoo.tiny("qwen3_next")
    with enable(model, page_size=8, prefix_cache=True) as paged:
        ask(model, SYSTEM, 1)
        cache = make_prompt_cache(model)
        states = next(cache for cache in cache if isinstance(cache, ArraysCache))
        states[0] = mx.zeros((1, 3, 4))
        states[1] = mx.zeros((1, 3, 4))
        asked = paged.prefixes.tokens_asked
        with pytest.raises(ValueError):
            ask(model, SYSTEM, 1, cache=cache)
        assert paged.prefixes.tokens_asked == asked
