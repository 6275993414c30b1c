"""Few cases that together tell every wrong plan: what is read, key by key, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

import mlx.core as mx
import numpy as np
from paged_mlx import fast
from paged_mlx.machine.thresholds import planned_with
from plan_coverage import expected_reads, partial_slots, planned_reads
from plan_steps import BAD_STEPS, SEALED, assert_exact, distinct_tables, make, make_open
from threadgroups import MODELS, items_of

from .mutant import Mutant

PAGE = 16


def _exact(
    lens,
    shared=0,
    page_size=PAGE,
    tables=None,
    query_lens=None,
    window=None,
    causal=True,
    **options,
):
    """A plan that reads what it ought to; its tables are those given, or made."""
    tables = distinct_tables(lens, page_size, shared) if tables is None else tables
    cu = None if query_lens is None else np.concatenate([[0], np.cumsum(query_lens)])
    asked = dict(cu_seqlens_q=cu, sliding_window=window, causal=causal)
    plan = make(tables, lens, page_size=page_size, **asked, **options)
    assert_exact(plan, tables, lens, page_size, cu=cu, window=window, causal=causal)
    return plan


def _partitions_of_a_window():
    plan = _exact([50], page_size=4, window=13, fixed_partition=8)
    assert sorted(item["keys"][0] for item in plan.items) == [37, 40, 48]


def _open_pages():
    tables = [[3, 7, SEALED + 2], [5, SEALED, 6]]
    plan = make_open(tables, [10, 12])
    assert planned_reads(plan, SEALED) == expected_reads(tables, [10, 12], 4)
    assert [item["pages"] for item in plan.items if item["open"]] == [[0], [2]]
    assert plan._header["max_page_id"] == 7 and plan._header["max_open_page"] == 2


def _rotated_values():
    plan = make_open(distinct_tables([9, 3], 4), [9, 3], kernels=True, formats=("q8", "q4"))
    assert plan.num_merges == 2


def _busy_workers():
    plan = _exact([16384], workers=16)
    assert sum(plan.num_items.values()) >= 8


def _short_step():
    for keys in (64, 3500):
        assert (
            make(distinct_tables([keys], PAGE), [keys], page_size=PAGE, workers=16).num_partials
            == 0
        )


def _large_gpu():
    # 2 threadgroups for each of 40 cores: 10 items of 8 KV heads.
    assert items_of(MODELS["Llama-3.1-8B, Qwen3-8B"], cores=40, context_len=256) == 10
    assert items_of(MODELS["Llama-3.1-8B, Qwen3-8B"], cores=40, context_len=250) == 1


def _fresh_prompt():
    tables = [[0, 1, 2, 3]]
    with planned_with("cpu", 2, sdpa_prompt=4):
        fresh = make(tables, [40], page_size=PAGE, cu_seqlens_q=[0, 40])
        chunk = make(tables, [41], page_size=PAGE, cu_seqlens_q=[0, 40])
    assert fresh.fresh_prompt and not chunk.fresh_prompt
    assert not fresh.advance(tables, [41], [0, 40]).fresh_prompt


def _longest_first():
    plan = _exact([100, 300, 200])
    lengths = [end - begin for begin, end in (item["keys"] for item in plan.items)]
    assert lengths == [300, 200, 100]


def _every_kind():
    plan = _exact([400, 60, 50], query_lens=[1, 60, 8], q_heads=2, kv_heads=1)
    rows = {kind: [] for kind in ("vector", "tile", "wide")}
    for item in plan.items:
        rows[item["kind"]].append(2 * len(item["tokens"]))
    assert rows == {"vector": [2], "tile": [16], "wide": [120]}


def _first_and_third_share():
    tables = distinct_tables([4200, 100, 4300], PAGE)
    tables[2, :256] = tables[0, :256]
    plan = _exact([4200, 100, 4300], tables=tables, workers=1)
    assert [0, 2] in [item["tokens"] for item in plan.items]


def _three_share_unequally():
    tables = distinct_tables([4200, 4300, 4400], PAGE, 256)
    tables[2, 200:256] = np.arange(5000, 5056)
    plan = _exact([4200, 4300, 4400], tables=tables, workers=1)
    assert (0, 3200) in [item["keys"] for item in plan.items if len(item["tokens"]) == 3]


def _page_filled_differently():
    tables, lens = [[5, 2], [5, 3]], [4050, 4150]
    ragged = dict(page_lens=[[4000, 4096], [4096, 4096]])
    ragged["page_starts"] = [[0, 4000], [0, 4096]]
    plan = make(tables, lens, page_size=4096, workers=1, **ragged)
    assert_exact(
        plan, tables, lens, 4096, starts=ragged["page_starts"], page_lens=ragged["page_lens"]
    )


def _ragged():
    tables, starts, page_lens = [[5, 2, 7]], [[0, 3, 7]], [[3, 4, 2]]
    for context_len in (3, 4, 7, 8, 9):
        plan = make(tables, [context_len], page_starts=starts, page_lens=page_lens)
        assert_exact(plan, tables, [context_len], 4, starts=starts, page_lens=page_lens)
        assert all(len(set(item["pages"])) * 4 >= context_len for item in plan.items)


def _hundred_share():
    plan = _exact([600] * 100, shared=32, q_heads=4, kv_heads=1, workers=1)
    assert sorted(len(item["tokens"]) for item in plan.items)[-2:] == [4, 96]


def _not_worth_sharing():
    plan = _exact([17, 18], shared=1, workers=1)
    assert [decision.shared for decision in plan.decisions] == [False]


def _shared_prefix():
    plan = _exact([4096 + 16 * i for i in range(1, 5)], shared=256, workers=1)
    assert [decision.shared for decision in plan.decisions] == [True]
    assert plan.keys_read == plan.keys_least


def _shared_window():
    plan = _exact([4200, 4204], shared=256, window=3000, workers=1)
    assert [0, 1] in [item["tokens"] for item in plan.items]


def _refused(call: Callable[[], object], message: str) -> None:
    """Demand a ValueError that says ``message``."""
    try:
        call()
    except ValueError as error:
        assert re.search(message, str(error)), error
    else:
        raise AssertionError(f"no error about {message}")


def _attend(plan, pages: int, **options):
    pool = mx.zeros((pages, 2, 4, 8))
    q = mx.zeros((plan.num_tokens, 8, 8))
    mx.eval(fast.paged_attention(q, pool, pool, plan=plan, **options))


def _larger_pool():
    plan = make([[9, 1]], [6])
    _refused(lambda: _attend(plan, 4), "page ids in")


def _short_mask():
    plan = make(distinct_tables([40, 10], 4), [40, 10])
    mask = mx.zeros((2, 12), mx.bool_)
    _refused(lambda: _attend(plan, 20, mask=mask), "mask must have a column")


def _bad_steps():
    for change, message in BAD_STEPS.values():
        step = dict(tables=[[0, 1]], lens=[6]) | change
        tables, lens = step.pop("tables"), step.pop("lens")
        _refused(lambda: make(tables, lens, **step), r"\[plan\] .*" + message)  # noqa: B023


def _advance():
    tables = distinct_tables([60, 40], PAGE, 1)
    plan = make(tables, [60, 40], page_size=PAGE)
    assert_exact(plan.advance(tables, [62, 41]), tables, [62, 41], PAGE)
    assert plan.advance(np.pad(tables, ((0, 0), (0, 1)), constant_values=30), [65, 40]) is None
    other = tables.copy()
    other[0, 3] = 31
    assert plan.advance(other, [62, 41]) is None


def _advance_in_a_window():
    tables = distinct_tables([60, 40], PAGE)
    plan = make(tables, [58, 36], page_size=PAGE, sliding_window=20)
    later = plan.advance(tables, [59, 37])
    assert_exact(later, tables, [59, 37], PAGE, window=20)


def _ends_in_a_shared_page():
    tables = [list(range(256))] * 8
    shared = dict(q_heads=64, kv_heads=8, workers=1)
    plan = _exact([4090] * 7 + [4085], tables=tables, **shared)
    for item in plan.items:
        if len(item["tokens"]) == 8:
            assert item["keys"][1] <= 4080
    equal = _exact([4085] * 8, tables=tables, **shared)
    assert [d.num_pages for d in equal.decisions] == [256]
    assert equal.advance(np.array(tables, np.int32), np.array([4086] * 7 + [4085])) is None


def _merged_in_the_order_of_keys():
    plan = _exact([236], page_size=32, window=150, fixed_partition=32)
    first_key = {item["partial"]: item["keys"][0] for item in plan.items}
    _, merged, _ = partial_slots(plan)
    keys = [first_key[part] for part in merged[0]]
    assert keys == sorted(keys) and len(keys) > 3


CASES: dict[str, Callable[[], object]] = {
    "decode": lambda: _exact([37, 64, 1, 0], page_size=4),
    "prefill": lambda: _exact([20, 9, 45], query_lens=[20, 3, 25]),
    "prefill, not causal": lambda: _exact([20, 9, 45], query_lens=[20, 3, 25], causal=False),
    "prefill, partitions": lambda: _exact(
        [70, 9], query_lens=[3, 2], page_size=4, fixed_partition=8
    ),
    "prefill, window": lambda: _exact([70, 9], query_lens=[9, 2], page_size=4, window=6),
    "partitions": lambda: _exact([50, 9, 33], page_size=4, fixed_partition=8),
    "partitions of a window": _partitions_of_a_window,
    "open pages": _open_pages,
    "rotated values": _rotated_values,
    "16 workers": _busy_workers,
    "a short step": _short_step,
    "a short step of a large GPU": _large_gpu,
    "a fresh prompt": _fresh_prompt,
    "longest first": _longest_first,
    "every kind": _every_kind,
    "two tiles": lambda: _exact([130], query_lens=[120], q_heads=8, kv_heads=1),
    "some need the prefix alone": lambda: _exact([4096, 4200], shared=256, workers=1),
    "same pages, other lengths": lambda: _exact(
        [4090, 4085], tables=[list(range(256))] * 2, workers=1
    ),
    "contexts that end in a shared page": _ends_in_a_shared_page,
    "merged in the order of keys": _merged_in_the_order_of_keys,
    "first and third share": _first_and_third_share,
    "three share unequally": _three_share_unequally,
    "100 sequences share": _hundred_share,
    "not worth sharing": _not_worth_sharing,
    "shared prefix": _shared_prefix,
    "shared window": _shared_window,
    "other windows": lambda: _exact([4200, 4300], shared=256, window=3000, workers=1),
    "ragged": _ragged,
    "a page filled differently": _page_filled_differently,
    "a plan for a larger pool": _larger_pool,
    "a mask that is too short": _short_mask,
    "bad steps": _bad_steps,
    "advance": _advance,
    "advance in a window": _advance_in_a_window,
}


def cases(mutant: Mutant) -> dict[str, Callable[[], None]]:
    """The suite, by name. A case fails by an exception."""
    return {name: partial(_demand, case) for name, case in CASES.items()}


def _demand(case: Callable[[], object]) -> None:
    case()
