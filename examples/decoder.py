"""A transformer of one's own on pages, with random weights: RoPE, grouped heads, SwiGLU.

    python examples/decoder.py

Prompts of different lengths decode in one batch, without padding; each answer is that of the same
weights with attention over contiguous K and V. The other examples use this model.
"""

import mlx.core as mx
import mlx.nn as nn
from paged_mlx import PagePool, PageTable, append_batch


class Block(nn.Module):
    def __init__(self, dims, heads, kv_heads):
        super().__init__()
        self.head_dim = dims // heads
        self.norm1, self.norm2 = nn.RMSNorm(dims), nn.RMSNorm(dims)
        self.q, self.o = (nn.Linear(dims, dims, bias=False) for _ in range(2))
        self.k, self.v = (nn.Linear(dims, kv_heads * self.head_dim, bias=False) for _ in range(2))
        self.up, self.gate = (nn.Linear(dims, 2 * dims, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * dims, dims, bias=False)

    def __call__(self, x, positions, attend):
        h = self.norm1(x)
        q, k, v = (w(h).reshape(len(x), -1, self.head_dim) for w in (self.q, self.k, self.v))
        out = attend(rope(q, positions), rope(k, positions), v)
        x = x + self.o(out.reshape(x.shape))
        h = self.norm2(x)
        return x + self.down(nn.silu(self.gate(h)) * self.up(h))


def rope(x, positions):
    """Rotate [tokens, heads, head_dim] by each token's own position."""
    options = {"traditional": False, "base": 10000.0, "scale": 1.0, "offset": positions}
    return mx.fast.rope(x[:, :, None], x.shape[-1], **options)[:, :, 0]


class Decoder(nn.Module):
    def __init__(self, num_layers=2, vocabulary=64, dims=32, heads=4, kv_heads=2, seed=0):
        super().__init__()
        mx.random.seed(seed)
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, dims // heads
        self.embedding = nn.Embedding(vocabulary, dims)
        self.layers = [Block(dims, heads, kv_heads) for _ in range(num_layers)]
        self.norm, self.head = nn.RMSNorm(dims), nn.Linear(dims, vocabulary, bias=False)

    def __call__(self, tokens, positions, attend):
        """Logits after each of the packed tokens; ``attend(layer, q, k, v)`` is the attention."""
        x = self.embedding(mx.array(tokens))
        for i, layer in enumerate(self.layers):
            x = layer(x, positions, lambda *qkv, i=i: attend(i, *qkv))
        return self.head(self.norm(x))

    def new_pool(self, num_pages, page_size=4):
        shape = len(self.layers), num_pages, page_size, self.kv_heads, self.head_dim
        return PagePool(*shape, dtype=mx.float32)

    def step(self, pool, tables, new_tokens):
        """Logits of each sequence's next token; its new tokens are written to its pages."""
        counts = [len(tokens) for tokens in new_tokens]
        slots = append_batch(tables, counts, pool.allocator).slots
        plan = pool.plan(tables, num_q_heads=self.heads, query_lens=counts)  # for all layers

        def attend(layer, q, k, v):
            pool[layer].write(k, v, slots)
            return pool[layer].attend(q, plan)

        starts = [len(table) - count for table, count in zip(tables, counts)]
        positions = mx.concatenate([mx.arange(s, s + n) for s, n in zip(starts, counts)])
        last = mx.cumsum(mx.array(counts)) - 1  # the row of each sequence's last token
        return self([token for tokens in new_tokens for token in tokens], positions, attend)[last]

    def contiguous(self, tokens):
        """Logits after each token of one sequence, by ``mx.fast``: what pages must give too."""

        def attend(layer, q, k, v):
            q, k, v = (a.swapaxes(0, 1)[None] for a in (q, k, v))
            scale = self.head_dim**-0.5
            out = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask="causal")
            return out[0].swapaxes(0, 1)

        return self(tokens, mx.arange(len(tokens)), attend)


def greedy(model, prompt, length):
    """The answer of one prompt by contiguous attention, everything computed again each step."""
    tokens = list(prompt)
    for _ in range(length):
        tokens.append(mx.argmax(model.contiguous(tokens)[-1]).item())
    return tokens[len(prompt) :]


def main():
    model, prompts = Decoder(), [[5, 7, 11], [2, 3, 5, 7, 11, 13, 17, 19, 23], [1]]
    pool = model.new_pool(num_pages=32)
    tables = [PageTable(page_size=4) for _ in prompts]
    answers, new_tokens = [[] for _ in prompts], prompts
    for _ in range(8):
        tokens = mx.argmax(model.step(pool, tables, new_tokens), axis=-1).tolist()
        new_tokens = [[token] for token in tokens]
        for answer, token in zip(answers, tokens):
            answer.append(token)
    for prompt, answer, table in zip(prompts, answers, tables):
        print(f"{len(prompt)} tokens -> {answer} in pages {table.page_ids}")
        assert answer == greedy(model, prompt, 8)
    print("the same tokens as by contiguous attention")


if __name__ == "__main__":
    main()
