"""Batched speculative decoding: every row gets the tokens of greedy decoding of it alone."""

import contextlib
import random
import re
from pathlib import Path
from unittest import mock

import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: pip install mlx-lm")

import mlx.core as mx  # noqa: E402
import mlx_lm_compare as compare  # noqa: E402
import mlx_lm_zoo as zoo  # noqa: E402
import numpy as np  # noqa: E402
from mlx.utils import tree_map  # noqa: E402
from mlx_lm.models import cache as stock  # noqa: E402
from paged_mlx.errors import OutOfPages  # noqa: E402
from paged_mlx.mlx_lm import (  # noqa: E402
    SpeculativeBatchGenerator,
    enable,
    speculative_batch_generate,
)
from paged_mlx.mlx_lm.model_seam import paged_model_of  # noqa: E402
from paged_mlx.mlx_lm.speculative import Row  # noqa: E402
from paged_mlx.pool import PagePool  # noqa: E402

# Longer and shorter than a window, of one token too; more prompts than are answered together.
LENGTHS, MAX_TOKENS = (30, 5, 17, 44, 1), [12, 3, 9, 7, 10]
TOGETHER = 3
NO_STOP = 10**6
QUICK = ("llama", "gemma3_text", "gpt_oss", "deepseek_v32", "gemma2")
# Without us too, mlx-lm answers these otherwise in a batch than alone: scales or blocks over
# the whole batch, and a mask that is added as numbers.
DIFFER_IN_BATCHES = {"afm7", "afm7: one kv head", "minimax_m3_vl", "olmo"}
CANNOT_BATCH = {"gpt_bigcode", "llama4", "phi3small", "phi3small: dense"}


class Tokenizer:
    """Numbers for texts."""

    def __init__(self, *stops):
        self.eos_token_ids = set(stops) or {NO_STOP}

    def decode(self, tokens):
        return " ".join(map(str, tokens))


@pytest.fixture(autouse=True)
def uncompiled():
    mx.disable_compile()
    yield
    mx.enable_compile()


def prompts_of(lengths=LENGTHS):
    return [zoo.prompt(length, seed=length) for length in lengths]


def alike(name):
    """The model with weights that are a little off: as a draft, right now and then."""

    def off(weight):
        if not mx.issubdtype(weight.dtype, mx.floating):
            return weight
        noise = mx.random.normal(weight.shape) * mx.abs(weight).mean()
        return weight + (0.05 * noise).astype(weight.dtype)

    model = zoo.tiny(name)
    mx.random.seed(1)
    model.update(tree_map(off, model.parameters()))
    mx.eval(model.parameters())
    return model


def greedy(model, prompts, max_tokens):
    return [zoo.single(model, prompt, most) for prompt, most in zip(prompts, max_tokens)]


def generate(model, prompts, draft=None, max_tokens=MAX_TOKENS, stops=(), **options):
    tokenizer = Tokenizer(*stops)
    return speculative_batch_generate(
        model, tokenizer, prompts, draft, max_tokens=max_tokens, **options
    )


def pages_used(paged):
    return [group.pages_used for group in paged.groups.values()]


def assert_greedy(family, page_size=8):
    model, length = zoo.tiny(family), compare.SHORT.get(family)
    prompts = prompts_of(LENGTHS if length is None else (length - 2, length - 4, 1))
    most = MAX_TOKENS if length is None else [2, 4, 6]
    expected = greedy(model, prompts, most)
    with enable(model, page_size=page_size) as paged:
        for draft in (None, model, alike(family)):
            found = generate(model, prompts, draft, most, completion_batch_size=TOGETHER)
            assert found.token_ids == expected
            assert found.texts == [Tokenizer().decode(tokens) for tokens in expected]
            assert not any(pages_used(paged))
        paged.check()
        return paged.is_wholly_paged


@pytest.mark.parametrize("family", QUICK)
def test_rows_that_join_and_leave_are_answered_as_greedy_one_by_one(family):
    reads_pages = assert_greedy(family)
    assert reads_pages == (family not in ("gemma2", "deepseek_v32"))


@pytest.mark.long
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("name", [*zoo.FAMILIES, *zoo.VARIANTS])
def test_every_family_that_can_be_rewound_is_answered_so(name, page_size):
    model = zoo.tiny(name)
    if name in CANNOT_BATCH or not stock.can_trim_prompt_cache(stock.make_prompt_cache(model)):
        with pytest.raises(ValueError, match="model must be one (that mlx-lm can|whose tokens)"):
            generate(model, prompts_of())
    elif name not in DIFFER_IN_BATCHES:
        assert_greedy(name, page_size)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(16))
