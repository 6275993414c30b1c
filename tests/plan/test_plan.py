"""The planner: every token reads every key it sees exactly once, whatever is decided."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_mlx._native import _ext
from plan_steps import BAD_STEPS, assert_exact, distinct_tables, make

pytestmark = pytest.mark.native


@st.composite
def steps(draw):
    page_size = draw(st.sampled_from([1, 3, 4, 8]))
    batch = draw(st.integers(1, 5))
    shared = draw(st.integers(0, 6))
    query_lens = [draw(st.integers(0, 9)) for _ in range(batch)]
    lens = [n + draw(st.integers(0, 40)) for n in query_lens]
    return dict(
        tables=distinct_tables(lens, page_size, shared),
        lens=lens,
        page_size=page_size,
        cu=np.concatenate([[0], np.cumsum(query_lens)]).astype(np.int32),
        causal=draw(st.booleans()),
        window=draw(st.sampled_from([None, 1, 3, 8, 100])),
        workers=draw(st.sampled_from([1, 2, 16])),
        fixed=draw(st.sampled_from([None, None, 8, 32])),
        kv_heads=draw(st.sampled_from([1, 2, 8])),
    )


@settings(max_examples=300, deadline=None)
@given(steps())
def test_every_token_reads_every_key_it_sees_exactly_once(step):
    plan = make(
        step["tables"],
        step["lens"],
        kv_heads=step["kv_heads"],
        page_size=step["page_size"],
        cu_seqlens_q=step["cu"],
        causal=step["causal"],
        sliding_window=step["window"],
        workers=step["workers"],
        fixed_partition=step["fixed"],
    )
    assert_exact(
        plan,
        step["tables"],
        step["lens"],
        step["page_size"],
        cu=step["cu"],
        causal=step["causal"],
        window=step["window"],
    )


def test_ragged_tables_are_read_entry_by_entry():
    tables, starts, page_lens = [[5, 2, 7]], [[0, 3, 7]], [[3, 4, 2]]
    plan = make(tables, [9], page_starts=starts, page_lens=page_lens)
    assert_exact(plan, tables, [9], 4, starts=starts, page_lens=page_lens)


def test_pages_behind_a_window_are_not_in_the_plan():
    tables = [[-1, -1, 9, 3]]
    plan = make(tables, [15], sliding_window=5)
    assert [item["pages"] for item in plan.items] == [[9, 3]]


def test_one_long_sequence_is_cut_so_that_every_worker_is_busy():
    plan = make(distinct_tables([32768], 16), [32768], page_size=16, workers=8, stream=mx.cpu)
    assert sum(plan.num_items.values()) >= 8
    lengths = [end - begin for begin, end in (item["keys"] for item in plan.items)]
    assert max(lengths) <= 1.1 * min(lengths)
    assert_exact(plan, distinct_tables([32768], 16), [32768], 16)


@pytest.mark.parametrize("workers", [2, 3, 8])
def test_every_worker_gets_as_many_items_of_one_sequence(workers):
    per_worker = set()
    for tokens in range(1024, 24 * 1024, 720):
        tables = distinct_tables([tokens], 16)
        plan = make(
            tables, [tokens], q_heads=32, kv_heads=8, page_size=16, workers=workers, stream=mx.cpu
        )
        count = sum(plan.num_items.values())
        assert count < workers or count % workers == 0
        per_worker.add(count // workers)
        assert_exact(plan, tables, [tokens], 16)
    assert {1, 2, 3, 4} <= per_worker


def test_one_long_sequence_beside_63_short_ones_is_cut_and_comes_first():
    lens = [32768] + [128] * 63
    plan = make(distinct_tables(lens, 16), lens, page_size=16, workers=8, stream=mx.cpu)
    assert sum(0 in item["tokens"] for item in plan.items) >= 8
    lengths = [end - begin for begin, end in (item["keys"] for item in plan.items)]
    assert lengths == sorted(lengths, reverse=True)


def test_64_short_sequences_pay_for_no_merge():
    lens = [128] * 64
    plan = make(distinct_tables(lens, 16), lens, page_size=16, workers=8)
    assert sum(plan.num_items.values()) == 64 and plan.num_partials == 0


def test_a_short_step_pays_for_no_merge():
    plan = make([[0, 1, 2, 3]], [64], page_size=16, workers=16)
    assert plan.num_partials == 0 and plan.num_merges == 0


def test_decode_and_prefill_mix_without_sharing_an_item():
    lens, cu = [100, 400], [0, 1, 301]
    tables = distinct_tables(lens, 16)
    plan = make(tables, lens, page_size=16, cu_seqlens_q=cu, stream=mx.cpu)
    assert plan.num_items["wide"] >= 1 and plan.num_items["tile"] >= 1
    assert all(0 not in item["tokens"] or item["tokens"] == [0] for item in plan.items)
    assert_exact(plan, tables, lens, 16, cu=cu)


def test_a_long_shared_prefix_is_read_once():
    lens = [4096 + 16 * i for i in range(1, 9)]
    tables = distinct_tables(lens, 16, shared_pages=256)
    plan = make(tables, lens, page_size=16, workers=1, stream=mx.cpu)
    shared = [item for item in plan.items if len(item["tokens"]) == 8]
    assert [item["keys"] for item in shared] == [(0, 4096)]
    assert [d.shared for d in plan.decisions] == [True]
    assert plan.keys_read == plan.keys_least
    assert_exact(plan, tables, lens, 16)


def test_a_prefix_of_one_page_is_not_worth_sharing_and_the_plan_says_so():
    lens = [17, 18]
    tables = distinct_tables(lens, 16, shared_pages=1)
    plan = make(tables, lens, page_size=16, workers=1)
    assert [d.shared for d in plan.decisions] == [False]
    assert "not shared" in str(plan)


def test_nested_prefixes_make_a_tree():
    system, page = list(range(128)), 16  # all share 2048 tokens, each pair 1024 more
    rows, lens, own = [], [], 1000
    for pair in range(2):
        branch = list(range(200 + 64 * pair, 264 + 64 * pair))
        for _ in range(2):
            rows.append(system + branch + [own])
            lens.append(len(rows[-1]) * page - 3)
            own += 1
    plan = make(rows, lens, page_size=page, workers=1)
    by_sharers = sorted((len(i["tokens"]), i["keys"]) for i in plan.items)
    assert by_sharers == [
        (1, (3072, 3085)),
        (1, (3072, 3085)),
        (1, (3072, 3085)),
        (1, (3072, 3085)),
        (2, (2048, 3072)),
        (2, (2048, 3072)),
        (4, (0, 2048)),
    ]
    assert_exact(plan, rows, lens, page)


def test_sequences_that_share_everything_finish_in_the_shared_item():
    rows, lens = [list(range(256))] * 4, [4090] * 4
    plan = make(rows, lens, page_size=16, workers=1)
    assert len(plan.items) == 1 and plan.num_partials == 0
    assert_exact(plan, rows, lens, 16)


def test_sharing_can_be_turned_off():
    lens = [4096] * 8
    tables = distinct_tables(lens, 16, shared_pages=200)
    plan = make(tables, lens, page_size=16, workers=1, share_prefixes=False)
    assert all(len(item["tokens"]) == 1 for item in plan.items) and not plan.decisions


def test_fixed_partitions_do_not_depend_on_the_batch():
    lens = [1000, 4096, 5000]
    tables = distinct_tables(lens, 16, shared_pages=20)
    together = make(tables, lens, page_size=16, fixed_partition=512)
    alone = make(tables[1:2], lens[1:2], page_size=16, fixed_partition=512)
    cuts = lambda plan, token: sorted(i["keys"] for i in plan.items if i["tokens"] == [token])  # noqa: E731
    assert cuts(together, 1) == cuts(alone, 0) == [(i, i + 512) for i in range(0, 4096, 512)]


def test_the_next_step_inside_the_same_pages_reuses_the_plan():
    tables = distinct_tables([60, 40], 16, shared_pages=1)
    plan = make(tables, [60, 40], page_size=16)
    following = plan.advance(tables, [61, 41])
    assert_exact(following, tables, [61, 41], 16)
    assert_exact(plan, tables, [60, 40], 16)


@pytest.mark.parametrize(
    "change",
    [dict(sliding_window=8), dict(causal=False), dict(fixed_partition=32), dict(q_heads=4)],
)
def test_a_previous_plan_with_other_options_is_not_reused(change):
    tables = distinct_tables([60], 16)
    plan = make(tables, [60], page_size=16)
    following = make(tables, [61], page_size=16, previous=plan, **change)
    fresh = make(tables, [61], page_size=16, **change)
    assert np.array_equal(np.array(following.array), np.array(fresh.array))


def test_a_previous_plan_with_the_same_options_is_reused(monkeypatch):
    tables = distinct_tables([60], 16)
    plan = make(tables, [60], page_size=16)
    monkeypatch.setattr(_ext, "NativePlan", None)  # none can be made
    assert make(tables, [61], page_size=16, previous=plan).max_context_len == 61


@pytest.mark.parametrize(
    "change",
    [
        lambda tables, lens: (tables, [65, 40]),  # another page
        lambda tables, lens: (tables[:, ::-1].copy(), lens),  # other pages
        lambda tables, lens: (tables[:1], lens[:1]),  # another batch
    ],
)
def test_a_step_with_other_pages_needs_a_plan_of_its_own(change):
    tables = np.arange(10, dtype=np.int32).reshape(2, 5)
    plan = make(tables, [60, 40], page_size=16)
    assert plan.advance(*change(tables, [60, 40])) is None


@settings(max_examples=200, deadline=None)
@given(steps(), st.integers(0, 3))
def test_an_advanced_plan_reads_what_a_new_one_would(step, ahead):
    if any(n == 0 for n in np.diff(step["cu"])):
        step["cu"] = None
    options = dict(causal=step["causal"], sliding_window=step["window"])
    lens = [max(1, n) for n in step["lens"]] if step["cu"] is None else step["lens"]
    tables = distinct_tables([n + 8 for n in lens], step["page_size"], 2)
    plan = make(tables, lens, page_size=step["page_size"], cu_seqlens_q=step["cu"], **options)
    later = [n + ahead for n in lens]
    following = plan.advance(tables, later, step["cu"])
    if following is not None:
        assert_exact(
            following, tables, later, step["page_size"],
            cu=step["cu"], causal=step["causal"], window=step["window"],
        )  # fmt: skip


def test_an_empty_sequence_has_an_item_without_pages():
    plan = make([[-1], [3]], [0, 2])
    assert_exact(plan, [[-1], [3]], [0, 2], 4)
    assert sorted(item["pages"] for item in plan.items) == [[], [3]]


def test_a_plan_prints_what_it_decided():
    lens = [4200, 4300]
    text = str(make(distinct_tables(lens, 16, 256), lens, page_size=16, workers=1))
    assert "AttentionPlan(2 tokens" in text
    keys, key_nbytes = 4096 + 104 + 204, 2 * (128 + 128) * 2  # 2 KV heads, float16
    assert f"{keys * key_nbytes:,} bytes of {keys:,} keys, 1.000x the least" in text
    assert "pages [0, 256) of 2 sequences: shared" in text


@pytest.mark.parametrize("name", BAD_STEPS)
def test_a_bad_step_is_a_typed_error(name):
    change, message = BAD_STEPS[name]
    step = dict(tables=[[0, 1]], lens=[6]) | change
    with pytest.raises(ValueError, match=r"\[plan\] .*" + message):
        make(step.pop("tables"), step.pop("lens"), **step)


def test_lazy_tables_are_evaluated():
    tables = mx.array([[0, 1]]) + 0
    plan = make(tables, mx.array([5]) + 1)
    assert plan.items[0]["pages"] == [0, 1]
