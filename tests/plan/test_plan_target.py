"""What a plan is made for: the device that will run it."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from metal_on_host import metal_on_host
from paged_mlx import fast
from paged_mlx._native import _ext
from paged_mlx.machine import thresholds
from paged_mlx.testing import Case, backends
from threadgroups import CHIPS, CONTEXTS, MODELS, PAGE_SIZE, items_of, table

pytestmark = pytest.mark.native

HOST_CORES = 8
THREADGROUPS_PER_CORE = 4
THREADGROUPS_PER_BUSY_CORE = 2
ROOT = Path(__file__).resolve().parents[2]


def decode_plan(
    context_len, batch=1, kv_heads=2, gqa_factor=4, page_size=16, query_len=1, **options
):
    pages = -(-context_len // page_size)
    return fast.plan(
        np.arange(batch * pages, dtype=np.int32).reshape(batch, pages),
        [context_len] * batch,
        num_q_heads=kv_heads * gqa_factor,
        num_kv_heads=kv_heads,
        page_size=page_size,
        cu_seqlens_q=np.arange(batch + 1) * query_len,
        **options,
    )


def test_kernels_get_a_short_context_in_one_item_and_no_merge():
    with metal_on_host():
        plan = decode_plan(255)
    assert plan.num_items == {"vector": 0, "tile": 1, "wide": 0} and plan.num_merges == 0


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("model", MODELS)
def test_one_sequence_fills_a_gpu_from_256_tokens_on(model, chip):
    heads, cores = MODELS[model], CHIPS[chip]
    for context_len in (*range(256, 1100, 16), *CONTEXTS):
        threadgroups = heads[1] * items_of(heads, cores, context_len)
        pages = context_len // PAGE_SIZE
        assert threadgroups >= min(THREADGROUPS_PER_BUSY_CORE * cores, heads[1] * pages)
        most = THREADGROUPS_PER_CORE * cores + heads[1]  # the last row of items is not split
        assert threadgroups <= most or items_of(heads, cores, context_len) == 1


@pytest.mark.parametrize("model", MODELS)
def test_a_context_that_one_threadgroup_reads_in_few_steps_is_not_cut(model):
    for cores in CHIPS.values():
        assert items_of(MODELS[model], cores, 255) == 1


def test_sequences_that_fill_a_gpu_are_not_cut():
    heads = MODELS["Llama-3.1-8B, Qwen3-8B"]
    assert items_of(heads, CHIPS["M1"], 1000, batch=4) == 4
    assert items_of(heads, CHIPS["M4 Max"], 1000, batch=20) == 20


def test_the_table_of_threadgroups_in_the_docs_is_up_to_date():
    assert table() in (ROOT / "docs/metal.md").read_text()


@pytest.fixture
def noted():
    """Notes the limit of a pipeline, and forgets it after the test."""
    bodies = []

    def note(*body, threads, **formats):
        bodies.append((body, formats))
        _ext.note_pipeline(*body, threads, **formats)

    yield note
    for body, formats in bodies:
        _ext.note_pipeline(*body, 0, **formats)


@pytest.mark.parametrize(
    "gqa_factor, threads, per_core",
    # of 128 threads: of attend_vector, then of attend_tile
    [(1, 1024, 4), (1, 384, 3), (1, 128, 1), (4, 512, 4), (4, 256, 2), (4, 64, 4)],
)
def test_a_pipelines_limit_of_threads_bounds_the_threadgroups_of_a_core(
    noted, gqa_factor, threads, per_core
):
    body = gqa_factor, 64, 64, mx.float16
    noted(*body, threads=threads)
    with metal_on_host():
        of_body = decode_plan(65536, gqa_factor=gqa_factor, head_dim=64)
        others = [
            decode_plan(65536, gqa_factor=16, head_dim=64),
            decode_plan(65536, gqa_factor=gqa_factor, head_dim=128),
            decode_plan(65536, gqa_factor=gqa_factor, head_dim=64, dtype=mx.float32),
        ]
    assert 2 * sum(of_body.num_items.values()) == HOST_CORES * per_core
    for other in others:
        assert 2 * sum(other.num_items.values()) == HOST_CORES * THREADGROUPS_PER_CORE


@pytest.mark.parametrize("formats", [("q8", "q8"), ("q4", "q8")])
@pytest.mark.parametrize("gqa_factor", [1, 4])
def test_the_pipelines_of_formats_have_limits_of_their_own(noted, gqa_factor, formats):
    noted(gqa_factor, 64, 64, mx.float16, threads=256, formats=formats)
    with metal_on_host():
        dense, quantised = (
            decode_plan(
                65536, gqa_factor=gqa_factor, head_dim=64, page_size=64, k_format=k, v_format=v
            )
            for k, v in ((None, None), formats)
        )
    assert 2 * sum(dense.num_items.values()) == HOST_CORES * THREADGROUPS_PER_CORE
    assert 2 * sum(quantised.num_items.values()) == HOST_CORES * 2


def test_measured_thresholds_are_not_bounded_by_a_pipelines_limit(noted):
    noted(4, 64, 64, mx.float16, threads=128)
    with metal_on_host(), thresholds.planned_with("gpu", 2, workers_per_core=3):
        plan = decode_plan(65536, head_dim=64)
    assert 2 * sum(plan.num_items.values()) == HOST_CORES * 3


@pytest.mark.parametrize("kv_heads", [1, 2, 8])
def test_kernels_get_a_long_context_in_a_threadgroup_for_every_place_of_the_gpu(kv_heads):
    with metal_on_host():
        plan = decode_plan(65536, kv_heads=kv_heads)
    threadgroups = kv_heads * sum(plan.num_items.values())
    assert threadgroups == HOST_CORES * THREADGROUPS_PER_CORE


def test_many_long_contexts_fill_the_gpu_uncut():
    with metal_on_host():
        assert decode_plan(4096, batch=64).num_merges == 0


@pytest.mark.parametrize("dtype, head_dim", [(mx.float16, 64), (mx.float32, 64), (mx.float16, 512)])
def test_a_prefill_item_has_the_rows_of_one_threadgroup(dtype, head_dim):
    with metal_on_host():
        plan = decode_plan(512, query_len=512, dtype=dtype, head_dim=head_dim)
    _, rows = _ext.attention_body(10**6, head_dim, head_dim, dtype)
    assert {len(item["tokens"]) for item in plan.items} == {rows // 4}


def test_the_cpu_backend_has_items_of_its_own():
    with metal_on_host():
        of_kernels = decode_plan(512, query_len=512)
    of_cpu = decode_plan(512, query_len=512, stream=mx.cpu)
    assert sum(of_cpu.num_items.values()) < sum(of_kernels.num_items.values())


def test_either_device_runs_a_plan_of_the_other():
    problem = Case(
        dtype="float16", num_q_heads=4, page_size=8, sequences=((40, 70), (1, 90))
    ).build()
    (q, k_pages, v_pages, tables, lens), _ = backends.op_arguments(problem)

    def plan(stream=None):
        return fast.plan(
            tables, lens, num_q_heads=4, num_kv_heads=1, page_size=8, cu_seqlens_q=problem.cu_seqlens_q,
            stream=stream,
        )  # fmt: skip

    def right(plan):
        out, lse = fast.paged_attention(q, k_pages, v_pages, plan=plan, return_lse=True)
        return problem.judge(np.array(out.astype(mx.float32)), np.array(lse)).right

    of_cpu = plan(mx.cpu)
    with metal_on_host():
        of_kernels = plan()
        assert right(of_cpu)
    assert of_cpu.num_items != of_kernels.num_items
    assert right(of_kernels)


@pytest.mark.parametrize(
    "architecture, cores",
    [("applegpu_g13g", 8), ("applegpu_g14s", 30), ("applegpu_g15d", 60), ("", 8)],
)
def test_an_architecture_without_a_registry_entry_has_the_cores_of_its_size(architecture, cores):
    assert _ext.cores_of_architecture(architecture) == cores


def test_there_are_gpu_cores_where_there_is_a_gpu():
    assert (_ext.gpu_cores() > 0) == mx.metal.is_available()