def test_random_traffic_is_answered_as_greedy_one_by_one(seed):
    random_of = random.Random(seed)
    family = random_of.choice([*QUICK, "cohere2", "iquestloopcoder", "gemma3n", "longcat_flash"])
    prefix_cache = random_of.random() < 0.5
    drafts = random_of.choice([1, 2, 4, 7])
    pages = random_of.choice([None, 24])
    options = {"page_size": random_of.choice([3, 8, 16]), "retain": random_of.choice([8, None])}
    print(family, drafts, options, prefix_cache, pages)  # shown where it fails
    if pages is not None:
        options["num_pages"] = pages * 16 // options["page_size"]
    model, draft = zoo.tiny(family, seed=seed), random_of.choice([None, alike(family)])
    beginnings = [zoo.prompt(random_of.randrange(1, 40), seed=i) for i in range(3)]
    wanted, tokens, gone = {}, {}, set()
    with (
        enable(model, prefix_cache=prefix_cache, **options) as paged,
        SpeculativeBatchGenerator(
            model, draft, num_draft_tokens=drafts, completion_batch_size=3, prefill_step_size=16
        ) as generator,
    ):
        for step in range(40):
            if random_of.random() < 0.4 and step < 25:
                more = zoo.prompt(random_of.randrange(1, 20), seed=step)
                prompt, most = random_of.choice(beginnings) + more, random_of.randrange(1, 16)
                wanted[generator.insert([prompt], most)[0]] = (prompt, most)
            there = [uid for uid in wanted if len(tokens.get(uid, ())) < wanted[uid][1]]
            if random_of.random() < 0.1 and (left := [uid for uid in there if uid not in gone]):
                gone.add(left[0])
                generator.remove(left[:1])
            for each in generator.next():
                assert each.uid not in gone
                tokens.setdefault(each.uid, []).extend(each.tokens)
        while responses := generator.next():
            for each in responses:
                tokens.setdefault(each.uid, []).extend(each.tokens)
        assert not any(pages_used(paged)) or prefix_cache
        paged.check()
    for uid, (prompt, most) in wanted.items():
        expected = zoo.single(model, prompt, most)
        found = tokens.get(uid, [])
        assert found == (expected[: len(found)] if uid in gone else expected), uid


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("drafts", ["itself", "alike", "look-up"])
def test_a_row_keeps_as_many_drafts_as_alone(family, drafts):
    # A prompt that says everything twice has something to look up.
    model, prompts = zoo.tiny(family), [prompt * 2 for prompt in prompts_of((20, 3, 9))]
    most = [14, 9, 11]
    with enable(model, page_size=8) as paged:
        draft = {"itself": model, "alike": alike(family), "look-up": None}[drafts]
        alone = [generate(model, [p], draft, n) for p, n in zip(prompts, most)]
        found = generate(model, prompts, draft, most)
        paged.check()
    assert found.accepted_lengths == [each.accepted_lengths[0] for each in alone]
    if drafts == "itself":
        assert found.accepted_lengths == [[3, 3, 3, 1], [3, 3, 0], [3, 3, 2]]
        assert found.stats.generation_steps == 4
    elif drafts == "alike":
        assert any(len(set(kept)) > 1 for kept in zip(*found.accepted_lengths))  # rows part
    assert found.stats.accepted_tokens == sum(map(sum, found.accepted_lengths))


def test_look_up_copies_what_followed_the_longest_match_last():
    row = Row(0, [1, 2, 3, 9, 2, 3, 4, 7, 1, 2, 3], 1, trust=4)
    assert Row(1, [2, 3, 9, 2, 3, 4, 2, 3], 1, 4).look_up(2) == [4, 2]  # after 2 3, the last time
    assert row.look_up(4) == [9, 2, 3, 4]  # after 1 2 3
    row.tokens += [5, 6, 6, 6]
    assert row.look_up(3) == [6, 6, 6]  # a repetition goes on
    row.tokens += [3]
    assert row.look_up(3) == []  # one token alike is not enough
    assert row.look_up(0) == []


