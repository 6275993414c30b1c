"""The library passes its conformance suite, and the suite's own runner says what it must."""

import json
from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from paged_mlx import PagePool, PageTable
from paged_mlx.pool import PoolLayer
from paged_mlx.testing import (
    Backend,
    Case,
    Check,
    backends,
    grid,
    report,
    run,
    run_suite,
    small,
)
from paged_mlx.testing.__main__ import main
from paged_mlx.testing.shrink import shrink, snippet
from planted import reference, walk
from planted.faults import ContextShort, DropPage

REFERENCE = reference()


def library_backends():
    return [b for b in (backends.cpu(), backends.metal()) if b is not None]


@pytest.mark.parametrize("group", [g for g in grid.GROUPS if g != "large"])
@pytest.mark.parametrize("backend", library_backends(), ids=lambda b: b.name)
def test_quick_suite_passes(backend, group):
    checks = [check for check in grid.quick() if check.group == group]
    result = run_suite(checks, [backend])
    cell = result.cell(group, backend.name)
    assert cell.cases == len(checks), "every check of the quick run is offered"
    assert result.right, report.failures(result)


@pytest.mark.parametrize("backend", library_backends(), ids=lambda b: b.name)
def test_suite_for_slow_backends_passes(backend):
    result = run_suite(small.checks(), [backend])
    assert result.right, report.failures(result)


@pytest.mark.long
@pytest.mark.parametrize("backend", library_backends(), ids=lambda b: b.name)
def test_long_suite_passes(backend):
    result = run_suite(grid.long(), [backend])
    assert result.right, report.failures(result)


@pytest.mark.long
@pytest.mark.parametrize("check", grid.large(), ids=str)
@pytest.mark.parametrize("backend", library_backends(), ids=lambda b: b.name)
def test_pages_beyond_2_to_31_elements_are_read(backend, check):
    """About 5 GiB of memory."""
    outcome = run(check, backend)
    assert outcome.right, outcome.reason


def test_mlx_arrays_carry_every_bit_there_and_back():
    bits = np.arange(2**16, dtype=np.uint16)
    assert (backends.from_mlx(backends.to_mlx(bits, "bfloat16")) == bits).all()
    halves = bits.view(np.float16)
    returned = backends.from_mlx(backends.to_mlx(halves, "float16"))
    assert (returned.view(np.uint16) == bits).all()
    assert backends.to_mlx(bits, "bfloat16").dtype == mx.bfloat16


def test_report_counts_cases_failures_and_what_is_not_offered():
    checks = [Check("grid", Case()), Check("grid", Case(seed=1)), Check("pages", Case(), "write")]
    broken = Backend("broken", partial(walk.attend, fault=ContextShort()))
    result = run_suite(checks, [REFERENCE, broken], shrink_seconds=1)
    assert not result.right
    text = report.table(result)
    assert "2 (2 FAILED)" in text and "not offered" in text
    record = json.loads(report.to_json(result, run="quick"))
    by_backend = {(c["group"], c["backend"]): c for c in record["cells"]}
    assert by_backend["grid", "reference"]["failed"] == 0
    assert by_backend["grid", "broken"]["failed"] == 2
    assert by_backend["pages", "broken"]["skipped"] == 1
    assert record["run"] == "quick" and record["right"] is False


def test_a_backend_that_raises_fails_the_check():
    def attend(problem):
        raise RuntimeError("no such kernel")

    outcome = run(Check("grid", Case()), Backend("raises", attend))
    assert not outcome.right and "no such kernel" in outcome.reason


def test_a_failure_shrinks_to_a_case_that_still_fails():
    broken = Backend("broken", partial(walk.attend, fault=DropPage(0)))
    case = Case(
        dtype="bfloat16",
        num_q_heads=8,
        num_kv_heads=2,
        sequences=((1, 7), (9, 200), (1, 90)),
        mask="boolean",
        alibi=1.0,
    )
    smallest = shrink(Check("grid", case), broken, seconds=5)
    assert not run(smallest, broken).right
    assert len(smallest.case.sequences) == 1
    assert smallest.case.mask is None and smallest.case.alibi == 0.0
    assert smallest.case.num_q_heads == 1
    assert smallest.case.sequences[0][1] <= 17


def test_a_failure_prints_as_python_that_runs_it_again(capsys):
    check = Check("numbers", Case(sinks=float("-inf"), seed=3))
    exec(snippet(check, backends.cpu()), {})
    assert "Outcome(right=True" in capsys.readouterr().out


def test_command_line_prints_the_table_and_writes_the_record(tmp_path, capsys):
    target = tmp_path / "record.json"
    status = main(["--backend", "cpu", "--group", "poison", "--json", str(target)])
    assert status == 0
    assert capsys.readouterr().out.splitlines()[0].startswith("group")
    assert json.loads(target.read_text())["right"] is True


def any_program_fails(programs=12):
    return any(not run(check, backends.cpu()).right for check in GRAPH[:programs])


GRAPH = [check for check in grid.quick() if check.group == "graph"]


def test_programs_see_a_copy_on_write_that_copies_nothing(monkeypatch):
    monkeypatch.setattr(PagePool, "copied", lambda pool, pairs: None)
    assert any_program_fails()


@pytest.mark.native
def test_programs_see_reads_that_later_writes_do_not_wait_for(monkeypatch):
    attend = PoolLayer.attend

    def attend_and_forget(layer, *arguments, **options):
        versions = list(layer.arrays)
        out = attend(layer, *arguments, **options)
        layer.arrays[:] = versions
        return out

    monkeypatch.setattr(PoolLayer, "attend", attend_and_forget)
    assert any_program_fails()


def test_programs_see_writes_that_reach_one_layer_only(monkeypatch):
    write = PagePool.write

    def write_the_first_layer(pool, layer, k, v, slots):
        write(pool, layer, k if layer == 0 else k * 0, v, slots)

    monkeypatch.setattr(PagePool, "write", write_the_first_layer)
    assert any_program_fails()


def test_programs_see_a_page_that_is_free_too_early(monkeypatch):
    fork = PageTable.fork

    def fork_without_sharing(table):
        twin = fork(table)
        for page_id in table.page_ids:
            table.allocator.free_page(page_id)
        return twin

    monkeypatch.setattr(PageTable, "fork", fork_without_sharing)
    assert any_program_fails()
