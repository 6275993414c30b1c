"""Odd calls of the pool and of attention: each a typed error that names the mistake."""

import mlx.core as mx
import numpy as np
import pytest
from paged_mlx import PageAllocator, PagePool, PageTable, fast, paged_attention

PAGE, HEADS, DIM = 4, 2, 16


class Step:
    """Two tables of a pool, and what a model hands over for their newest tokens."""

    def __init__(self):
        self.pool = PagePool(2, 16, PAGE, HEADS, DIM, mx.float32)
        self.tables = [PageTable(PAGE), PageTable(PAGE)]
        for table, num_tokens in zip(self.tables, (9, 3)):
            table.append_tokens(num_tokens, self.pool.allocator)
        self.q = mx.zeros((2, 4, DIM))
        self.k = mx.zeros((2, HEADS, DIM))
        self.plan = self.pool.plan(self.tables, num_q_heads=4)

    def attention(self, **change):
        call = {"query": self.q, "page_tables": self.tables, "page_blocks": self.pool[0]}
        return paged_attention(**call | change)

    def attend(self, **change):
        return self.pool[0].attend(**{"q": self.q, "plan": self.plan} | change)

    def write(self, **change):
        return self.pool[0].write(**{"k": self.k, "v": self.k, "slot_mapping": [3, 9]} | change)


@pytest.fixture
def step():
    return Step()


def pool(**change):
    sizes = {"num_layers": 1, "num_pages": 4, "page_size": PAGE, "num_kv_heads": 2, "head_dim": 16}
    return PagePool(**sizes | change)


ATTENTION = {
    "the whole pool": (lambda s: {"page_blocks": s.pool}, "page_blocks must be one layer of the pool, pool[layer]"),
    "an array of pages": (lambda s: {"page_blocks": s.k}, "page_blocks must be pool[layer], or a dict"),
    "a dict of arrays": (lambda s: {"page_blocks": {0: s.k}}, "page_blocks[0] must be a PageBlock"),
    "one table": (lambda s: {"page_tables": s.tables[0]}, "page_tables must be a list of PageTables"),
    "tables of numbers": (lambda s: {"page_tables": [0, 1]}, "tables must be PageTables"),
    "no tables": (lambda s: {"page_tables": []}, "page_tables must hold at least one table"),
    "a numpy query": (lambda s: {"query": np.zeros((2, 4, DIM), np.float32)}, "query must be an mx.array"),
    "half a query": (lambda s: {"query": s.q.astype(mx.float16)}, "must be float"),
    "a flat query": (lambda s: {"query": s.q[0]}, "query must have shape [tokens"),
    "too many tokens": (lambda s: {"query": mx.zeros((3, 4, DIM))}, "query must have 2 tokens, one for each table"),
    "heads that do not divide": (lambda s: {"query": mx.zeros((2, 3, DIM))}, "[paged_attention] num_q_heads must be a multiple of num_kv_heads = 2"),
    "mask by name": (lambda s: {"mask": "causal"}, "mask must be an mx.array, or None: causal=True is the default"),
    "a numpy mask": (lambda s: {"mask": np.ones((2, 9), bool)}, "mask must be an mx.array"),
    "numpy sinks": (lambda s: {"sinks": np.zeros(4)}, "sinks must be an mx.array"),
    "slopes in a list": (lambda s: {"alibi_slopes": [1.0] * 4}, "alibi_slopes must be an mx.array"),
    "scale as text": (lambda s: {"scale": "1"}, "scale must be a number"),
    "softcap of 0": (lambda s: {"softcap": 0.0}, "softcap must be finite and greater than 0"),
    "a window of 0": (lambda s: {"sliding_window": 0}, "[paged_attention] sliding_window must be a whole number of at least 1"),
    "a window of True": (lambda s: {"sliding_window": True}, "[paged_attention] sliding_window must be a whole number"),
    "a window of 2.0": (lambda s: {"sliding_window": 2.0}, "[paged_attention] sliding_window must be a whole number"),
    "a numpy bool window": (lambda s: {"sliding_window": np.bool_(True)}, "[paged_attention] sliding_window must be a whole number"),
    "a window of 2**40": (lambda s: {"sliding_window": 2**40}, "[paged_attention] sliding_window must be at most"),
    "causal of 1": (lambda s: {"causal": 1}, "[paged_attention] causal must be True or False"),
    "lengths of floats": (lambda s: {"query_lens": [1.0, 1.0]}, "[paged_attention] query_lens must hold integers"),
    "lengths of bools": (lambda s: {"query_lens": [True, True]}, "[paged_attention] query_lens must hold integers"),
    "lengths that are uneven": (lambda s: {"query_lens": [[1], [1, 2]]}, "query_lens must be an array of integers"),
    "a plan that is none": (lambda s: {"plan": "plan"}, "plan must be an AttentionPlan"),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTENTION)
def test_an_odd_argument_of_paged_attention_is_named(step, name):
    change, message = ATTENTION[name]
    arguments = change(step)
    with pytest.raises(ValueError) as error:
        step.attention(**arguments)
    assert str(error.value).startswith("[") and message in str(error.value)