def test_look_up_drafts_more_while_it_is_right_and_nothing_while_it_is_not():
    row = Row(0, [*range(40), 0, 1], 1)

    def step(new):
        """Drafts of a step after which the model has given ``new``."""
        drafts = row.look_up(8)
        row.learn(new, 8)
        row.tokens += new
        return len(drafts)

    assert [step([2, 3]), step([4, 5, 6]), step([7, 8, 9, 10, 11])] == [1, 2, 4]
    assert row.trust == 8
    row.tokens += [0, 1]
    assert [step([100 + i, 0, 1]) for i in range(6)] == [8, 4, 2, 1, 0, 0]
    row.tokens += [20, 21]
    assert [step([22]), step([23, 24]), step([25, 26, 27])] == [0, 1, 2]  # 22 was right
    assert step([28, 29, 30, 50]) == 4 and row.trust == 3


@pytest.mark.parametrize("itself", [True, False])
def test_a_stop_token_ends_a_row_also_among_accepted_drafts(itself):
    model, prompts = zoo.tiny("llama"), prompts_of((30, 5))
    whole = greedy(model, prompts, [12, 12])
    stop = whole[0][5]
    cut = [tokens[: tokens.index(stop)] if stop in tokens else tokens for tokens in whole]
    found = generate(model, prompts, model if itself else None, 12, stops=[stop])
    assert found.token_ids == cut
    assert paged_model_of(model) is None


def test_models_that_are_not_enabled_are_for_the_run_alone():
    model, draft, prompts = zoo.tiny("gemma3_text"), zoo.tiny("llama", seed=7), prompts_of((40, 9))
    expected = greedy(model, prompts, [10, 10])
    with SpeculativeBatchGenerator(model, draft, num_draft_tokens=40) as generator:
        assert paged_model_of(model).groups[zoo.WINDOW].retain >= 40
        assert paged_model_of(draft) is not None
        generator.insert(prompts, 10)
        assert [len(each.tokens) > 0 for each in generator.next()] == [True, True]
    assert paged_model_of(model) is None and paged_model_of(draft) is None
    assert generate(model, prompts, draft, 10).token_ids == expected


def test_prompts_come_and_go_at_any_time_and_pages_go_with_them():
    model, prompts = zoo.tiny("llama"), prompts_of((30, 5, 17))
    expected = greedy(model, prompts, [12, 3, 9])
    tokens = {}
    with enable(model, page_size=8) as paged, SpeculativeBatchGenerator(model, model) as generator:

        def step():
            for each in generator.next():
                tokens.setdefault(each.uid, []).extend(each.tokens)
                if each.finish_reason:
                    ended.append((each.uid, each.finish_reason))

        ended = []
        first, gone = generator.insert(prompts[:2], [12, 300])
        step()
        # The model holds 33 and 8 tokens, and as its own draft 32 and 7.
        assert pages_used(paged) == [5 + 1 + 4 + 1]
        generator.remove([gone])
        assert pages_used(paged) == [5 + 4]
        second, third, waits = generator.insert([prompts[2], prompts[1], prompts[0]], [9, 3, 5])
        generator.remove([waits])
        step()
        assert ended == [(third, "length")]
        while len(ended) < 3:
            step()
        assert generator.next() == [] and pages_used(paged) == [0]
        assert [tokens[uid] for uid in (first, third, second)] == expected
        for bad in ([first], [99]):
            with pytest.raises(ValueError, match=r"\[remove\] uids must be"):
                generator.remove(bad)
        again = generator.insert(prompts[:1], 2)
        with pytest.raises(ValueError, match=r"\[remove\] uids must be"):
            generator.remove(again * 2)
        assert len(generator.next()) == 1


@pytest.mark.parametrize("page_size", [8, 5])  # of a step's tokens, and of fewer
def test_a_known_beginning_is_reused_and_a_rollback_copies_no_page(page_size):
    # Rows join at every step, while others have rejected drafts in full pages.
    model, draft, common = zoo.tiny("llama"), alike("llama"), zoo.prompt(40, seed=1)
    prompts = [common + zoo.prompt(n, seed=n) for n in (3, 12, 7, 5, 9, 2, 11, 4)]
    expected = greedy(model, prompts, [40] * len(prompts))
    tokens, copied, copy = [[] for _ in prompts], [], PagePool.copied

    def counted(self, pairs):
        copied.extend(pairs)
        copy(self, pairs)

    with (
        enable(model, page_size=page_size, prefix_cache=True) as paged,
        SpeculativeBatchGenerator(model, draft, num_draft_tokens=7) as generator,
        mock.patch.object(PagePool, "copied", counted),
    ):
        joining = list(prompts)
        generator.insert([joining.pop(0)], 40)
        while responses := generator.next():
            for each in responses:
                tokens[each.uid] += each.tokens
            if joining:
                generator.insert([joining.pop(0)], 40)
        assert tokens == expected
        assert paged.prefixes.tokens_reused == 7 * 40
        assert copied == [] and generator.stats.accepted_tokens > 0
        paged.check()


