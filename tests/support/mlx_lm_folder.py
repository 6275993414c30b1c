"""A tiny random model as a folder that mlx-lm loads."""

import importlib
import json
from pathlib import Path

import mlx.core as mx
import mlx_lm_prompts as prompts
import mlx_lm_zoo as zoo
from mlx.utils import tree_flatten
from mlx_lm_zoo_configs import OWN, TINY


def write_model(folder: Path, family: str = "llama", seed: int = 0, **changes) -> Path:
    """Write a model of a family, with a tokenizer of single characters; returns its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    known = importlib.import_module(f"mlx_lm.models.{family}").ModelArgs.__dataclass_fields__
    config = {"model_type": family, **TINY, **OWN.get(family, {}), **changes}
    config = {name: value for name, value in config.items() if name in known}
    model = zoo.tiny(family, seed, **changes)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    index = {"weight_map": dict.fromkeys(weights, "model.safetensors")}  # a pipeline asks for it
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    prompts.tokenizer()._tokenizer.save_pretrained(str(folder))
    return folder
