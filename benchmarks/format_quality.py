"""What do formats of pages cost in quality? KL divergence of the next token's distribution from that on
unquantised pages, top tokens and perplexity, of a real model over two texts, by the path that users take.

Each text is read in passes of a few tokens, so that pages are sealed as in use; the second half of
its tokens is scored. mlx-lm's own quantised cache, of the layout of `q8`, stands beside them.
"""

import math
from pathlib import Path

import mlx.core as mx
import numpy as np
import paged_mlx
from mlx_lm.models.cache import QuantizedKVCache
from paged_mlx.mlx_lm import enable
from paged_mlx.mlx_lm.demo import smollm2

from benchmarks.harness import environment, save

ROOT = Path(__file__).parent.parent
TEXTS = {"prose": "docs/design.md", "code": "csrc/plan/planner.cpp"}  # the project's own
TOKENS, SCORED = 1024, 512
PASS, FIRST_PASS = 32, 256  # tokens of a pass, of those that are scored and of those before
PAIRS = [
    ("q8", "q8"),
    ("q8", "q4"),
    ("q4", "q4"),
    ("q8", None),
    ("q4", None),
    (None, "q8"),
    (None, "q4"),
    ("q4", "q8"),
]
MLX_LM = "mlx-lm, 8 bits"
HEADS = "KL median", "KL 99th percentile", "top token equal", "gap of others", "perplexity"


def log_probabilities(model, tokens: list[int], kv_format) -> np.ndarray:
    """Of the next token after each scored one, ``[SCORED - 1, vocabulary]``, float32."""
    if kv_format == MLX_LM:
        return on_cache(model, tokens, [QuantizedKVCache(64, 8) for _ in model.layers])
    with enable(model, kv_format=kv_format, page_size=64) as paged:
        found = on_cache(model, tokens, paged.make_cache())
        assert paged.paged_calls and not paged.gathered_calls  # what was read are the pages
        paged.check()
    return found


def on_cache(model, tokens: list[int], cache: list) -> np.ndarray:
    found = []
    before = range(0, TOKENS - SCORED, FIRST_PASS)
    for start in (*before, *range(TOKENS - SCORED, TOKENS, PASS)):
        count = PASS if start >= TOKENS - SCORED else FIRST_PASS
        logits = model(mx.array([tokens[start : start + count]]), cache=cache)[0]
        logits = logits.astype(mx.float32)
        mx.eval(logits)
        if start >= TOKENS - SCORED:
            found.append(np.array(logits - mx.logsumexp(logits, -1, keepdims=True)))
    return np.concatenate(found)[:-1]


def figures(found: np.ndarray, reference: np.ndarray, tokens: list[int]) -> dict:
    """Of one pair of formats on one text."""
    divergence = (np.exp(reference.astype(np.float64)) * (reference - found)).sum(-1)
    following = np.array(tokens[TOKENS - SCORED + 1 :])
    each = np.arange(len(following))
    told, top = found[each, following], found.argmax(-1)
    # How much more likely the reference's own top token is to it: 0 where they are the same.
    gap = reference.max(-1) - reference[each, top]
    return {
        "kl_median": float(np.median(divergence)),
        "kl_p99": float(np.quantile(divergence, 0.99)),
        "top_equal": float((top == reference.argmax(-1)).mean()),
        "other_top_gaps": sorted(float(x) for x in gap[top != reference.argmax(-1)]),
        "perplexity": math.exp(-told.astype(np.float64).mean()),
    }


def row(pair, text: str, found: dict) -> list[str]:
    gaps = found["other_top_gaps"]
    return [
        pair if pair == MLX_LM else ", ".join(f"`{name or 'dense'}`" for name in pair),
        text,
        f"{found['kl_median']:.5f}",
        f"{found['kl_p99']:.4f}",
        f"{found['top_equal']:.1%}",
        f"{np.median(gaps):.3f}" if gaps else "-",
        f"{found['perplexity']:.3f}",
    ]


def main() -> None:
    begun = environment()  # the commit whose code is loaded
    model, tokenizer = smollm2.load()
    texts = {text: tokenizer.encode((ROOT / file).read_text()) for text, file in TEXTS.items()}
    references, cases = {}, []
    for pair in [(None, None), *PAIRS, MLX_LM]:
        for text, tokens in texts.items():
            assert len(tokens) >= TOKENS, f"{TEXTS[text]} has {len(tokens)} tokens"
            found = log_probabilities(model, tokens[:TOKENS], pair)
            reference = references.setdefault(text, found)
            measured = figures(found, reference, tokens[:TOKENS])
            cases.append({"formats": pair, "text": text, **measured})
            print(*row(pair, text, measured), sep="  ", flush=True)
        save(record(begun, cases))


def record(begun: dict, cases: list[dict]) -> dict:
    rows = [row(case["formats"], case["text"], case) for case in cases]
    return {
        "question": "format_quality",
        **begun,
        "model": "SmolLM2-135M-Instruct, float32, head_dim 64, pages of 64 tokens",
        "backend": paged_mlx.backend().split(":")[0],
        "texts": TEXTS,
        "tokens": TOKENS,
        "scored": SCORED,
        "tokens_of_a_pass": PASS,
        "cases": cases,
        "table": [["K, V", "text", *HEADS], *rows],
    }


if __name__ == "__main__":
    main()