def test_on_a_limited_pool_prompts_wait_and_none_is_lost():
    model, prompts = zoo.tiny("llama"), prompts_of((30, 5, 17, 44, 1, 23))
    most = [12, 3, 9, 7, 10, 20]
    expected = greedy(model, prompts, most)
    with enable(model, page_size=8, num_pages=8) as paged:
        found = generate(model, prompts, None, most)
        assert found.token_ids == expected
        assert found.stats.generation_steps > max(most) / 4 + 3
        assert paged.groups[None].peak_pages > 6
        with pytest.raises(
            ValueError, match=r"\[insert\] num_pages must be at least 10 for a prompt and"
        ):
            generate(model, [prompts[0], prompts[3]], None, 30)
        assert pages_used(paged) == [0]


def test_rows_go_on_while_others_hold_the_pages_that_a_prompt_waits_for():
    model, prompts = zoo.tiny("llama"), prompts_of((17, 30))
    expected = greedy(model, prompts, [9, 9])
    tokens = {}
    with enable(model, page_size=8, num_pages=7) as paged:
        theirs = paged.make_cache()
        mx.eval(model(mx.array([zoo.prompt(20, seed=0)]), cache=theirs))
        generator = SpeculativeBatchGenerator(model, num_draft_tokens=1)
        first, waits = generator.insert(prompts[:1], 9) + generator.insert(prompts[1:], 9)
        while True:
            try:
                responses = generator.next()
            except OutOfPages:  # nothing runs, and others hold what is missing
                assert len(tokens[first]) == 9 and theirs
                theirs = None
                continue
            for each in responses:
                tokens.setdefault(each.uid, []).extend(each.tokens)
            if not responses:
                break
        paged.check()
    assert theirs is None and [tokens[first], tokens[waits]] == expected


class Failing:
    """A model's layer that fails when it is told to."""

    def __init__(self, layer):
        self.layer, self.fails = layer, False

    def __call__(self, *args, **options):
        if self.fails:
            raise OutOfPages("planted")
        return self.layer(*args, **options)


@pytest.mark.parametrize("of_draft", [True, False])
def test_a_step_that_fails_before_its_first_layer_is_taken_again(of_draft):
    model, draft, prompts = zoo.tiny("llama"), zoo.tiny("llama", seed=7), prompts_of((30, 5))
    expected = greedy(model, prompts, [9, 9])
    failing = Failing((draft if of_draft else model).model.embed_tokens)
    tokens = {}
    with SpeculativeBatchGenerator(model, draft) as generator:
        generator.insert(prompts, 9)
        (draft if of_draft else model).model.embed_tokens = failing
        for turn in range(20):
            failing.fails = turn % 2 == 1
            with contextlib.suppress(OutOfPages):
                for each in generator.next():
                    tokens.setdefault(each.uid, []).extend(each.tokens)
    assert list(tokens.values()) == expected


def test_sampled_tokens_have_the_distribution_of_sampling_one_by_one():
    # Rows of one prompt, a first token each that is certain, a second one of seven.
    model, prompt, rows = zoo.tiny("llama"), zoo.prompt(12, seed=3), 800
    first = zoo.single(model, prompt, 1)
    logprobs = []
    zoo.single(model, prompt + first, 1, logprobs=logprobs)
    allowed = mx.argsort(logprobs[0].flatten())[-7:]
    p = mx.softmax(2 * logprobs[0].flatten()[allowed])

    def sampler(logprobs):
        chosen = mx.random.categorical(2 * logprobs[:, allowed])
        return mx.where(mx.arange(len(chosen)) % 2 == 0, first[0], allowed[chosen])

    mx.random.seed(0)
    found = generate(
        model, [prompt] * rows, model, 2, num_draft_tokens=1, sampler=sampler,
        completion_batch_size=rows, prefill_batch_size=rows,
    )  # fmt: skip
    seconds = [tokens[1] for tokens in found.token_ids]
    counts = np.array([seconds.count(token) for token in allowed.tolist()])
    assert counts.sum() == rows and all(tokens[0] == first[0] for tokens in found.token_ids)
    assert np.abs(counts / rows - np.array(p)).max() < 0.05
    assert found.stats.accepted_tokens > rows / 2


