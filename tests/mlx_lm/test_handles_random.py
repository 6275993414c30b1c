"""Handles kept, dropped and read at random times: each is what it was when it was made."""

import random

import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: pip install mlx-lm")

import mlx.core as mx  # noqa: E402
import mlx_lm_zoo as zoo  # noqa: E402
import numpy as np  # noqa: E402
from paged_mlx.mlx_lm import enable  # noqa: E402

HEADS, Q_HEADS, DIM = 2, 4, 8


class Life:
    """Random sequences of one model, and what every array that was handed out must hold."""

    def __init__(self, paged, seed: int):
        self.paged = paged
        self.random = random.Random(seed)
        self.numbers = np.random.default_rng(seed)
        self.alive = []  # (prompt cache, tokens of each row and layer [2, heads, tokens, dim])
        self.owed = []  # (array, what it must hold)

    def tokens(self, batch: int, n: int) -> np.ndarray:
        return self.numbers.standard_normal((2, batch, HEADS, n, DIM)).astype(np.float32)

    def begin(self):
        cache = self.paged.make_cache()
        self.alive.append((cache, [[np.zeros((2, HEADS, 0, DIM), np.float32) for _ in cache]]))

    def step(self):
        """One pass; each layer's K and V go to attention, elsewhere, to both or nowhere."""
        cache, rows = self.random.choice(self.alive)
        n = self.random.choice((1, 1, 1, 2, 5)) if len(rows) == 1 else 1
        for i, layer in enumerate(cache):
            mask = layer.make_mask(n)
            new = self.tokens(len(rows), n)
            begin = [row[i].shape[2] for row in rows]
            for b, row in enumerate(rows):
                row[i] = np.concatenate([row[i], new[:, b]], axis=2)
            k, v = layer.update_and_fetch(*map(strided, new))
            held = [row[i] for row in rows]
            if self.random.random() < 0.4:
                self.keep(k, v, layer, held, begin)
            if self.random.random() < 0.7:
                self.attend(k, v, layer, mask, held, n)
            if self.random.random() < 0.4:
                self.keep(k, v, layer, held, begin)
            if self.random.random() < 0.2:
                self.attend(k, v, layer, mask, held, n)
            if self.random.random() < 0.1:
                self.keep(*layer.keys_and_values(), layer, held, begin)

    def keep(self, k, v, layer, held, begin):
        """K or V as it is, or an operation on it that has not run."""
        side = self.random.randrange(2)
        x = (k, v)[side]
        for b, row in enumerate(held):
            part = x if self.random.random() < 0.5 else x * 1
            seen = 0  # positions before it no token of the step can see
            if layer.group.window is not None:
                seen = max(0, begin[b] - layer.group.window + 1)
            wanted = row[side][:, seen:]
            column = 0
            if layer.batched:  # as mlx-lm's: the newest tokens of all rows in the last columns
                column = seen + max(begin) - begin[b] - layer.step.first_column
            self.owed.append((part, (b, slice(column, column + wanted.shape[1])), wanted))
            if self.random.random() < 0.3:
                mx.async_eval(part)

    def attend(self, k, v, layer, mask, held, n):
        q = self.numbers.standard_normal((len(held), Q_HEADS, n, DIM)).astype(np.float32)
        out = mx.fast.scaled_dot_product_attention(strided(q), k, v, scale=0.5, mask=mask)
        for b, row in enumerate(held):
            wanted = attention(q[b], *row, layer.group.window)
            self.owed.append((out, (b, slice(None)), wanted))

    def read(self):
        if self.owed:
            array, (b, columns), wanted = self.owed.pop(self.random.randrange(len(self.owed)))
            np.testing.assert_allclose(np.array(array)[b, :, columns], wanted, atol=2e-5)

    def forget(self):
        """Drop an array that nobody has read."""
        if self.owed:
            del self.owed[self.random.randrange(len(self.owed))]

    def end(self):
        if self.alive:
            del self.alive[self.random.randrange(len(self.alive))]

    def fork(self):
        cache, rows = self.random.choice(self.alive)
        self.alive.append((self.paged.fork(cache, 1)[0], [list(row) for row in rows]))

    def merge(self):
        chosen = self.random.sample(self.alive, min(3, len(self.alive)))
        rows = [list(row) for _, rows in chosen for row in rows]
        caches = [layers[0].merge(list(layers)) for layers in zip(*(cache for cache, _ in chosen))]
        self.alive.append((caches, rows))

    def trim(self):
        cache, rows = self.random.choice(self.alive)
        n = self.random.randrange(1, 4)
        if min(row[0].shape[2] for row in rows) < n:
            return
        try:
            cache[0].trim(n)  # the first layer has a window if any has
        except ValueError:
            return
        for layer in cache[1:]:
            assert layer.trim(n) == n
        for row in rows:
            row[:] = [layer[:, :, : layer.shape[2] - n] for layer in row]

    def look(self):
        """What mlx-lm does between prompt chunks."""
        cache, _ = self.random.choice(self.alive)
        mx.eval([layer.state for layer in cache])

    def live(self, num_events: int):
        events = [
            (self.step, 10), (self.read, 6), (self.forget, 3), (self.begin, 1), (self.end, 1.5),
            (self.fork, 1), (self.merge, 0.7), (self.trim, 1.5), (self.look, 1),
        ]  # fmt: skip
        names, weights = zip(*events)
        for _ in range(num_events):
            if not self.alive:
                self.begin()
            self.random.choices(names, weights)[0]()
        while self.owed:
            self.read()
        self.alive.clear()
        self.paged.check()
        assert [group.pages_used for group in self.paged.groups.values()] == [0] * len(
            self.paged.groups
        )


def strided(x: np.ndarray) -> mx.array:
    """``[batch, heads, tokens, dim]`` as models have it: transposed, and not evaluated."""
    return mx.array(np.ascontiguousarray(x.swapaxes(1, 2))).transpose(0, 2, 1, 3) * 1


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, window: int | None) -> np.ndarray:
    """Of the newest tokens of one sequence; q ``[q_heads, n, dim]``, k ``[heads, tokens, dim]``."""
    n, total = q.shape[1], k.shape[1]
    k, v = (np.repeat(x.astype(np.float64), Q_HEADS // HEADS, axis=0) for x in (k, v))
    scores = 0.5 * q @ k.swapaxes(1, 2)
    behind = (total - n + np.arange(n))[:, None] - np.arange(total)
    hidden = (behind < 0) if window is None else (behind < 0) | (behind >= window)
    scores[:, hidden] = -np.inf
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True) @ v


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("seed", range(12))
def test_every_array_holds_what_it_held_when_it_was_made(family, seed):
    changes = {"sliding_window": 6} if family == "gemma3_text" else {}
    model = zoo.tiny(family, **changes)
    with enable(model, page_size=4, retain=4) as paged:
        Life(paged, seed).live(160)
        assert paged.paged_calls > 0