CALLS = {
    "a numpy q": (lambda s: s.attend(q=np.zeros((2, 4, DIM))), "[attend] q must be an mx.array"),
    "no plan": (lambda s: s.attend(plan=None), "[attend] plan must be an AttentionPlan"),
    "tables for a plan": (lambda s: s.attend(plan=s.tables), "[attend] plan must be an AttentionPlan"),
    "numpy k": (lambda s: s.write(k=np.zeros((2, 2, DIM))), "[write] k must be an mx.array"),
    "numpy v": (lambda s: s.write(v=np.zeros((2, 2, DIM))), "[write_pages] v must be an mx.array"),
    "slots of floats": (lambda s: s.write(slot_mapping=[0.0, 1.0]), "[write] slot_mapping must hold integers"),
    "an append for slots": (lambda s: s.write(slot_mapping=s.tables[0].append_tokens(1, s.pool.allocator)), "[write] slot_mapping must be slots: give appended.slots"),
    "no slots": (lambda s: s.write(slot_mapping=None), "[write] slot_mapping must hold integers"),
    "layer -1": (lambda s: s.pool[-1], "[PagePool] layer must be a whole number of at least 0"),
    "layer 2": (lambda s: s.pool[2], "[PagePool] layer must be in [0, 2)"),
    "layer 0.0": (lambda s: s.pool[0.0], "[PagePool] layer must be a whole number"),
    "layer True": (lambda s: s.pool[True], "[PagePool] layer must be a whole number"),
    "pairs of text": (lambda s: s.pool.copy([("a", "b")]), "[PagePool.copy] pairs must hold integers"),
    "grow by 0.5": (lambda s: s.pool.grow(16.5), "[PagePool.grow] num_pages must be a whole number"),
    "a window of the pool's plan": (lambda s: s.pool.plan(s.tables, num_q_heads=4, sliding_window=0), "[plan] sliding_window must be"),
    "a previous of text": (lambda s: s.pool.plan(s.tables, num_q_heads=4, previous="it"), "previous must be an AttentionPlan"),
    "fast: numpy pages": (lambda s: fast.write_pages(s.k, s.k, np.zeros((4, 2, 4, DIM)), s.k, [0, 1]), "[write_pages] k_pages must be an mx.array"),
    "fast: one pool": (lambda s: fast.copy_pages(s.k, [(0, 1)]), "[copy_pages] pools must be a list of arrays"),
    "fast: numpy parts": (lambda s: fast.merge_states([np.zeros((2, 4, DIM))], [s.q[..., 0]]), "[merge_states] outs[0] must be an mx.array"),
    "fast: a stream of text": (lambda s: fast.paged_attention(s.q, *s.pool[0].arrays, plan=s.plan, stream="gpu"), "[paged_attention] stream must be"),
    "fast: heads of 2.0": (lambda s: fast.plan([[0]], [1], num_q_heads=2.0, num_kv_heads=1, page_size=4), "[plan] num_q_heads must be a whole number"),
    "fast: head_dim 20": (lambda s: fast.plan([[0]], [1], num_q_heads=2, num_kv_heads=1, page_size=4, head_dim=20), "[plan] head_dim must be a multiple of 8 up to 256, or 512"),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_an_odd_call_is_named(step, name):
    call, message = CALLS[name]
    with pytest.raises(ValueError) as error:
        call(step)
    assert message in str(error.value)


@pytest.mark.parametrize("value", [0, -1, 8.0, "8", True, None, 2**40])
@pytest.mark.parametrize(
    "name", ["num_layers", "num_pages", "page_size", "num_kv_heads", "head_dim"]
)
def test_a_size_of_a_pool_is_a_whole_number(name, value):
    with pytest.raises(ValueError, match=rf"^\[PagePool\] {name} must be"):
        pool(**{name: value})


@pytest.mark.parametrize(
    "change",
    [
        {"head_dim": 20}, {"head_dim": 264}, {"v_head_dim": 7}, {"dtype": mx.int8}, {"dtype": "half"},
        {"fill": "0"}, {"wipe_freed": "nan"}, {"allocator": PageTable(4)}, {"memory_limit": 1.5},
    ],
    ids=str,
)  # fmt: skip
def test_a_pool_that_no_kernel_takes_is_refused_before_it_has_memory(change):
    before = mx.get_active_memory()
    (name,) = change
    with pytest.raises(ValueError, match=rf"^\[PagePool\] {name} must be "):
        pool(**change)
    assert mx.get_active_memory() <= before


def test_pages_given_back_are_named_when_no_window_hides_them(step):
    table = PageTable(PAGE)
    table.append_tokens(3 * PAGE, step.pool.allocator)
    table.free_before(2 * PAGE)
    q = mx.zeros((1, 4, DIM))
    message = r"sliding_window must be given, and .* the 2 pages that sequence 0 gave back; got"
    for window in (None, 2 * PAGE):
        with pytest.raises(ValueError, match=message):
            paged_attention(q, [table], step.pool[0], sliding_window=window)
    assert paged_attention(q, [table], step.pool[0], sliding_window=PAGE).shape == q.shape


def test_what_is_public_says_its_state(step):
    layer, slots = step.pool[1], step.pool.slots([3, 9])
    assert repr(layer).startswith("PoolLayer(1 of PagePool(2 layers, 4 of 16 pages of 4 tokens")
    assert repr(slots) == "SlotMapping(2 tokens, slots of 64)"
    assert repr(layer[0]).startswith("PoolPageBlock(page_id=0, tokens_stored=0, max_tokens=4")
    assert repr(PageAllocator(4, PAGE)) == "PageAllocator(4 pages of 4, 0 used)"


def test_a_pool_is_a_sequence_of_its_layers_and_says_where_attend_is(step):
    assert len(step.pool) == 2
    assert [layer.index for layer in step.pool] == [0, 1]
    with pytest.raises(AttributeError, match=r"no attribute 'attend': use pool\[layer\].attend"):
        step.pool.attend(step.q, step.plan)
