"""Fresh prompts go to MLX's attention where the plan says that this is the faster route."""

import mlx.core as mx
import numpy as np
import pytest
from metal_on_host import metal_on_host
from paged_mlx import fast
from paged_mlx.forward import fresh_prompt
from paged_mlx.machine import thresholds
from paged_mlx.options import AttentionOptions
from paged_mlx.testing import Case, backends

pytestmark = pytest.mark.native


def plan(query_lens, lens=None, *, least=4, device="cpu", dtype=mx.float32, head_dim=64, **options):
    lens = query_lens if lens is None else lens
    tables = np.full((len(lens), 4), -1, np.int32)
    for b in range(len(lens)):
        tables[b] = range(4 * b, 4 * b + 4)
    with thresholds.planned_with(device, dtype.size, sdpa_prompt=least):
        return fast.plan(
            tables, lens, cu_seqlens_q=np.cumsum([0, *query_lens]), num_q_heads=4, num_kv_heads=2,
            page_size=16, dtype=dtype, head_dim=head_dim, stream=mx.cpu if device == "cpu" else None,
            **options,
        )  # fmt: skip


def test_a_plan_knows_a_fresh_prompt():
    assert plan([40]).fresh_prompt and plan([40, 9, 0], [40, 9, 5]).fresh_prompt
    assert not plan([40], [41]).fresh_prompt  # a later chunk
    assert not plan([40, 1], [40, 30]).fresh_prompt  # a decode beside it
    assert not plan([40, 3]).fresh_prompt  # too short
    assert not plan([40], causal=False).fresh_prompt
    assert not plan([40], sliding_window=39).fresh_prompt
    assert plan([40], sliding_window=40).fresh_prompt


def test_the_cpu_backend_keeps_prompts_on_pages_unless_it_was_measured():
    lens = [60]
    options = dict(num_q_heads=4, num_kv_heads=2, page_size=16)
    kept = fast.plan([[0, 1, 2, 3]], lens, cu_seqlens_q=[0, 60], stream=mx.cpu, **options)
    assert not kept.fresh_prompt


@pytest.mark.parametrize("head_dim, fused", [(64, True), (80, True), (128, True), (96, False)])
def test_a_gpu_sends_prompts_of_the_head_dims_that_mlx_has_a_fused_kernel_for(head_dim, fused):
    with metal_on_host():
        assert plan([60], least=64, device="gpu", head_dim=head_dim).fresh_prompt is False
        assert plan([60], least=60, device="gpu", head_dim=head_dim).fresh_prompt is fused


def test_a_plan_that_was_advanced_is_no_fresh_prompt():
    first = plan([40])
    tables = [[0, 1, 2, 3]]
    later = first.advance(tables, [41], [0, 40])
    assert first.fresh_prompt and later is not None and not later.fresh_prompt
    assert first.advance(tables, [40], [0, 40]).fresh_prompt


@pytest.mark.parametrize("sinks", [None, 1.0])
@pytest.mark.parametrize("sequences", [((40, 40),), ((40, 40), (9, 9))])
def test_the_route_agrees_with_the_oracle_and_is_counted(sequences, sinks):
    case = Case(dtype="float32", num_q_heads=4, num_kv_heads=2, head_dim=64, sequences=sequences)
    problem = case.replace(sinks=sinks).build()
    (q, *_), _ = backends.op_arguments(problem)
    k, v = (
        mx.array(np.concatenate(parts).astype(np.float32))
        for parts in (problem.keys, problem.values)
    )
    own = AttentionOptions(sinks=None if problem.sinks is None else mx.array(problem.sinks))
    step = plan([n for n, _ in sequences])
    assert fresh_prompt.takes(step, own)
    before = fresh_prompt.calls[len(sequences)]
    out = fresh_prompt.attend(q, k, v, step, own)
    assert fresh_prompt.calls[len(sequences)] == before + 1
    assert problem.judge(np.array(out), None).right


@pytest.mark.parametrize(
    "options", [dict(softcap=3.0), dict(alibi_slopes=mx.ones(4)), dict(mask=mx.ones((40, 40)) > 0)]
)
def test_options_that_mlx_does_not_take_stay_on_pages(options):
    assert not fresh_prompt.takes(plan([40]), AttentionOptions(**options))
