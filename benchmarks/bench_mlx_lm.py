"""What does the adapter to mlx-lm cost in Python? Building the graph of a decode step, not running it.

A layer is what attention of every model does with its cache: ``update_and_fetch``, then
``mx.fast.scaled_dot_product_attention``. By CPU time.
"""

import mlx.core as mx
from mlx_lm.models import llama
from mlx_lm.models.cache import KVCache
from paged_mlx.mlx_lm import enable

from benchmarks.harness import Candidate, Case, ratio, run

LAYERS, Q_HEADS, KV_HEADS, DIM, CONTEXT, CALLS = 32, 8, 2, 64, 200, 1000
STOCK_ATTENTION = mx.fast.scaled_dot_product_attention


def model():
    """One with as many layers; only its caches are used."""
    return llama.Model(
        llama.ModelArgs(
            model_type="llama",
            hidden_size=Q_HEADS * DIM,
            num_hidden_layers=LAYERS,
            intermediate_size=8,
            num_attention_heads=Q_HEADS,
            num_key_value_heads=KV_HEADS,
            head_dim=DIM,
            rms_norm_eps=1e-5,
            vocab_size=8,
        )
    )


def tokens(batch, heads, n, seed):
    x = mx.random.normal((batch, heads, n, DIM), key=mx.random.key(seed))
    mx.eval(x)
    return x


class Decode:
    """A batch that decodes; ``first`` and ``rest`` build a step's graph, ``finish`` runs it."""

    def __init__(self, make_cache, attention, batch: int):
        self.attention = attention
        self.q, self.k, self.v = (
            tokens(batch, heads, 1, seed)
            for seed, heads in enumerate((Q_HEADS, KV_HEADS, KV_HEADS))
        )
        prompt = [tokens(1, heads, CONTEXT, 5) for heads in (Q_HEADS, KV_HEADS, KV_HEADS)]
        rows = [make_cache() for _ in range(batch)]
        for row in rows:
            mx.eval([self.layer(cache, *prompt, "causal") for cache in row])
        self.caches = rows[0]
        if batch > 1:
            self.caches = [layers[0].merge(list(layers)) for layers in zip(*rows)]
        self.mask, self.outs = None, []

    def layer(self, cache, q, k, v, mask):
        keys, values = cache.update_and_fetch(k, v)
        return self.attention(q, keys, values, scale=0.1, mask=mask)

    def first(self):
        self.mask = self.caches[0].make_mask(1) if len(self.q) > 1 else None
        self.outs = [self.layer(self.caches[0], self.q, self.k, self.v, self.mask)]

    def rest(self):
        for cache in self.caches[1:]:
            self.outs.append(self.layer(cache, self.q, self.k, self.v, self.mask))
        return self.outs

    def whole(self):
        self.first()
        return self.rest()

    def finish(self):
        mx.eval(self.outs)


def same(outputs: dict) -> None:
    ours, stock = outputs.values()
    assert all(mx.allclose(a, b, atol=1e-4) for a, b in zip(ours, stock)), "they disagree"


def decode_cases(paged, batch, rounds=100):
    def stock_cache():
        return [KVCache() for _ in range(LAYERS)]

    ours = Decode(paged.make_cache, mx.fast.scaled_dot_product_attention, batch)
    stock = Decode(stock_cache, STOCK_ATTENTION, batch)
    both = (("paged", ours), ("mlx-lm", stock))
    rest = [Candidate(name, d.rest, before=d.first, after=d.finish) for name, d in both]
    whole = [Candidate(name, d.whole, after=d.finish) for name, d in both]
    for name, candidates, layers in (
        ("a layer after the first", rest, LAYERS - 1),
        ("a whole step, its metadata included", whole, LAYERS),
    ):
        about = {"unit": "layer", "units": layers}
        yield Case(f"{name}, batch {batch}", candidates, same, rounds, 2, "cpu", about)


def foreign_case(rounds=40):
    """Calls that have nothing to do with pages."""
    q, k = tokens(1, Q_HEADS, 1, 1), tokens(1, KV_HEADS, CONTEXT, 2)

    def calls(attention):
        def run():
            for _ in range(CALLS):
                out = attention(q, k, k, scale=0.1)
            return [out]

        return run

    candidates = [
        Candidate("through the hook", calls(mx.fast.scaled_dot_product_attention)),
        Candidate("mx.fast alone", calls(STOCK_ATTENTION)),
    ]
    about = {"unit": "call", "units": CALLS}
    return Case("attention that is not ours", candidates, same, rounds, 2, "cpu", about)


def main():
    with enable(model()) as paged:
        cases = [*decode_cases(paged, 1), *decode_cases(paged, 8), foreign_case()]
        record = run("mlx_lm", cases)
        assert paged.gathered_calls == {} and paged.paged_calls > 0
    *steps, foreign = record["cases"]
    for result in steps:
        print(f"{result['name']:<48} {ratio(result, 'paged', 'mlx-lm'):.2f}x mlx-lm's time")
    hooked, alone = (c["median"] / CALLS * 1e6 for c in foreign["candidates"])
    print(f"the hook adds {hooked - alone:.2f} us to a call of {alone:.2f} us that is not ours")


if __name__ == "__main__":
    main()
