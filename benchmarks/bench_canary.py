"""What does a canary cost? A decode step of 256 sequences through a stack of layers, on and off.

The stack has the attention of a small model, and nothing of its projections, so that the
canary's share of a whole step is less than what is shown.
"""

import mlx.core as mx
import numpy as np
from paged_mlx import BlockTable, PageAllocator, PagePool, PageTable, append_batch, fast

from benchmarks.harness import Candidate, Case, run

LAYERS, Q_HEADS, KV_HEADS, DIM, PAGE = 30, 9, 3, 64, 16
BATCH, CONTEXT = 256, 200


class Stack:
    """A pool, its tables and one decode step over all layers.

    With and without the canary the same pages are read: where arrays lie changes the time
    of a step by more than a canary does.
    """

    def __init__(self):
        pages = BATCH * -(-(CONTEXT + 1) // PAGE)
        self.allocator = PageAllocator(pages, PAGE)
        self.pool = PagePool(
            LAYERS, pages, PAGE, KV_HEADS, DIM, allocator=self.allocator, canary=True
        )
        self.tables = [PageTable(PAGE) for _ in range(BATCH)]
        self.packer = BlockTable()
        self.q = mx.random.normal((BATCH, Q_HEADS, DIM), key=mx.random.key(0)).astype(mx.float16)
        self.append(CONTEXT)
        self.canary, self.hashes = self.pool.canary, [table.token_hash for table in self.tables]

    def append(self, count: int):
        """Append ``count`` tokens to every sequence and write them in every layer."""
        slots = append_batch(self.tables, [count] * BATCH, self.allocator).slots
        if self.pool.canary is not None:
            self.pool.canary.note(self.tables, [[1] * count] * BATCH, slots)
        rows = mx.full((len(slots), KV_HEADS, DIM), 0.5, mx.float16)
        mapping = self.pool.slots(slots)
        for layer in range(LAYERS):
            self.pool.write(layer, rows, rows, mapping)
        mx.eval(self.pool.state)

    def step(self, watched: bool) -> np.ndarray:
        """One token for every sequence, forgotten afterwards."""
        pool, canary = self.pool, self.canary if watched else None
        pool.canary = canary
        for table, token_hash in zip(self.tables, self.hashes):
            table.token_hash = token_hash if watched else None
        slots = append_batch(self.tables, [1] * BATCH, self.allocator).slots
        if canary is not None:
            canary.note(self.tables, [[1]] * BATCH, slots)
        packed = self.packer.update(self.tables)
        plan = fast.plan(
            packed.block_tables,
            packed.context_lens,
            num_q_heads=Q_HEADS,
            num_kv_heads=KV_HEADS,
            page_size=PAGE,
            num_pages=pool.num_pages,
            head_dim=DIM,
        )
        mapping, out = pool.slots(slots), self.q
        rows = mx.full((BATCH, KV_HEADS, DIM), 0.5, mx.float16)
        for layer in range(LAYERS):
            pool.write(layer, rows, rows, mapping)
            if canary is not None:
                canary.read(layer, self.tables)
            out = pool[layer].attend(out, plan)
        mx.eval(out, pool.state)
        for table in self.tables:
            table.truncate(CONTEXT)
        return np.array(out)


def same(outputs: dict) -> None:
    off, on = outputs.values()
    assert np.array_equal(off, on)


def main():
    stack = Stack()
    candidates = [
        Candidate("canary off", lambda: stack.step(False)),
        Candidate("canary on", lambda: stack.step(True)),
    ]
    name = f"decode step, {BATCH} sequences of {CONTEXT} tokens, {LAYERS} layers"
    record = run("canary", [Case(name, candidates, same, rounds=32)])
    (case,) = record["cases"]
    off, on = (candidate["median"] for candidate in case["candidates"])
    print(f"{name}: {off * 1e3:.1f} ms off, {on * 1e3:.1f} ms on, {on / off - 1:+.1%}")


if __name__ == "__main__":
    main()
