"""Tiny random models of mlx-lm's families, and greedy generation through mlx-lm."""

import importlib
import pathlib
import re
import sys
import types

import mlx.core as mx
import mlx_lm
import mlx_lm.models
import mlx_lm_zoo_on_cpu as on_cpu
from mlx.utils import tree_map
from mlx_lm.generate import BatchGenerator
from mlx_lm_zoo_configs import OWN, TINY, VARIANTS, VOCABULARY, WINDOW

GENERATE = sys.modules["mlx_lm.generate"]  # whose functions are looked up as they are called

__all__ = ["GENERATE", "VARIANTS", "VOCABULARY", "WINDOW"]


def installed() -> list[str]:
    """The model classes of the installed mlx-lm, read from its files."""
    folder = pathlib.Path(mlx_lm.models.__path__[0])
    has_model = re.compile(r"^class Model\b", re.MULTILINE)
    return sorted(
        path.stem for path in folder.glob("*.py") if has_model.search(path.read_text("utf-8"))
    )


NO_KV = {
    "deepseek_v41": "a cache of its own, of compressed groups of tokens",
    "mamba": "recurrent state alone",
    "mamba2": "recurrent state alone",
    "rwkv7": "recurrent state alone",
}
# Before mlx-lm 0.32.2 it writes outside its logits, and the process crashes.
CRASHES = set() if mlx_lm.__version__ >= "0.32.2" else {"phi3small"}
NO_KV = {family: reason for family, reason in NO_KV.items() if family in installed()}
FAMILIES = [family for family in installed() if family not in {*NO_KV, *CRASHES}]


def tiny(name: str, seed: int = 0, **changes):
    """A model of a family, or of a variant ("family: difference"), with random weights."""
    family = name.split(":")[0]
    if family == "olmo":  # it looks whether a package is there, and does not use it
        sys.modules.setdefault("hf_olmo", types.ModuleType("hf_olmo"))
    module = importlib.import_module(f"mlx_lm.models.{family}")
    on_cpu.prepare(family, module)
    own = OWN.get(family, {}) | VARIANTS.get(name, {}) | changes
    config = {"model_type": family, **TINY, **own}
    if "text_config" in module.ModelArgs.__dataclass_fields__:
        config["text_config"] = dict(config)
    mx.random.seed(seed)
    model = module.Model(module.ModelArgs.from_dict(config))
    model.update(tree_map(_drawn, model.parameters()))
    mx.eval(model.parameters())
    return model


def _drawn(weight: mx.array) -> mx.array:
    """A weight that begins at zero (sinks, gates, some norms), drawn too: else it tests nothing."""
    if not mx.issubdtype(weight.dtype, mx.floating) or mx.any(weight):
        return weight
    return (0.3 * mx.random.normal(weight.shape)).astype(weight.dtype)


def prompt(length: int, seed: int) -> list[int]:
    mx.random.seed(seed)
    return mx.random.randint(0, VOCABULARY, (length,)).tolist()


def single(
    model, tokens: list[int], max_tokens: int, chunk: int = 16, cache=None, logprobs=None
) -> list[int]:
    """Greedy tokens through ``generate_step``, the prompt in chunks.

    Args:
        logprobs: A list that takes the log-probabilities of each token.
    """
    steps = GENERATE.generate_step(
        mx.array(tokens), model, max_tokens=max_tokens, prefill_step_size=chunk, prompt_cache=cache
    )
    return _read(steps, logprobs)


def speculative(
    model, draft, tokens, max_tokens: int, num_draft: int = 3, chunk: int = 16, logprobs=None
):
    """Greedy tokens through ``speculative_generate_step``."""
    steps = GENERATE.speculative_generate_step(
        mx.array(tokens),
        model,
        draft,
        max_tokens=max_tokens,
        num_draft_tokens=num_draft,
        prefill_step_size=chunk,
    )
    return _read(steps, logprobs)


def _read(steps, logprobs) -> list[int]:
    tokens = []
    for token, found, *_ in steps:
        tokens.append(int(token))
        if logprobs is not None:
            logprobs.append(found)
    return tokens


def batched(
    model,
    prompts,
    max_tokens,
    late: dict[int, int] | None = None,
    chunk: int = 16,
    caches=None,
    all_tokens=None,
    watch=None,
    logprobs=None,
):
    """Greedy tokens of each prompt through ``BatchGenerator``.

    Args:
        max_tokens: Of each prompt: they leave at different steps.
        late: Prompts that join only after so many steps.
        caches, all_tokens: Of each prompt, as ``insert`` takes them.
        watch: Called after each step.
        logprobs: A list that takes, for each prompt, the log-probabilities of each token.
    """
    late = late or {}
    generator = BatchGenerator(
        model, prefill_step_size=chunk, prefill_batch_size=4, completion_batch_size=8
    )
    waiting = sorted(late, key=late.get)
    now = [i for i in range(len(prompts)) if i not in late]
    index = {}

    def insert(which):
        given = [caches[i] for i in which] if caches else None
        told = [all_tokens[i] for i in which] if all_tokens else None
        uids = generator.insert(
            [prompts[i] for i in which],
            max_tokens=[max_tokens[i] for i in which],
            caches=given,
            all_tokens=told,
        )
        index.update(zip(uids, which))

    insert(now)
    answers = [[] for _ in prompts]
    if logprobs is not None:
        logprobs.extend([] for _ in prompts)
    steps = 0
    while True:
        while waiting and late[waiting[0]] <= steps:
            insert([waiting.pop(0)])
        responses = generator.next_generated()
        if watch is not None:
            watch()
        if not responses and not waiting:
            return answers
        for response in responses:
            answers[index[response.uid]].append(response.token)
            if logprobs is not None:
                logprobs[index[response.uid]].append(response.logprobs)
        steps += 1
