"""Counts of the kernels that served: one for each call, where it ran, and for each item."""

import mlx.core as mx
import pytest
from metal_on_host import metal_on_host
from paged_mlx import PagePool, PageTable
from paged_mlx._native import BUILT
from paged_mlx.machine.routes import ITEMS, in_words, kernel_routes, since

needs_kernels = pytest.mark.skipif(not BUILT, reason="MLX's own operations run here")


def attend(query_len, contexts=(40,), num_q_heads=4, times=1):
    """Attention of a pool's layer; returns the plan."""
    pool = PagePool(1, 32, 8, 2, 64)
    tables = [PageTable(8) for _ in contexts]
    for table, context in zip(tables, contexts):
        table.append_tokens(context, pool.allocator)
    query_lens = [query_len] * len(tables)
    plan = pool.plan(tables, num_q_heads=num_q_heads, query_lens=query_lens)
    q = mx.zeros((sum(query_lens), num_q_heads, 64), mx.float16)
    for _ in range(times):
        mx.eval(pool[0].attend(q, plan))
    return plan


def test_every_call_is_counted_once_where_it_ran():
    before = kernel_routes()
    attend(1, times=3)
    (place,) = since(before)["PagedAttention"]
    assert place == ("cpu" if BUILT else "mlx")
    assert since(before)["PagedAttention"][place] == 3


@needs_kernels
@pytest.mark.parametrize("query_len, kind", [(1, "vector"), (4, "tile"), (40, "wide")])
def test_items_are_counted_by_the_body_that_attends_them(query_len, kind):
    before = kernel_routes()
    plan = attend(query_len, times=2)
    wanted = {f"{k} items": {"cpu": 2 * n} for k, n in plan.num_items.items() if n}
    if plan.num_merges:
        wanted["merges"] = {"cpu": 2 * plan.num_merges}
    assert f"{kind} items" in wanted
    assert {name: places for name, places in since(before).items() if name in ITEMS} == wanted


@needs_kernels
def test_metal_kernels_on_the_host_are_told_from_the_cpus():
    with metal_on_host(instrument=False):
        before = kernel_routes()
        plan = attend(1)
        found = since(before)
    assert found["PagedAttention"] == {"host": 1}
    assert found["vector items"] == {"host": plan.num_items["vector"]}
    assert "Metal kernels, run on the CPU" in in_words(found)


def test_nothing_has_run_is_said_too():
    assert in_words({}) == "no kernel has run"
