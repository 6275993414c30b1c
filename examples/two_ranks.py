"""Two ranks of mx.distributed: a sharded model on pages, each rank with those of its own heads.

    mlx.launch -n 2 python examples/two_ranks.py

Prompts that begin alike share pages on both ranks, which agree on how much of a prompt is known.
Every rank also computes the answers with the whole model and mlx-lm's own caches, and compares.
Needs mlx-lm; docs/ranks.md tells more.
"""

import mlx.core as mx
from prefix_reuse import SYSTEM, Server, answer, tiny_llama

PROMPTS = [SYSTEM + [i, i + 1, i + 2] for i in (3, 50, 90)]


def main():
    group = mx.distributed.init()
    whole = [answer(tiny_llama(), prompt) for prompt in PROMPTS]

    model = tiny_llama()  # of the same seed on all ranks
    model.shard(group)
    server = Server(model)  # ``begin`` and ``remember`` are called on every rank
    answers, known = zip(*[server.complete(prompt, "tenant") for prompt in PROMPTS])
    server.paged.check()

    assert list(answers) == whole
    assert known == (0, len(SYSTEM), len(SYSTEM))
    heads = f"{model.layers[0].self_attn.n_kv_heads} of 2 KV heads"
    known = f"{sum(known)} tokens known"
    print(f"rank {group.rank()} of {group.size()}: {heads}, {known}, answers of one machine")
    mx.eval(mx.distributed.all_sum(mx.array(1)))  # no rank leaves while others wait for it


if __name__ == "__main__":
    main()
