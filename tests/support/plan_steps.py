"""Small steps for the planner, bad ones too, and what an exact plan is."""

from collections import Counter

import mlx.core as mx
import numpy as np
from paged_mlx import fast
from paged_mlx._native import _ext
from paged_mlx.attention_plan import AttentionPlan, Geometry, PlanOptions
from plan_coverage import expected_reads, partial_slots, planned_reads

SEALED = 100  # ids from here on are open pages, in the plans of make_open


def distinct_tables(lens, page_size, shared_pages=0, first=0):
    """Tables whose first `shared_pages` entries are common and the others their own."""
    width = max(-(-n // page_size) for n in lens)
    tables = np.full((len(lens), max(1, width)), -1, np.int32)
    page = first + shared_pages
    for b, n in enumerate(lens):
        count = -(-n // page_size)
        shared = min(shared_pages, count)
        tables[b, :shared] = np.arange(first, first + shared)
        tables[b, shared:count] = np.arange(page, page + count - shared)
        page += count - shared
    return tables


def make(tables, lens, *, q_heads=8, kv_heads=2, page_size=4, **options):
    return fast.plan(
        tables, lens, num_q_heads=q_heads, num_kv_heads=kv_heads, page_size=page_size, **options
    )


def make_open(
    tables, lens, *, cu=None, starts=None, page_lens=None, kv_heads=2, page_size=4, **options
):
    """The plan of a pool with ``SEALED`` sealed pages."""
    arguments = dict(
        num_pages=-1, causal=True, sliding_window=0, share_prefixes=True, fixed_partition=0,
        workers=1, kernels=False, num_sealed_pages=SEALED,
    ) | options  # fmt: skip
    ints = {
        name: None if values is None else np.array(values, np.int32)
        for name, values in (
            ("block_tables", tables), ("context_lens", lens), ("cu_seqlens_q", cu),
            ("page_starts", starts), ("page_lens", page_lens),
        )
    }  # fmt: skip
    native = _ext.NativePlan(
        op="plan", num_q_heads=8, num_kv_heads=kv_heads, page_size=page_size, dtype=mx.float32,
        head_dim=64, v_head_dim=64, **ints, **arguments,
    )  # fmt: skip
    geometry = Geometry(8, kv_heads, page_size, 64, 64, mx.float32)
    return AttentionPlan(native, geometry, PlanOptions())


def assert_exact(plan, tables, lens, page_size, **options):
    assert planned_reads(plan) == expected_reads(tables, lens, page_size, **options)
    written, merged, finished = partial_slots(plan)
    assert sorted(written) == list(range(plan.num_partials))
    for token in range(plan.num_tokens):
        slots = Counter({slot: 1 for slot, owner in written.items() if owner == token})
        if finished[token]:
            assert finished[token] == 1 and not slots and token not in merged
        else:
            assert merged[token] == slots


BAD_STEPS = {
    "an empty batch": (dict(tables=np.zeros((0, 1), np.int32), lens=[]), "at least one sequence"),
    "a page size of 0": (dict(page_size=0), "page_size must be a whole number of at least 1; got"),
    "heads that do not divide": (dict(q_heads=5), "multiple of num_kv_heads = 2; got 5"),
    "a negative length": (dict(lens=[-1]), "context_lens must be at least 0; got -1"),
    "a length without pages": (dict(lens=[9]), "covered by the pages .* got 9"),
    "NO_PAGE in the context": (dict(tables=[[0, -1]]), "covered by the pages .* got 6"),
    "a negative page id": (dict(tables=[[0, -7]]), "page ids that are not negative; got -7"),
    "a page outside the pool": (dict(tables=[[0, 8]], num_pages=8), r"page ids in \[0, 8\)"),
    "a query longer than its context": (dict(cu_seqlens_q=[0, 7]), "got 7 query tokens"),
    "a first offset that is not 0": (dict(cu_seqlens_q=[1, 2]), "must start with 0; got 1"),
    "decreasing offsets": (
        dict(tables=[[0, 1], [2, 3]], lens=[6, 6], cu_seqlens_q=[0, 2, 1]),
        "must not decrease; got 2 before 1",
    ),
    "a wrong number of offsets": (dict(cu_seqlens_q=[0, 1, 2]), "must match batch"),
    "a wrong number of lengths": (dict(lens=[6, 6]), "context_lens must match batch = 1"),
    "a flat table": (dict(tables=[0, 1]), r"block_tables must have shape \[batch, max_pages\]"),
    "fractions": (dict(lens=[6.5]), "context_lens must hold integers"),
    "a length at the end of the world": (dict(lens=[2**31 - 1]), "at most 2.31 - 1 - page_size"),
    "a window of 0": (
        dict(sliding_window=0),
        "sliding_window must be a whole number of at least 1",
    ),
    "page_starts alone": (dict(page_starts=[[0, 4]]), "must be given together"),
    "a gap between pages": (
        dict(page_starts=[[0, 4]], page_lens=[[3, 4]]),
        r"continue where the entry before ends \(3\); got 4",
    ),
    "more tokens than fit": (
        dict(page_starts=[[0, 5]], page_lens=[[5, 4]]),
        r"page_lens must be in \[0, page_size = 4\]; got 5",
    ),
    "ids beyond 32 bits": (dict(tables=np.array([[0, 2**40]])), "must fit in 32 bits"),
}
