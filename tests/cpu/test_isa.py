"""Every instruction set's kernels, on the one machine there is; any number of threads."""

import emulated_isa
import mlx.core as mx
import numpy as np
import pytest
from mutants import native
from paged_mlx import fast
from paged_mlx._native import _ext
from paged_mlx.testing import Case, Check, backends, report, run, run_suite, small


@pytest.fixture
def restored():
    threads = _ext.num_threads()
    yield
    _ext.set_isa("")
    _ext.set_num_threads(threads)


@pytest.mark.parametrize("isa", _ext.isa_names())
def test_the_suite_passes_on_every_instruction_set(isa, restored):
    assert _ext.set_isa(isa) and _ext.isa() == isa
    result = run_suite(small.checks(), [backends.cpu()])
    assert result.right, report.failures(result)


@pytest.mark.skipif(bool(native.unsupported()), reason=str(native.unsupported()))
@pytest.mark.parametrize("isa", sorted(set(emulated_isa.NAMES) - set(_ext.isa_names())))
def test_the_suite_passes_on_an_instruction_set_that_the_machine_lacks(isa):
    assert emulated_isa.run_small_suite(isa) == ""


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("vectors, rows", [(1, 5), (2, 10), (3, 9), (4, 8)])
@pytest.mark.parametrize("isa", _ext.isa_names())
def test_rows_fill_panels_of_any_number_of_vectors(isa, vectors, rows, head_dim, restored):
    """So many vectors of rows are fewest without idle lanes in panels of so many."""
    assert _ext.set_isa(isa)
    lanes = {"v2": 4, "v3": 8, "neon": 4}.get(isa, 16)
    tokens = rows * lanes
    case = Case(
        num_q_heads=4, num_kv_heads=4, head_dim=head_dim, sequences=((tokens, tokens + 100),)
    )
    outcome = run(Check("", case), backends.cpu())
    assert outcome.right, outcome.reason


def test_an_unknown_instruction_set_changes_nothing(restored):
    before = _ext.isa()
    assert not _ext.set_isa("v9") and _ext.isa() == before


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_threads_change_no_bit(dtype, restored):
    rng = np.random.default_rng(0)
    lens, page_size = [3000, 17, 900], 16
    tables = np.arange(3 * 188, dtype=np.int32).reshape(3, 188)
    q, k, v = (
        mx.array(rng.standard_normal(shape).astype(np.float32)).astype(dtype)
        for shape in [(42, 8, 64), (564, 2, page_size, 64), (564, 2, page_size, 64)]
    )
    plan = fast.plan(
        tables, lens, num_q_heads=8, num_kv_heads=2, page_size=page_size,
        cu_seqlens_q=[0, 1, 2, 42], workers=4,
    )  # fmt: skip
    assert plan.num_partials > 0 and plan.num_items["wide"] > 0
    outs = []
    for threads in (1, 2, 5):
        _ext.set_num_threads(threads)
        out, lse = fast.paged_attention(q, k, v, plan=plan, return_lse=True)
        mx.eval(out, lse)
        outs.append((out, lse))
    for out, lse in outs[1:]:
        assert mx.array_equal(out, outs[0][0]) and mx.array_equal(lse, outs[0][1])
