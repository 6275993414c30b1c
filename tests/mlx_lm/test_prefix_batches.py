"""prefix_cache=True behind BatchGenerator and batch_generate: pages and computing shared."""

import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: pip install mlx-lm")

import mlx.core as mx  # noqa: E402
import mlx_lm_prompts  # noqa: E402
import mlx_lm_zoo as zoo  # noqa: E402
from mlx_lm import batch_generate  # noqa: E402
from mlx_lm.generate import BatchGenerator  # noqa: E402
from mlx_lm.models.cache import make_prompt_cache  # noqa: E402
from paged_mlx.mlx_lm import enable  # noqa: E402

SYSTEM = zoo.prompt(37, seed=1)


@pytest.fixture
def computed(monkeypatch):
    """Counts the tokens that models compute, padding too."""
    return mlx_lm_prompts.count_tokens(monkeypatch, "llama", "gemma3_text", "gpt_oss")


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_batch_reads_what_its_prompts_begin_with_once(family):
    model = zoo.tiny(family)
    prompts = [SYSTEM + zoo.prompt(n, seed=n) for n in (3, 9, 1, 14)] + [zoo.prompt(12, seed=5)]
    max_tokens = [6, 3, 9, 5, 4]
    expected = zoo.batched(model, prompts, max_tokens, late={3: 2})
    with enable(model, page_size=8, prefix_cache=True) as paged:
        assert zoo.batched(model, prompts, max_tokens, late={3: 2}) == expected
        # Four full pages, computed once for the first three; 37 tokens found by the late one.
        # The last tokens are not asked for: they are computed always.
        assert paged.prefixes.tokens_asked == sum(map(len, prompts)) - len(prompts)
        assert paged.prefixes.tokens_reused == 2 * 32 + 37
        assert zoo.batched(model, prompts, max_tokens, late={3: 2}) == expected
        # All but the last tokens.
        reused = paged.prefixes.tokens_reused - (2 * 32 + 37)
        assert reused == sum(map(len, prompts)) - len(prompts)
        paged.check()
        for window, group in paged.groups.items():
            assert group.pages_used == paged.prefixes.caches[window].num_pages
        paged.prefixes.reset()
        assert [group.pages_used for group in paged.groups.values()] == [0] * len(paged.groups)


def test_prompts_inserted_one_by_one_share_what_the_first_has_read():
    model = zoo.tiny("llama")
    prompts = [SYSTEM + zoo.prompt(3, seed=n) for n in range(4)]
    with enable(model, page_size=8, prefix_cache=True) as paged:
        generator = BatchGenerator(model, prefill_batch_size=2, max_tokens=5)
        for prompt in prompts:
            generator.insert([prompt])  # nothing is read before the first step
        steps = 0
        while generator.next_generated():
            steps += 1
            if steps == 2:
                tables = paged.groups[None].page_map()
                assert len({tuple(ids[:4]) for ids in tables}) == 1
        # Twice two prompts; the 32 tokens of four pages are computed once, those of the fifth,
        # which the first prompts have begun, not by the later ones.
        assert paged.prefixes.tokens_reused == 32 + 2 * 37
        paged.check()


def test_pages_of_a_waiting_prompt_are_not_held_while_it_waits():
    model = zoo.tiny("llama")
    prompts = [SYSTEM + [n] for n in range(6)]
    expected = zoo.batched(model, prompts, [4] * 6)
    with enable(model, page_size=8, num_pages=24, prefix_cache=True) as paged:
        zoo.single(model, SYSTEM, max_tokens=1)
        generator = BatchGenerator(model, max_tokens=4, prefill_batch_size=1)
        generator.insert(prompts)
        assert paged.groups[None].pages_used == 5
        assert paged.groups[None].allocator.num_evictable == 5
        assert zoo.batched(model, prompts, [4] * 6) == expected


def test_attention_reads_what_a_batch_begins_with_once():
    model = zoo.tiny("llama")
    prompts = [SYSTEM + zoo.prompt(3, seed=n) for n in range(8)]
    expected = zoo.batched(model, prompts, [4] * 8)
    decisions = []
    with enable(model, page_size=8, prefix_cache=True) as paged:

        def watch():
            for plan in paged.groups[None].plans:
                decisions.append([(d.num_sequences, d.num_pages, d.shared) for d in plan.decisions])

        assert zoo.batched(model, prompts, [4] * 8, watch=watch, chunk=64) == expected
        assert paged.gathered_calls == {}
    assert [(8, 4, True)] in decisions


def test_batch_generate_shares_prefixes_in_a_batch_and_across_calls(computed):
    model, tokenizer = zoo.tiny("llama"), mlx_lm_prompts.tokenizer()
    prompts = [SYSTEM + [n, n + 1] for n in range(3)]
    stock = batch_generate(model, tokenizer, prompts, max_tokens=4).texts
    with enable(model, page_size=8, prefix_cache=True) as paged:
        computed.clear()
        assert batch_generate(model, tokenizer, prompts, max_tokens=4).texts == stock
        # The common pages, what is left of each prompt, and a pass more than tokens come out.
        assert sum(computed) == 32 + 3 * 7 + 3 * 4
        computed.clear()
        assert batch_generate(model, tokenizer, prompts, max_tokens=4).texts == stock
        assert sum(computed) == 3 * 1 + 3 * 4
        paged.check()


