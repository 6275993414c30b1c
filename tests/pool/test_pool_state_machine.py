"""Pages, tables and arrays together: random life, random points of evaluation, bits compared.

A step may be plain or compiled, on either of two streams, evaluated at once, later,
asynchronously or in another order. The naive model keeps, for each sequence, the list of
its tokens, and attends over them in a pool of its own where every page is used once.
"""

from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from paged_mlx import OutOfPages, PageAllocator, PagePool, PageTable, fast
from paged_mlx._native import BUILT
from paged_mlx.pages.block_table import pack

HEADS, DIM, PAGE, PAGES, LAYERS = 2, 8, 4, 48, 2
POOL_PAGES = 8192  # most are never used: a copy of the pool would show in the peak memory


def vector(token: int, layer: int, which: int) -> np.ndarray:
    """K (0) or V (1) of a token in a layer: any function that tells tokens apart."""
    rng = np.random.default_rng([token, layer, which])
    return rng.standard_normal((HEADS, DIM)).astype(np.float32)


def rows(tokens: list[int], layer: int, which: int) -> mx.array:
    return mx.array(np.stack([vector(t, layer, which) for t in tokens]))


def step_plan(tables, lens):
    return fast.plan(
        tables, lens, num_q_heads=HEADS, num_kv_heads=HEADS, page_size=PAGE,
        dtype=mx.float32, fixed_partition=8,
    )  # fmt: skip


def naive_attention(q: np.ndarray, tokens: list[int], layer: int) -> np.ndarray:
    """The newest token over all tokens, in pages that nothing else ever touched."""
    count = -(-len(tokens) // PAGE)
    k, v = np.zeros((2, count * PAGE, HEADS, DIM), np.float32)
    k[: len(tokens)], v[: len(tokens)] = (np.array(rows(tokens, layer, i)) for i in (0, 1))
    k, v = (x.reshape(count, PAGE, HEADS, DIM).swapaxes(1, 2) for x in (k, v))
    plan = step_plan([list(range(count))], [len(tokens)])
    out = fast.paged_attention(mx.array(q)[None], mx.array(k), mx.array(v), plan=plan)
    return np.array(out)[0]


class PoolMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.allocator = PageAllocator(PAGES, PAGE)
        self.streams = [mx.default_stream(mx.cpu), mx.new_stream(mx.cpu)]
        self.sequences: list[tuple[PageTable, list[int]]] = []
        self.pending: list[tuple[mx.array, np.ndarray]] = []
        self.next_token = 0

    @initialize(wipe=st.booleans(), canary=st.booleans())
    def begin(self, wipe, canary):
        self.pool = PagePool(
            LAYERS,
            POOL_PAGES,
            PAGE,
            HEADS,
            DIM,
            mx.float32,
            allocator=self.allocator,
            fill=np.nan,
            wipe_freed=np.nan if wipe else None,
            canary=canary,
        )
        mx.synchronize()
        mx.reset_peak_memory()
        self.memory = mx.get_active_memory()

    @rule(count=st.integers(1, 3 * PAGE), stream=st.integers(0, 1))
    def start(self, count, stream):
        table = PageTable(PAGE)
        if self.extend(table, [], count, stream) is not None:
            self.sequences.append((table, self.extend_tokens))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), count=st.integers(1, PAGE + 1), stream=st.integers(0, 1))
    def append(self, data, count, stream):
        i = data.draw(st.integers(0, len(self.sequences) - 1))
        table, tokens = self.sequences[i]
        if self.extend(table, tokens, count, stream) is not None:
            self.sequences[i] = (table, self.extend_tokens)

    def extend(self, table, tokens, count, stream):
        try:
            plan = table.append_tokens(count, self.allocator)
        except OutOfPages:
            return None
        fresh = list(range(self.next_token, self.next_token + count))
        self.next_token += count
        self.pool.stream = self.streams[stream]
        if self.pool.canary is not None:
            self.pool.canary.note([table], [fresh], plan.slots)
        slots = self.pool.slots(plan.slots)
        for layer in range(LAYERS):
            self.pool.write(layer, rows(fresh, layer, 0), rows(fresh, layer, 1), slots)
        self.extend_tokens = tokens + fresh
        return plan

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def fork(self, data):
        table, tokens = data.draw(st.sampled_from(self.sequences))
        self.sequences.append((table.fork(), list(tokens)))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def truncate(self, data):
        i = data.draw(st.integers(0, len(self.sequences) - 1))
        table, tokens = self.sequences[i]
        length = data.draw(st.integers(1, len(tokens)))
        table.truncate(length)
        self.sequences[i] = (table, tokens[:length])

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def release(self, data):
        i = data.draw(st.integers(0, len(self.sequences) - 1))
        self.sequences.pop(i)[0].release()

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), stream=st.integers(0, 1), compiled=st.booleans())
    def attend(self, data, stream, compiled):
        chosen = data.draw(st.lists(st.sampled_from(self.sequences), min_size=1, max_size=3))
        layer = data.draw(st.integers(0, LAYERS - 1))
        rng = np.random.default_rng(self.next_token)
        q = rng.standard_normal((len(chosen), HEADS, DIM)).astype(np.float32)
        if self.pool.canary is not None:
            self.pool.canary.read(layer, [table for table, _ in chosen])
        packed = pack([table for table, _ in chosen])
        plan = step_plan(packed.block_tables, packed.context_lens)
        self.pool.stream = self.streams[stream]
        if compiled:
            state = self.pool.state
            step = partial(mx.compile, inputs=state, outputs=state)(
                lambda q, words: self.pool[layer].attend(q, words)
            )
            out = step(mx.array(q), plan.array)
        else:
            out = self.pool[layer].attend(mx.array(q), plan)
        expected = np.stack(
            [naive_attention(q[i], chosen[i][1], layer) for i in range(len(chosen))]
        )
        self.pending.append((out, expected))

    @precondition(lambda self: self.pending)
    @rule(data=st.data(), how=st.sampled_from(["outputs", "reversed", "state", "one", "async"]))
    def evaluate(self, data, how):
        outs = [out for out, _ in self.pending]
        if how == "outputs":
            mx.eval(outs)
        elif how == "reversed":
            mx.eval(self.pool.state, outs[::-1])
        elif how == "state":
            mx.eval(self.pool.state)
        elif how == "one":
            mx.eval(data.draw(st.sampled_from(outs)))
        else:
            mx.async_eval(outs, self.pool.state)

    @rule()
    def compare(self):
        for out, expected in self.pending:
            assert np.array_equal(np.array(out), expected)
        self.pending.clear()

    @invariant()
    def nothing_leaks(self):
        self.allocator.check([table for table, _ in self.sequences])

    def teardown(self):
        self.compare()
        self.pool.check([table for table, _ in self.sequences])
        mx.synchronize()
        if BUILT:  # MLX's own operations copy pages
            assert mx.get_peak_memory() - self.memory < self.pool.nbytes // 4
        for table, _ in self.sequences:
            table.release()
        assert self.allocator.num_free == PAGES


COMMON = dict(deadline=None, suppress_health_check=list(HealthCheck))

TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=25, stateful_step_count=40, **COMMON)


@pytest.mark.long
class TestPoolMachineLong(PoolMachine.TestCase):
    settings = settings(max_examples=2500, stateful_step_count=40, **COMMON)
