"""What the bits of a result may depend on, whatever the plan shares, cuts and advances."""

import mlx.core as mx
import numpy as np
import pytest
from paged_mlx import PageAllocator, PagePool, PageTable, fast, paged_attention

pytestmark = pytest.mark.native

PAGE, DIM = 16, 64


def random(rng, *shape):
    return mx.array(rng.standard_normal(shape).astype(np.float32))


@pytest.mark.parametrize("heads", [8, 64])
@pytest.mark.parametrize("batch", [2, 8])
def test_a_sequence_sees_nothing_of_what_others_hold_behind_its_end_in_a_shared_page(heads, batch):
    rng = np.random.default_rng(0)
    lens = np.full(batch, 100, np.int32)
    lens[-1] = 110
    k, v = random(rng, 7, 8, PAGE, DIM), random(rng, 7, 8, PAGE, DIM)
    v[6, :, 100 % PAGE : 110 % PAGE] = float("nan")
    tables = np.tile(np.arange(7, dtype=np.int32), (batch, 1))
    plan = fast.plan(
        tables, lens, num_q_heads=heads, num_kv_heads=8, page_size=PAGE, head_dim=DIM,
        dtype=mx.float32, workers=1,
    )  # fmt: skip
    out = np.array(fast.paged_attention(random(rng, batch, heads, DIM), k, v, plan=plan))
    assert np.isfinite(out[:-1]).all() and np.isnan(out[-1]).any()
    others = [decision.num_pages for decision in plan.decisions if decision.num_sequences == batch]
    assert all(count <= 6 for count in others)


def test_a_plan_is_not_advanced_to_where_contexts_end_apart_in_a_shared_page():
    tables = np.tile(np.arange(7, dtype=np.int32), (8, 1))
    options = dict(
        num_q_heads=64, num_kv_heads=8, page_size=PAGE, head_dim=DIM, dtype=mx.float32, workers=1,
        stream=mx.cpu,
    )  # fmt: skip
    equal = fast.plan(tables, np.full(8, 105, np.int32), **options)
    assert [(d.shared, d.num_pages) for d in equal.decisions] == [(True, 7)]
    assert equal.advance(tables, np.full(8, 106, np.int32)) is not None
    assert equal.advance(tables, np.array([106] * 7 + [107], np.int32)) is None


def test_a_fixed_partition_gives_the_same_bits_whether_a_neighbour_let_the_plan_be_advanced():
    rng = np.random.default_rng(1)
    k, v = random(rng, 40, 1, 32, DIM), random(rng, 40, 1, 32, DIM)
    q = [random(np.random.default_rng(i), 2, 1, DIM) for i in range(20)]
    tables = np.stack([np.arange(10), np.arange(20, 30)]).astype(np.int32)
    found = []
    for neighbour in ([100] * 15, list(range(115, 130))):
        plan = None
        for step in range(15):
            lens = np.array([222 + step, neighbour[step]], np.int32)
            plan = fast.plan(
                tables, lens, num_q_heads=1, num_kv_heads=1, page_size=32, sliding_window=150,
                head_dim=DIM, dtype=mx.float32, fixed_partition=32, previous=plan,
            )  # fmt: skip
        found.append([np.array(fast.paged_attention(x, k, v, plan=plan))[0] for x in q])
    assert all(np.array_equal(a, b) for a, b in zip(*found))


def pool_of(page_size, allocator=None):
    return PagePool(1, 8, page_size, 1, DIM, mx.float32, allocator=allocator)


def test_tables_of_other_pages_are_refused():
    allocator, other = PageAllocator(8, PAGE), PageAllocator(8, PAGE)
    table = PageTable(PAGE)
    table.append_tokens(40, allocator)
    q = mx.zeros((1, 1, DIM))
    with pytest.raises(ValueError, match=r"^\[paged_attention\] page_tables must have the page_si"):
        paged_attention(q, [table], pool_of(32)[0])
    with pytest.raises(ValueError, match="must hold pages of the allocator that the pool"):
        paged_attention(q, [table], pool_of(PAGE, other)[0])
    assert mx.all(paged_attention(q, [table], pool_of(PAGE, allocator)[0]) == 0)


OPTIONS = {
    "dtype": mx.int32, "head_dim": 0, "v_head_dim": -8, "workers": -5, "num_pages": -7,
    "causal": 2, "share_prefixes": None, "sliding_window": 4.0, "fixed_partition": 2**31,
    "previous": mx.zeros(3), "num_q_heads": "8",
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_that_means_nothing_is_refused(name):
    step = dict(num_q_heads=8, num_kv_heads=2, page_size=PAGE) | {name: OPTIONS[name]}
    with pytest.raises(ValueError, match=rf"^\[plan\] {name} must be"):
        fast.plan([[0, 1]], [20], **step)


def test_page_lens_alone_are_refused_with_a_plan_to_advance_too():
    options = dict(num_q_heads=8, num_kv_heads=2, page_size=PAGE)
    before = fast.plan([[0, fast.NO_PAGE]], [10], **options)
    with pytest.raises(ValueError, match="must be given together"):
        fast.plan([[0, fast.NO_PAGE]], [11], page_lens=[[16, 16]], previous=before, **options)


def test_words_of_a_plan_that_are_strided_are_refused():
    plan = fast.plan([[0, 1]], [20], num_q_heads=8, num_kv_heads=2, page_size=PAGE)
    doubled = mx.repeat(plan.array, 2)
    k = mx.zeros((2, 2, PAGE, 128), mx.float16)
    with pytest.raises(ValueError, match="plan must be the array of an AttentionPlan"):
        fast.paged_attention(mx.zeros((1, 8, 128), mx.float16), k, k, plan=doubled[::2])
