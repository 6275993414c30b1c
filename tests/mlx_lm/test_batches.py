"""Random batches on pages: prompts join and leave at any step, and the answers are stock's."""

import random

import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: pip install mlx-lm")

import mlx.core as mx  # noqa: E402
import mlx_lm_compare as compare  # noqa: E402
import mlx_lm_zoo as zoo  # noqa: E402
from paged_mlx.mlx_lm import enable  # noqa: E402

pytestmark = pytest.mark.long

# Of every kind of cache, mask, layout and sharing between layers.
FAMILIES = (
    "afmoe bailing_hybrid cohere2 deepseek_v32 falcon_h1 gemma3n gemma4_text gpt_oss "
    "iquestloopcoder laguna llama longcat_flash mimo_v2_flash minimax_m3_vl mistral4 nanbeige "
    "nemotron-nas openelm plamo3 qwen3_next stablelm step3p5"
).split()


@pytest.mark.parametrize("seed", range(48))
def test_random_batches_are_answered_as_stock(seed):
    random_of = random.Random(seed)
    family = random_of.choice([family for family in FAMILIES if family in zoo.FAMILIES])
    size = random_of.choice([1, 2, 3, 5, 9])
    prompts = [zoo.prompt(random_of.randrange(1, 60), seed=i) for i in range(size)]
    batch = {
        "max_tokens": [random_of.randrange(1, 14) for _ in prompts],
        "late": {i: random_of.randrange(1, 9) for i in range(1, size) if random_of.random() < 0.4},
        "chunk": random_of.choice([1, 5, 13, 16, 64]),
    }
    options = {
        "page_size": random_of.choice([1, 3, 8, 16, 50]),
        "retain": random_of.choice([0, 32, None]),
    }
    print(family, batch, options)  # shown where it fails

    def answer():
        found = compare.Answer()
        found.tokens = zoo.batched(model, prompts, **batch, logprobs=found.logprobs)
        return found

    mx.disable_compile()
    model = zoo.tiny(family, seed=seed)
    expected = answer()
    with enable(model, **options) as paged:
        assert compare.differences(family, expected, answer()) == []
        paged.check()
        assert [group.pages_used for group in paged.groups.values()] == [0] * len(paged.groups)
    mx.enable_compile()
