"""Bytes of K and V that batches of mlx-lm hold, on pages and on mlx-lm's own caches.

The prompts of a batch are read in chunks and answered together, answers long enough for all to be
there at once. Counted after every step, the most that was held: the pages in use, the whole of a
pool that grows on demand, or the arrays of mlx-lm's caches. The ideal is the K and V of all
tokens in the batch and nothing else.
"""

from itertools import chain

import mlx.core as mx
import numpy as np
import paged_mlx
from mlx_lm.generate import BatchGenerator
from mlx_lm.models import llama
from paged_mlx._native import _ext

from benchmarks.harness import environment, save

LAYERS, KV_HEADS, HEAD_DIM, VOCABULARY = 2, 8, 64, 100
BYTES_PER_TOKEN = 2 * LAYERS * KV_HEADS * HEAD_DIM * 4
PAGE_SIZE = 16
CHUNK = 256
ANSWER = 24  # the longest prompt takes 16 chunks
BATCHES = {
    "2000, 700, 120 and 15": (2000, 700, 120, 15),
    "8 x 512": (512,) * 8,
    "4000 and 7 x 30": (4000, *[30] * 7),
}
STEPS = 1000


def make_model():
    mx.random.seed(0)
    arguments = llama.ModelArgs(
        model_type="llama",
        hidden_size=64,
        num_hidden_layers=LAYERS,
        intermediate_size=64,
        num_attention_heads=KV_HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        rms_norm_eps=1e-5,
        vocab_size=VOCABULARY,
    )
    model = llama.Model(arguments)
    mx.eval(model.parameters())
    return model


def prompts(lengths) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, VOCABULARY, length).tolist() for length in lengths]


def caches(generator) -> list:
    return [*generator._prompt_batch.prompt_cache, *generator._generation_batch.prompt_cache]


def run_batch(model, lengths, held) -> tuple[list[int], int]:
    """Answer prompts together; return all tokens, and the most that was held."""
    generator = BatchGenerator(model, max_tokens=ANSWER, prefill_step_size=CHUNK)
    generator.insert(prompts(lengths))
    tokens, most = [], 0
    while responses := generator.next_generated():
        most = max(most, held(generator))
        tokens += [response.token for response in responses]
    return tokens, most


def batch_case(name, lengths) -> dict:
    model = make_model()

    def of_tokens(generator):
        batches = generator._prompt_batch, generator._generation_batch
        return sum(len(tokens) for batch in batches for tokens in batch.tokens) * BYTES_PER_TOKEN

    def of_stock(generator):
        return sum(cache.nbytes for cache in caches(generator))

    expected, ideal = run_batch(model, lengths, of_tokens)
    _, stock = run_batch(model, lengths, of_stock)
    figures = {"ideal": ideal}
    with paged_mlx.enable(model, page_size=PAGE_SIZE) as paged:
        for kind, held in (
            ("pages in use", lambda _: paged.nbytes_used),
            ("growing pool", lambda _: paged.nbytes),
        ):
            tokens, figures[f"paged, {kind}"] = run_batch(model, lengths, held)
            assert tokens == expected, "the tokens differ from stock's"
        assert paged.gathered_calls == {}
    return as_case(name, "MB", {**figures, "stock": stock})


def churn(model, steps, before, after) -> int:
    """Joins every third step, leaves when answers end; count steps in which K or V moved."""
    rng = np.random.default_rng(1)
    generator = BatchGenerator(model, prefill_batch_size=4, completion_batch_size=8)
    moved = 0
    for step in range(steps):
        if step % 3 == 0:
            length, limit = int(rng.integers(5, 60)), int(rng.integers(3, 40))
            generator.insert(prompts([length]), max_tokens=[limit])
        state = before(generator)
        generator.next()
        moved += after(generator, state)
    return moved


def churn_case() -> dict:
    model = make_model()

    def shapes(generator):
        return [cache.keys.shape for cache in caches(generator) if cache.keys is not None]

    stock = churn(model, STEPS, shapes, lambda generator, before: shapes(generator) != before)
    with paged_mlx.enable(model, page_size=PAGE_SIZE, num_pages=512) as paged:
        churn(model, 100, lambda _: None, lambda *_: 0)
        (pool,) = paged.groups[None].pools

        def memory(_=None):
            mx.eval(pool.state)
            return (
                [_ext.data_address(x) for x in chain(*pool.state)],
                paged.nbytes,
                _ext.buffer_copies(),
            )

        ours = churn(model, STEPS, memory, lambda _, before: memory() != before)
        assert paged.gathered_calls == {}
    return as_case(f"joins and leaves, {STEPS} steps", "steps", {"paged": ours, "stock": stock})


def as_case(name, unit, figures) -> dict:
    candidates = [{"name": key, "median": value, "limit": False} for key, value in figures.items()]
    return {"name": name, "about": {"figure": unit}, "candidates": candidates}


def main():
    record = {"question": "mlx_lm_memory", **environment(), "cases": []}
    for name, lengths in BATCHES.items():
        record["cases"].append(batch_case(name, lengths))
    record["cases"].append(churn_case())
    for case in record["cases"]:
        print(case["name"])
        for candidate in case["candidates"]:
            print(f"  {candidate['name']:<28} {candidate['median']:>14,} {case['about']['figure']}")
    save(record)


if __name__ == "__main__":
    main()
