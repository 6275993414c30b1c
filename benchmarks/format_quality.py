"""What do formats of pages cost in quality? KL divergence of the next token's distribution from that on
unquantised pages, top tokens and perplexity, of a real model over two texts, by the path that users take.

Each text is read in passes of a few tokens, so that pages are sealed as in use; the second half of
its tokens is scored.
"""

import json
import math
from pathlib import Path

import mlx.core as mx
import numpy as np
import paged_mlx
from paged_mlx.mlx_lm import enable
from paged_mlx.mlx_lm.demo import smollm2

from benchmarks.harness import RESULTS, environment

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
HEADS = "KL median", "KL 99th percentile", "top token equal", "perplexity"


def log_probabilities(model, tokens: list[int], kv_format) -> np.ndarray:
    """Of the next token after each scored one, ``[SCORED - 1, vocabulary]``, float32."""
    found = []
    with enable(model, kv_format=kv_format, page_size=64) as paged:
        cache = paged.make_cache()
        before = range(0, TOKENS - SCORED, FIRST_PASS)
        for start in (*before, *range(TOKENS - SCORED, TOKENS, PASS)):
            count = PASS if start >= TOKENS - SCORED else FIRST_PASS
            logits = model(mx.array([tokens[start : start + count]]), cache=cache)[0]
            logits = logits.astype(mx.float32)
            mx.eval(logits)
            if start >= TOKENS - SCORED:
                found.append(np.array(logits - mx.logsumexp(logits, -1, keepdims=True)))
        assert paged.paged_calls and not paged.gathered_calls  # what was read are the pages
        paged.check()
    return np.concatenate(found)[:-1]


def figures(found: np.ndarray, reference: np.ndarray, tokens: list[int]) -> dict:
    """Of one pair of formats on one text."""
    divergence = (np.exp(reference.astype(np.float64)) * (reference - found)).sum(-1)
    following = np.array(tokens[TOKENS - SCORED + 1 :])
    told = found[np.arange(len(following)), following]
    return {
        "kl_median": float(np.median(divergence)),
        "kl_p99": float(np.quantile(divergence, 0.99)),
        "top_equal": float((found.argmax(-1) == reference.argmax(-1)).mean()),
        "perplexity": math.exp(-told.astype(np.float64).mean()),
    }


def row(pair, text: str, found: dict) -> list[str]:
    names = (name or "dense" for name in pair)
    return [
        ", ".join(f"`{name}`" for name in names),
        text,
        f"{found['kl_median']:.5f}",
        f"{found['kl_p99']:.4f}",
        f"{found['top_equal']:.1%}",
        f"{found['perplexity']:.3f}",
    ]


def main() -> None:
    model, tokenizer = smollm2.load()
    texts = {text: tokenizer.encode((ROOT / file).read_text()) for text, file in TEXTS.items()}
    references, cases = {}, []
    for pair in [(None, None), *PAIRS]:
        for text, tokens in texts.items():
            assert len(tokens) >= TOKENS, f"{TEXTS[text]} has {len(tokens)} tokens"
            found = log_probabilities(model, tokens[:TOKENS], pair)
            reference = references.setdefault(text, found)
            measured = figures(found, reference, tokens[:TOKENS])
            cases.append({"k": pair[0], "v": pair[1], "text": text, **measured})
            print(*row(pair, text, measured), sep="  ", flush=True)
        save(cases)


def save(cases: list[dict]) -> None:
    rows = [row((case["k"], case["v"]), case["text"], case) for case in cases]
    record = {
        "question": "format_quality",
        **environment(),
        "model": "SmolLM2-135M-Instruct, float32, head_dim 64, pages of 64 tokens",
        "backend": paged_mlx.backend().split(":")[0],
        "texts": TEXTS,
        "tokens": TOKENS,
        "scored": SCORED,
        "tokens_of_a_pass": PASS,
        "cases": cases,
        "table": [["K, V", "text", *HEADS], *rows],
    }
    (RESULTS / "format_quality.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
