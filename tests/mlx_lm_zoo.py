"""Tiny random models of mlx-lm's families, and greedy generation through mlx-lm."""

import importlib

import mlx.core as mx
from mlx_lm.generate import BatchGenerator, generate_step, speculative_generate_step

VOCABULARY = 97
WINDOW = 24

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "norm_eps": 1e-5,
    "layer_norm_eps": 1e-5,
    "layer_norm_epsilon": 1e-5,
    "layer_norm_bias": False,
    "vocab_size": VOCABULARY,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}

FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "phi3": {},
    "phi": {"partial_rotary_factor": 0.5},
    "gpt_neox": {"rotary_pct": 0.5, "rotary_emb_base": 10000, "use_parallel_residual": True},
    "cohere": {"logit_scale": 0.1, "layer_norm_eps": 1e-5},
    "cohere2": {"sliding_window": WINDOW, "sliding_window_pattern": 3, "logit_scale": 0.1},
    "gemma": {},
    "gemma3_text": {
        "sliding_window": WINDOW,
        "sliding_window_pattern": 3,
        "query_pre_attn_scalar": 8,
    },
    "gpt_oss": {
        "sliding_window": WINDOW,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "mixtral": {"num_local_experts": 2, "num_experts_per_tok": 1},
    "olmo2": {},
    "starcoder2": {},
    "stablelm": {"partial_rotary_factor": 0.5, "use_qkv_bias": True},
}

# Fields of configurations that many families have; from_dict takes those it knows.
COMMON = {
    "attention_bias": False,
    "attention_multiplier": 0.35,
    "attn_logit_softcapping": 50.0,
    "block_auto_adjust_ff_dim": True,
    "block_dim": 32,
    "block_ff_dim": 48,
    "block_ffn_dim_multiplier": 1.0,
    "block_multiple_of": 8,
    "conv_L_cache": 3,
    "conv_bias": False,
    "decoder_sparse_step": 1,
    "dim_model_base": 32,
    "embedding_multiplier": 1.0,
    "final_logit_softcapping": 30.0,
    "first_k_dense_replace": 1,
    "full_attention_interval": 3,
    "full_attn_idxs": [1],
    "hidden_act": "silu",
    "kv_lora_rank": 16,
    "layer_types": None,
    "linear_conv_kernel_dim": 3,
    "linear_key_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_value_head_dim": 8,
    "logits_scaling": 1.0,
    "mlp_bias": False,
    "mlp_only_layers": [],
    "moe_intermediate_size": 16,
    "moe_layer_freq": 1,
    "n_ctx": 512,
    "n_embd": 32,
    "n_group": 1,
    "n_head": 4,
    "n_layer": 3,
    "n_positions": 512,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_layers": 3,
    "num_local_experts": 2,
    "num_shared_experts": 1,
    "partial_rotary_factor": 0.5,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "query_pre_attn_scalar": 8,
    "residual_multiplier": 1.0,
    "rope_scaling": None,
    "rotary_dim": 8,
    "routed_scaling_factor": 1.0,
    "scale_depth": 1.0,
    "scale_emb": 1.0,
    "scoring_func": "sigmoid",
    "shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "use_bias": False,
    "use_qk_norm": True,
    "v_head_dim": 8,
}

MORE = (
    "Klear",
    "bailing_moe",
    "deepseek",
    "deepseek_v3",
    "dots1",
    "ernie4_5",
    "exaone",
    "gear",
    "glm",
    "glm4",
    "gpt2",
    "granite",
    "granitemoe",
    "helium",
    "internlm2",
    "internlm3",
    "lfm2",
    "mimo",
    "minicpm",
    "minimax",
    "nanochat",
    "nemotron",
    "olmoe",
    "phimoe",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_next",
    "seed_oss",
    "smollm3",
    "solar_open",
    "youtu_llm",
)


def tiny(family: str, seed: int = 0, **changes):
    """A model of ``family`` with random weights large enough that tokens differ."""
    module = importlib.import_module(f"mlx_lm.models.{family}")
    own = FAMILIES[family] if family in FAMILIES else COMMON
    config = {"model_type": family, **SMALL, **own, **changes}
    mx.random.seed(seed)
    model = module.Model(module.ModelArgs.from_dict(config))
    mx.eval(model.parameters())
    return model


def prompt(length: int, seed: int) -> list[int]:
    mx.random.seed(seed)
    return mx.random.randint(0, VOCABULARY, (length,)).tolist()


def single(model, tokens: list[int], max_tokens: int, chunk: int = 16, cache=None) -> list[int]:
    """Greedy tokens through ``generate_step``, the prompt in chunks."""
    steps = generate_step(
        mx.array(tokens), model, max_tokens=max_tokens, prefill_step_size=chunk, prompt_cache=cache
    )
    return [int(token) for token, _ in steps]


def speculative(model, draft, tokens, max_tokens: int, num_draft: int = 3, chunk: int = 16):
    """Greedy tokens through ``speculative_generate_step``."""
    steps = speculative_generate_step(
        mx.array(tokens),
        model,
        draft,
        max_tokens=max_tokens,
        num_draft_tokens=num_draft,
        prefill_step_size=chunk,
    )
    return [int(token) for token, _, _ in steps]


def batched(
    model,
    prompts,
    max_tokens,
    late: dict[int, int] | None = None,
    chunk: int = 16,
    caches=None,
    all_tokens=None,
    watch=None,
):
    """Greedy tokens of each prompt through ``BatchGenerator``.

    Args:
        max_tokens: Of each prompt: they leave at different steps.
        late: Prompts that join only after so many steps.
        caches, all_tokens: Of each prompt, as ``insert`` takes them.
        watch: Called after each step.
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
        steps += 1
