"""Language models of mlx-vlm on pages, with the same hook."""

import importlib
import inspect
from types import SimpleNamespace

import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: pip install mlx-lm")
pytest.importorskip(
    "mlx_vlm", reason="mlx-vlm is not installed: `make test-mlx-vlm` runs this test beside it"
)

import mlx.core as mx  # noqa: E402
import mlx_lm_zoo as zoo  # noqa: E402
from mlx_lm_zoo_configs import OWN as TEXT  # noqa: E402
from mlx_lm_zoo_configs import TINY  # noqa: E402
from mlx_vlm.models.cache import make_prompt_cache  # noqa: E402
from paged_mlx.mlx_lm import enable, explain  # noqa: E402

SHARE_K_AND_V = ("gemma3n",)  # later layers read the state of another's cache, contiguous
STOCK_ATTENTION = mx.fast.scaled_dot_product_attention

# What a language model asks the whole model's configuration for.
WHOLE = SimpleNamespace(
    vision_config=SimpleNamespace(spatial_merge_size=2),
    image_token_id=-1,
    video_token_id=-1,
    vision_start_token_id=-1,
)
SECTIONS = {"type": "default", "rope_type": "default", "mrope_section": [2, 1, 1]}
OWN = {
    "gemma3": {},
    "gemma3n": TEXT["gemma3n"] | {"intermediate_size": [48] * 5},
    "internvl_chat": {},
    "llava": {"model_type": "llama"},
    "mistral3": {"model_type": "mistral"},
    "paligemma": {"model_type": "gemma"},
    "pixtral": {"model_type": "mistral"},
    "qwen2_5_vl": {"rope_scaling": SECTIONS},
    "qwen2_vl": {"rope_scaling": SECTIONS},
    "qwen3_vl": {"rope_scaling": SECTIONS},
}


def language_model(family: str):
    module = importlib.import_module(f"mlx_vlm.models.{family}")
    config = module.TextConfig.from_dict({"model_type": family, **TINY, **OWN[family]})
    mx.random.seed(0)
    both = len(inspect.signature(module.LanguageModel).parameters) > 1
    model = module.LanguageModel(config, WHOLE) if both else module.LanguageModel(config)
    mx.eval(model.parameters())
    return model


def answer(model, length: int = 45, max_tokens: int = 10):
    """Greedy tokens and their logits; the prompt in chunks."""
    cache, tokens = make_prompt_cache(model), zoo.prompt(length, seed=1)
    for start in range(0, length - 1, 16):
        chunk = mx.array([tokens[start : min(start + 16, length - 1)]])
        mx.eval(model(chunk, cache=cache).logits)
    found, seen = tokens[-1:], []
    for _ in range(max_tokens):
        logits = model(mx.array([found[-1:]]), cache=cache).logits[0, -1]
        found.append(int(mx.argmax(logits)))
        seen.append(logits)
    return found, mx.stack(seen)


@pytest.mark.parametrize("family", list(OWN))
def test_greedy_tokens_are_those_of_mlx_vlms_own_caches(family):
    model = language_model(family)
    expected, logits = answer(model)
    assert explain(model).num_paged == len(explain(model).layers)
    with enable(model, page_size=8) as paged:
        attention = mx.fast.scaled_dot_product_attention
        assert (attention is STOCK_ATTENTION) == (family not in SHARE_K_AND_V)
        found, ours = answer(model)
        assert found == expected
        assert mx.abs(ours - logits).max() < 1e-4 * mx.abs(logits).max()
        num_caches = len(make_prompt_cache(model))
        assert (num_caches == len(model.layers)) == (family not in SHARE_K_AND_V)
        assert paged.paged_calls == num_caches * 13
        assert paged.gathered_calls == {}
        paged.check()
