"""What the stand-in runs besides tests that are there anyway: see ``test_contract.py``."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from metal_on_host import metal_on_host
from mutants import contract_suite
from paged_mlx import PagePool, fast
from paged_mlx._native import _ext
from paged_mlx.testing import backends, grid, report, run_suite

from metal_contract.judge import is_loaded

HEADS, DIM, PAGE, CHUNK = 1, 16, 64, 2048


def test_the_stand_in_plays():
    assert is_loaded()


def test_the_graph_group_keeps_the_contract():
    checks = [check for check in grid.quick() if check.group == "graph"]
    with metal_on_host(instrument=False) as launches:
        result = run_suite(checks, [replace(backends.cpu(), name="MlxEncoder on the host")])
    assert result.right, report.failures(result)
    assert launches.findings == [] and launches.kernels.total() > len(checks)


def normal(tokens, seed):
    values = np.random.default_rng(seed).standard_normal((tokens, HEADS, DIM))
    return mx.array(values.astype(np.float16))


def read_prompt(length, read_before):
    """Write a prompt of which so many tokens are in the pool, chunk by chunk, and attend."""
    pool = PagePool(1, length // PAGE, PAGE, HEADS, DIM, mx.float16)
    if read_before:
        keys, values = normal(read_before, 1), normal(read_before, 2)
        pool.write(0, keys, values, np.arange(read_before, dtype=np.int32))
    for begin in range(read_before, length, CHUNK):
        keys, values = normal(CHUNK, begin + 3), normal(CHUNK, begin + 4)
        pool.write(0, keys, values, np.arange(begin, begin + CHUNK, dtype=np.int32))
        plan = fast.plan(
            [np.arange(length // PAGE)], [begin + CHUNK], num_q_heads=HEADS, num_kv_heads=HEADS,
            page_size=PAGE, cu_seqlens_q=[0, CHUNK], dtype=mx.float16, head_dim=DIM,
        )  # fmt: skip
        out = pool[0].attend(normal(CHUNK, begin + 5), plan)
    mx.eval(out, pool.state)
    return np.array(out.astype(mx.float32))


@pytest.mark.parametrize(
    "length, read_before", [(16384, 0), pytest.param(65536, 65536 - CHUNK, marks=pytest.mark.long)]
)
def test_a_long_prompt_is_handed_to_the_gpu_node_by_node(length, read_before):
    expected = read_prompt(length, read_before)
    encoders = {}

    def record(dispatch):
        if dispatch["kernel"].startswith("attend"):
            encoders.setdefault(dispatch["order"][0], []).append(dispatch)
        return dispatch

    _ext.set_node_work(CHUNK * length * HEADS * DIM / 4)
    try:
        with metal_on_host(instrument=False, change=record) as launches:
            out = read_prompt(length, read_before)
    finally:
        _ext.set_node_work(0)
    assert launches.findings == []
    np.testing.assert_allclose(out, expected, atol=2e-3)
    chunks = (length - read_before) // CHUNK
    assert len(encoders) > chunks, "no chunk is several nodes, each in a command buffer of its own"


@pytest.mark.long
def test_the_model_of_the_demo_answers(monkeypatch):
    mlx_lm = pytest.importorskip("mlx_lm")
    import paged_mlx
    from paged_mlx.mlx_lm.demo import smollm2

    try:
        model, tokenizer = smollm2.load()
    except RuntimeError as error:
        pytest.skip(f"SmolLM2 cannot be had: {error}")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True)

    def answer():
        with paged_mlx.enable(model):
            return mlx_lm.generate(model, tokenizer, prompt, max_tokens=4)

    # It waits for all streams and holds the interpreter, which the launches need.
    monkeypatch.setattr(mx, "clear_cache", lambda: None)
    expected = answer()
    with metal_on_host(instrument=False) as launches:
        assert answer() == expected
    assert launches.findings == [] and launches.kernels["write_pages"] > 0


@pytest.mark.parametrize("name", sorted(contract_suite.cases(None)))
def test_a_case_of_the_mutants_passes(name):
    assert contract_suite.cases(None)[name]() is None