def test_a_common_beginning_is_read_in_chunks(computed):
    model = zoo.tiny("llama")
    system = zoo.prompt(100, seed=1)
    with enable(model, page_size=8, prefix_cache=True):
        computed.clear()
        zoo.batched(model, [system + [1], system + [2]], [1, 1], chunk=32)
        assert max(computed) == 32 and computed[:3] == [32, 32, 32]


def test_caches_of_ones_own_are_known_by_what_was_read_into_them(computed):
    model = zoo.tiny("llama")
    tails = [[3, 5], [9], [27, 81, 11]]
    expected = [zoo.single(model, SYSTEM + tail, max_tokens=6) for tail in tails]
    with enable(model, page_size=8, prefix_cache=True) as paged:
        cache = make_prompt_cache(model)
        answer = zoo.single(model, SYSTEM, max_tokens=2, cache=cache)
        for layer in cache:
            layer.trim(2)
        # mlx-lm is not told what the caches hold; they know themselves.
        found = zoo.batched(model, tails, [6] * 3, caches=[cache] * 3)
        assert found == expected
        assert [layer.offset for layer in cache] == [37] * 3
        computed.clear()
        for tail, answer in zip(tails, expected):
            zoo.single(model, SYSTEM + tail + answer + [1], max_tokens=1)
        assert sum(computed) == 3 * 2
        paged.check()


def test_a_cache_that_knows_less_than_the_pages_is_left_for_one_that_knows_more(computed):
    model = zoo.tiny("llama")
    expected = zoo.single(model, SYSTEM + [7], max_tokens=6)
    with enable(model, page_size=8, prefix_cache=True) as paged:
        short = make_prompt_cache(model)
        zoo.single(model, SYSTEM[:9], max_tokens=1, cache=short)
        for layer in short:
            layer.trim(1)
        zoo.single(model, SYSTEM, max_tokens=1)
        computed.clear()
        (found,) = zoo.batched(
            model, [SYSTEM[9:] + [7]], [6], caches=[short], all_tokens=[SYSTEM[:9]]
        )
        assert found == expected and sum(computed) == 1 + 6
        assert short[0].offset == 9
        paged.check()


def test_logits_processors_of_a_batch_see_whole_prompts():
    model = zoo.tiny("llama")
    prompts = [SYSTEM + [1], SYSTEM + [2, 3]]

    def seen():
        rows = []

        def processor(tokens, logits):
            rows.append(tokens.tolist())
            return logits

        generator = BatchGenerator(model, max_tokens=3)
        generator.insert(prompts, logits_processors=[[processor]] * 2)
        while generator.next_generated():
            pass
        return rows

    expected = seen()
    with enable(model, page_size=8, prefix_cache=True):
        assert seen() == expected
        assert seen() == expected


def test_sequences_that_are_removed_leave_what_they_have_read(computed):
    model = zoo.tiny("llama")
    with enable(model, page_size=8, prefix_cache=True) as paged:
        generator = BatchGenerator(model, max_tokens=50)
        uids = generator.insert([SYSTEM, zoo.prompt(20, seed=2)])
        for _ in range(3):
            generator.next_generated()
        caches = generator.remove([uids[0]], return_prompt_caches=True)
        assert len(caches[uids[0]][1]) == 40
        generator.remove([uids[1]])
        del caches, generator
        computed.clear()
        zoo.single(model, SYSTEM + [1], max_tokens=1)
        zoo.single(model, zoo.prompt(20, seed=2), max_tokens=1)
        assert sum(computed) == (1 + 1) + (1 + 1)
        paged.check()
        for group in paged.groups.values():
            assert group.pages_used == paged.prefixes.caches[group.window].num_pages


def test_n_samples_of_one_prompt_share_it_and_diverge():
    model = zoo.tiny("llama")
    with enable(model, page_size=8, prefix_cache=True) as paged:
        mx.random.seed(0)
        generator = BatchGenerator(model, max_tokens=20, sampler=mx.random.categorical)
        uids = generator.insert([SYSTEM] * 8)
        answers = {uid: [] for uid in uids}
        most = 0
        while responses := generator.next_generated():
            for response in responses:
                answers[response.uid].append(response.token)
            most = max(most, paged.groups[None].pages_used)
        assert len(set(map(tuple, answers.values()))) == 8
        # Four shared pages; each sample's own 5 + 21 tokens lie on at most four more.
        assert most <= 4 + 8 * 4
        paged.check()


@pytest.mark.skipif("minimax_m3_vl" not in zoo.FAMILIES, reason="this mlx-lm has no such model")
def test_rows_of_a_padded_batch_are_not_remembered_where_padding_may_be_seen():
    model = zoo.tiny("minimax_m3_vl")
    asked = [zoo.prompt(n, 100 + n) for n in (33, 50, 7)]
    expected = [zoo.single(model, prompt, 12) for prompt in asked]
    with enable(model, page_size=4, prefix_cache=True) as paged:
        zoo.batched(model, asked, [12] * 3, chunk=8)
        assert not paged.is_wholly_paged and paged.prefixes.caches[None].num_pages == 0
        for prompt, answer in zip(asked, expected):
            assert zoo.single(model, prompt + answer[:8], 4) == answer[8:]


def test_a_model_whose_batches_cannot_be_probed_shares_no_prompts_in_them():
    model = zoo.tiny("longcat_flash_ngram")
    asked = [zoo.prompt(n, n) for n in (33, 17)]
    expected = zoo.batched(model, asked, [3, 3])
    with enable(model, page_size=8, prefix_cache=True) as paged:
        assert zoo.batched(model, asked, [3, 3]) == expected
        paged.check()
