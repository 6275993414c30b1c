"""What tests of prompts share: tokens counted as they are computed, text, models with states."""

import importlib

import mlx_lm


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


# Models that mix attention with recurrent states, and those of them whose states, in mlx-lm,
# go on into the padding of a batch and are wrong.
HYBRIDS = ("qwen3_next", "lfm2", "falcon_h1", "jamba", "recurrent_gemma")
LATER = mlx_lm.__version__ >= "0.32"
PADDED = ("jamba", "recurrent_gemma") if LATER else tuple(set(HYBRIDS) - {"lfm2"})
