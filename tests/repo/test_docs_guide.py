"""The guide's program runs, and answers as a model with contiguous K and V does."""

import re
from pathlib import Path

import mlx.core as mx
import pytest

GUIDE = Path(__file__).parents[2] / "docs" / "guide.md"


@pytest.fixture(scope="module")
def program():
    """What the guide's examples, run one after the other, leave behind."""
    blocks = re.findall(r"^```python\n(.*?)^```$", GUIDE.read_text(), re.M | re.S)
    assert len(blocks) == 7
    mx.random.seed(3)
    names = {}
    for block in blocks:
        exec(compile(block, GUIDE.name, "exec"), names)
    return names


def logits_of(program, tokens):
    """Logits after every token, [tokens, vocabulary], from attention over contiguous K and V."""
    model, rope = program["model"], program["rope"]
    x = model.embedding[mx.array(tokens)]
    positions = mx.arange(len(tokens))
    for layer in model.layers:
        h = mx.fast.rms_norm(x, None, 1e-5)
        num_q_heads, num_kv_heads = layer.heads
        q = rope((h @ layer.wq).reshape(-1, num_q_heads, layer.head_dim), positions)
        k = rope((h @ layer.wk).reshape(-1, num_kv_heads, layer.head_dim), positions)
        v = (h @ layer.wv).reshape(-1, num_kv_heads, layer.head_dim)
        out = mx.fast.scaled_dot_product_attention(
            *(a.swapaxes(0, 1)[None] for a in (q, k, v)), scale=layer.head_dim**-0.5, mask="causal"
        )
        x = x + out[0].swapaxes(0, 1).reshape(len(tokens), -1) @ layer.wo
    return x @ model.embedding.T


def test_the_models_answers_are_those_of_contiguous_attention(program):
    for prompt, answer in zip(program["prompts"], program["answers"], strict=True):
        predicted = mx.argmax(logits_of(program, prompt + answer), axis=-1).tolist()
        assert predicted[len(prompt) - 1 : -1] == answer


def test_the_beam_found_has_the_probability_that_the_guide_says(program):
    prompt, tokens = program["prompts"][1], program["tokens"]
    logits = logits_of(program, prompt + tokens)
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    score = sum(logprobs[len(prompt) - 1 + i, token].item() for i, token in enumerate(tokens))
    assert abs(score - program["score"]) < 1e-3
