"""The pytest plugin under which mlx-lm's own tests run: a stand-in model, and pages.

    PAGED_MLX_CACHES=stock|paged  PAGED_MLX_REPORT=FILE  pytest -p mlx_lm_own_plugin ...

``mlx_lm.load`` gives a tiny random qwen2, the family that they fetch, with the tokenizer of SmolLM2,
which a package carries. On pages, every model that is asked for a prompt cache is enabled first.
"""

import json
import os
import pathlib
import sys

import mlx.core as mx
import mlx_lm.models.cache as caches
import mlx_lm.utils
import paged_mlx
from mlx_lm.models import qwen2
from mlx_lm.tokenizer_utils import load as load_tokenizer
from paged_mlx.mlx_lm.demo import smollm2
from paged_mlx.mlx_lm.model_seam import paged_model_of

PAGED = os.environ["PAGED_MLX_CACHES"] == "paged"
STOCK_MAKE_PROMPT_CACHE = caches.make_prompt_cache

enabled = []
outcomes = {}


def load(*names, **options):
    """A tiny random model, always the same, and a tokenizer."""
    tokenizer = load_tokenizer(smollm2.model_directory())
    config = {
        "model_type": "qwen2",
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "intermediate_size": 128,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "vocab_size": tokenizer.vocab_size,
        "tie_word_embeddings": False,
    }
    mx.random.seed(0)
    model = qwen2.Model(qwen2.ModelArgs.from_dict(config))
    mx.eval(model.parameters())
    return model, tokenizer


class MakePromptCache:
    """mlx-lm's function, for a model that is enabled first."""

    __code__ = STOCK_MAKE_PROMPT_CACHE.__code__  # by which the adapter knows its caller

    def __call__(self, model, max_kv_size=None):
        if paged_model_of(model) is None:
            try:
                enabled.append(paged_mlx.enable(model))
            except (ValueError, AttributeError):  # no K and V, or no model
                pass
        return STOCK_MAKE_PROMPT_CACHE(model, max_kv_size)


def use_pages() -> None:
    """Have every module enable models before it makes a prompt cache."""
    make_prompt_cache = MakePromptCache()
    for module in list(sys.modules.values()):
        if vars(module).get("make_prompt_cache") is STOCK_MAKE_PROMPT_CACHE:
            module.make_prompt_cache = make_prompt_cache


mlx_lm.utils.load = load


def pytest_collection_finish(session):
    if PAGED:
        use_pages()


def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        outcomes[report.nodeid] = report.outcome


def pytest_sessionfinish(session):
    found = {
        "outcomes": outcomes,
        "models": len(enabled),
        "calls": sum(paged.paged_calls for paged in enabled),
    }
    pathlib.Path(os.environ["PAGED_MLX_REPORT"]).write_text(json.dumps(found, indent=1))
