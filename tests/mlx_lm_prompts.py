"""What tests of prompts share: tokens counted as they are computed, text, models with states."""

import importlib

import mlx.core as mx
import mlx_lm_zoo as zoo


def count_tokens(monkeypatch, *families) -> list[int]:
    """A list that grows by the number of tokens, padding too, of each pass of a model."""
    counts = []
    for family in families:
        model = importlib.import_module(f"mlx_lm.models.{family}").Model

        def counted(self, inputs, *args, before=model.__call__, **options):
            counts.append(inputs.size)
            return before(self, inputs, *args, **options)

        monkeypatch.setattr(model, "__call__", counted)
    return counts


CHAT = """{% for message in messages %}{{ message.role[0] }}:{{ message.content }}
{% endfor %}{% if add_generation_prompt %}a:{% endif %}"""


def tokenizer():
    """A tokenizer of single characters, as mlx-lm wraps it; its last token ends a text."""
    from mlx_lm.tokenizer_utils import TokenizerWrapper
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = [chr(code) for code in range(32, 127)] + ["\n", "<end>"]
    plain = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="?"))
    plain.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    plain.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<end>", chat_template=CHAT)
    return TokenizerWrapper(fast)


# Models that mix attention with recurrent states. Behind jamba's and recurrent_gemma's
# right padding in a batch the states of mlx-lm are wrong.
HYBRIDS = {
    "qwen3_next": {},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "full_attn_idxs": None},
    "falcon_h1": {
        "attention_in_multiplier": 1.0,
        "attention_out_multiplier": 1.0,
        "key_multiplier": 1.0,
        "lm_head_multiplier": 1.0,
        "mamba_chunk_size": 8,
        "mamba_conv_bias": True,
        "mamba_d_conv": 4,
        "mamba_d_head": 8,
        "mamba_d_ssm": 32,
        "mamba_d_state": 8,
        "mamba_expand": 2,
        "mamba_n_groups": 1,
        "mamba_n_heads": 4,
        "mamba_norm_before_gate": False,
        "mamba_proj_bias": False,
        "mamba_rms_norm": True,
        "mamba_use_mlp": True,
        "mlp_multipliers": [1.0, 1.0],
        "projectors_bias": False,
        "ssm_in_multiplier": 1.0,
        "ssm_multipliers": [1.0] * 5,
        "ssm_out_multiplier": 1.0,
    },
    "jamba": {
        "attn_layer_offset": 1,
        "attn_layer_period": 3,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "mamba_d_conv": 4,
        "mamba_d_state": 8,
        "mamba_expand": 2,
    },
    "recurrent_gemma": {
        "conv1d_width": 4,
        "logits_soft_cap": 30.0,
        "attention_window_size": zoo.WINDOW,
        "block_types": ["recurrent", "attention", "recurrent"],
    },
}


def hybrid(family: str, **changes):
    """A tiny model of a family in HYBRIDS."""
    module = importlib.import_module(f"mlx_lm.models.{family}")
    config = {"model_type": family, **zoo.SMALL, **zoo.COMMON, **HYBRIDS[family], **changes}
    mx.random.seed(0)
    model = module.Model(module.ModelArgs.from_dict(config))
    mx.eval(model.parameters())
    return model
