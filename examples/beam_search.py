"""Beam search by forks: beams share the pages of what they have in common.

    python examples/beam_search.py

The search of the guide (docs/guide.md), with the pages counted that a copy for each beam would
take, and each step's beams checked by contiguous attention.
"""

import mlx.core as mx
from decoder import Decoder
from paged_mlx import PageTable

WIDTH, LENGTH, PROMPT = 4, 10, list(range(3, 24))


def best(beams, logits):
    """The likeliest continuations: (score, tokens, index of the parent)."""
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    scores = mx.array([score for score, *_ in beams])[:, None] + logprobs
    chosen = mx.argsort(-scores.flatten())[:WIDTH].tolist()
    parents = [divmod(index, logits.shape[1]) for index in chosen]
    return [(scores[i, token].item(), [*beams[i][1], token], i) for i, token in parents]


def main():
    model = Decoder()
    pool = model.new_pool(num_pages=64)
    tables = [PageTable(page_size=4)]
    logits = model.step(pool, tables, [PROMPT])
    beams = stock = [(0.0, [], None)]
    for step in range(LENGTH):
        beams = best(beams, logits)
        children = [tables[parent].fork() for *_, parent in beams]  # no bytes move
        for table in tables:  # pages that no child shares become free
            table.release()
        tables = children
        logits = model.step(pool, tables, [tokens[-1:] for _, tokens, _ in beams])

        rows = [model.contiguous(PROMPT + tokens)[-1] for _, tokens, _ in stock]
        stock = best(stock, mx.stack(rows))
        assert [tokens for _, tokens, _ in beams] == [tokens for _, tokens, _ in stock]
        copies = sum(table.num_pages for table in tables)
        print(f"step {step}: {pool.allocator.num_used} pages in use, {copies} without sharing")

    assert pool.allocator.num_used < copies
    pool.check(tables)
    for table in tables:
        table.release()
    assert pool.allocator.num_used == 0
    print(f"best: {beams[0][1]}, log-probability {beams[0][0]:.3f}, as by contiguous attention")


if __name__ == "__main__":
    main()