@pytest.mark.parametrize("family", ["qwen3_next", "mamba", "llama4", "gpt_bigcode"])
def test_a_model_whose_rows_cannot_be_taken_back_is_refused_before_anything_runs(family):
    if family not in zoo.installed():
        pytest.skip(f"this mlx-lm has no {family}")
    with contextlib.suppress(RuntimeError):  # mamba needs Metal
        model = zoo.tiny(family)
        for models in ((model,), (zoo.tiny("llama"), model)):
            with pytest.raises(ValueError, match="must (be one|have a cache)"):
                SpeculativeBatchGenerator(*models)
            assert all(paged_model_of(each) is None for each in models)


BAD = {
    "num_draft_tokens must be a whole number of at least 1": {"num_draft_tokens": 0},
    "completion_batch_size must be": {"completion_batch_size": 0},
    "max_tokens must be a whole number": {"max_tokens": 0},
    "max_tokens must be one number or 2": {"max_tokens": [1]},
    "prompts must be a list of lists": {"prompts": "text"},
    "prompts must be a list of": {"prompts": []},
    "a prompt must be a list of one token id": {"prompts": [[1], "text"]},
    "a prompt must be a list of one token": {"prompts": [[1], []]},
    "a prompt must be a": {"prompts": [1, 2]},
    "a token id must be a whole number": {"prompts": [[1], [1, -1]]},
    "a token id must be at most": {"prompts": [[1], [1, zoo.VOCABULARY]]},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_a_typed_error_and_nothing_runs(message):
    model, given = zoo.tiny("llama"), {"prompts": [[1, 2], [3]], "max_tokens": 5} | BAD[message]
    with pytest.raises(ValueError, match=rf"^\[\w+\] {message}.*; got .*\.$"):
        generate(model, **given)
    assert paged_model_of(model) is None


def test_a_draft_of_another_vocabulary_or_beyond_what_windows_keep_is_refused():
    model = zoo.tiny("gemma3_text")
    with pytest.raises(ValueError, match="draft_model must have the vocabulary of model"):
        SpeculativeBatchGenerator(model, zoo.tiny("llama", vocab_size=zoo.VOCABULARY + 1))
    with enable(model, retain=2), pytest.raises(ValueError, match="must be at most 2, enable's"):
        SpeculativeBatchGenerator(model, num_draft_tokens=3)


def test_a_vocabulary_that_is_padded_further_gives_no_draft_that_the_model_cannot_read():
    model, draft = (
        zoo.tiny("llama", vocab_size=n, tie_word_embeddings=False) for n in (1024, 1026)
    )
    weight = draft.lm_head.weight
    far = 1e3 * mx.ones((1, weight.shape[1]))  # one of the last two is always the likeliest
    draft.lm_head.weight = mx.concatenate([weight[:-2], far, -far])
    embed, read = model.model.embed_tokens, []
    model.model.embed_tokens = lambda tokens: read.append(tokens) or embed(tokens)
    found = generate(model, prompts_of((9, 4)), draft, 6)
    assert max(tokens.max().item() for tokens in read) < 1024
    model.model.embed_tokens = embed
    assert found.token_ids == greedy(model, prompts_of((9, 4)), [6, 6])


def test_the_example_of_the_docs_runs():
    page = Path(__file__).parents[2] / "docs" / "mlx_lm.md"
    blocks = re.findall(r"^```python\n(.*?)^```$", page.read_text("utf-8"), re.M | re.S)
    (example,) = [block for block in blocks if "speculative_batch_generate" in block]
    model, tokenizer = zoo.tiny("llama"), Tokenizer()
    tokenizer.encode = lambda text: [ord(letter) % zoo.VOCABULARY for letter in text]
    program: dict = {}
    with mock.patch("mlx_lm.load", lambda name: (model, tokenizer)):
        exec(compile(example, page.name, "exec"), program)
    answers = program["answers"]
    assert len(answers.texts) == len(answers.accepted_lengths) == 2
    assert answers.texts == program["looked_up"].texts
