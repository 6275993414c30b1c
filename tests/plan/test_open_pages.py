"""Plans of pools whose pages are sealed: an item has sealed pages or open ones, never both."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_mlx import fast
from plan_coverage import expected_reads, partial_slots, planned_reads
from plan_steps import SEALED, distinct_tables, make_open

pytestmark = pytest.mark.native


def opened(tables, open_entries):
    """The tables with the pages of some entries ``(sequence, entry)`` open."""
    tables = np.array(tables)
    for number, at in enumerate(sorted(open_entries)):
        tables[at] = SEALED + number
    return tables


@st.composite
def steps(draw):
    page_size = draw(st.sampled_from([1, 4, 8]))
    query_lens = draw(st.lists(st.integers(0, 9), min_size=1, max_size=4))
    lens = [n + draw(st.integers(0, 30)) for n in query_lens]
    tables = distinct_tables(lens, page_size, draw(st.integers(0, 4)))
    entries = [(b, i) for b, n in enumerate(lens) for i in range(-(-n // page_size))]
    chosen = draw(st.sets(st.sampled_from(entries))) if entries else set()
    return dict(
        tables=opened(tables, chosen),
        lens=lens,
        page_size=page_size,
        cu=np.concatenate([[0], np.cumsum(query_lens)]),
        causal=draw(st.booleans()),
        sliding_window=draw(st.sampled_from([0, 1, 5])),
        workers=draw(st.sampled_from([1, 4])),
        fixed_partition=draw(st.sampled_from([0, 8])),
    )


@settings(max_examples=150, deadline=None)
@given(steps())
def test_every_key_is_read_once_and_no_item_has_pages_of_both_sorts(step):
    plan = make_open(**step)
    expected = expected_reads(
        step["tables"], step["lens"], step["page_size"], cu=step["cu"], causal=step["causal"],
        window=step["sliding_window"] or None,
    )  # fmt: skip
    assert planned_reads(plan, SEALED) == expected
    sealed_ids = {i for row in step["tables"].tolist() for i in row if i < SEALED}
    for item in plan.items:
        assert item["open"] or set(item["pages"]) <= sealed_ids


def test_the_header_counts_open_items_and_names_their_last_page():
    plan = make_open([[3, 7, SEALED + 2], [5, SEALED, 6]], [10, 12])
    header = plan._header
    assert header["max_page_id"] == 7 and header["max_open_page"] == 2
    assert [item["pages"] for item in plan.items if item["open"]] == [[0], [2]]
    assert sum(header["num_open_items"]) == 2 and plan.num_merges == 2


def test_ragged_pages_are_cut_where_an_open_one_begins():
    tables, starts, page_lens = [[5, SEALED, 7]], [[0, 3, 7]], [[3, 4, 2]]
    plan = make_open(tables, [9], starts=starts, page_lens=page_lens)
    expected = expected_reads(tables, [9], 4, starts=starts, page_lens=page_lens)
    assert planned_reads(plan, SEALED) == expected
    assert [item["pages"] for item in plan.items] == [[5], [7], [1 - 1]]


def test_a_plan_moves_on_inside_an_open_page_and_not_past_its_sealing():
    plan = make_open([[3, SEALED + 1]], [5])
    grown = plan.advance([[3, SEALED + 1]], [6])
    assert grown is not None
    assert planned_reads(grown, SEALED) == expected_reads([[3, SEALED + 1]], [6], 4)
    assert plan.advance([[3, 4]], [6]) is None
    assert plan.advance([[3, 1]], [6]) is None


def test_an_open_page_that_many_share_is_read_once():
    tables = [[1, 2, SEALED]] * 6
    plan = make_open(tables, [12] * 6, page_size=4, workers=1)
    assert planned_reads(plan, SEALED) == expected_reads(tables, [12] * 6, 4)


def test_plans_for_rotated_values_on_kernels_leave_the_end_to_the_merge():
    tables = distinct_tables([9, 3], 4)
    for formats, kernels, merges in ((("q8", "q4"), True, 2), (("q8", "q4"), False, 0),
                                     (("q4", "q8"), True, 0)):  # fmt: skip
        plan = make_open(tables, [9, 3], kernels=kernels, formats=formats)
        assert plan.num_merges == merges
        _, _, finished = partial_slots(plan)
        assert len(finished) == 2 - merges


def test_without_open_pages_a_plan_is_word_for_word_the_same():
    tables, lens = distinct_tables([30, 17], 4, 2), [30, 17]
    sealed, plain = make_open(tables, lens), make_open(tables, lens, num_sealed_pages=-1)
    assert (np.array(sealed.array) == np.array(plain.array)).all()


def test_a_plan_with_open_pages_is_refused_for_pages_that_have_none():
    plan = make_open([[1, SEALED]], [6])
    q, pages = mx.zeros((1, 8, 64)), mx.zeros((8, 2, 4, 64))
    with pytest.raises(ValueError, match=r"\[paged_attention\] block_tables must hold open pages"):
        fast.paged_attention(q, pages, pages, plan=plan)


def test_an_open_page_is_not_taken_for_the_sealed_page_of_its_number():
    plan = make_open([[0, 3], [SEALED, 5]], [6, 6])
    assert plan.keys_read == plan.keys_least == 12


def test_a_plan_prints_the_bytes_of_the_formats():
    plan = fast.plan(
        [[1, 2], [3, 4]], [128, 128], num_q_heads=2, num_kv_heads=2, page_size=64, head_dim=128,
        dtype=mx.float16, k_format="q8", v_format="q4",
    )  # fmt: skip
    assert f"K and V read: {256 * 2 * (136 + 72):,} bytes of 256 keys" in str(plan)
