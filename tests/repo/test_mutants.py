"""Planted faults are caught. The whole list: ``make mutants``."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import metal_host
import mutants
import pytest
from metal_contract import build
from mutants import MUTANTS, native
from mutants.runner import attempt, attempt_all
from mutants.trial import cases_of

pytestmark = pytest.mark.skipif(
    bool(metal_host.unsupported() or native.unsupported()),
    reason=str(metal_host.unsupported() or native.unsupported()),
)

#: One or two of every layer, and of every kind of defect: addresses, limits, barriers, softmax,
#: options, bindings, scratch, coverage, equality, versions.
QUICK = [
    "page_walk: the page before is read in place of the next",
    "softmax: the sink counts once per partition",
    "attend_tile: no barrier before the weights are read",
    "write_pages: slot -1 is written",
    "launch_attention: K bound in place of V",
    "launch_attention: partials of one head only",
    "mlx_encoder: an output is registered as an input",
    "mlx_encoder: scratch memory is dropped with the node",
    "planner: a set of tokens is taken for a run of them",
    "partition: a page between two pieces is dropped",
    "cpu rows: the window is one key too wide",
    "cpu tile_block: values are not rescaled",
    "ops attention: attentions of other options are one",
    "ops page_rows: slot -1 is written",
    "python pool: every layer is layer 0",
    "python pages/append: no page is copied before a write",
    "python prefix/cache: a hit takes all tokens",
]


def test_every_mutant_has_a_name_and_a_place():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    for mutant in MUTANTS:
        assert mutant.text != mutants.mutant.ROOT.joinpath(mutant.file).read_text()


def test_the_list_is_long_enough():
    count = {layer: sum(mutant.layer == layer for mutant in MUTANTS) for layer in mutants.LAYERS}
    assert count["kernels"] + count["launch"] >= 30
    assert count["planner"] + count["cpu"] >= 30
    assert count["ops"] >= 40 and count["python"] >= 120


#: Layers whose suites run with the project's own native module.
IN_PLACE = [layer for layer in mutants.LAYERS if layer != "contract"]


@pytest.mark.parametrize("layer", IN_PLACE)
def test_the_suites_pass_without_a_fault(layer):
    own = [mutant for mutant in MUTANTS if mutant.layer == layer]
    cases = cases_of(own[0])
    assert {mutant.seen_by for mutant in own} <= set(cases)
    wanted = {mutant.seen_by for mutant in own if mutant.name in QUICK}
    reasons = {name: case() for name, case in cases.items() if name in wanted - {"pipeline names"}}
    assert not any(reasons.values()), reasons


def test_the_sample_has_a_mutant_of_every_layer():
    assert {mutants.find(name).layer for name in QUICK} == set(mutants.LAYERS)


@pytest.mark.parametrize("name", QUICK)
def test_a_planted_fault_is_caught(name):
    verdict = attempt(mutants.find(name))
    assert verdict.caught, verdict.reason


@pytest.mark.long
def test_every_planted_fault_is_caught():
    found = attempt_all(MUTANTS, os.cpu_count() or 1)
    assert [str(verdict) for verdict in found if not verdict.caught] == []


@pytest.mark.long
@pytest.mark.parametrize("layer", IN_PLACE)
def test_every_case_passes_without_a_fault(layer):
    own = next(
        mutant for mutant in MUTANTS if mutant.layer == layer and "variant" not in mutant.name
    )
    reasons = {name: case() for name, case in cases_of(own).items() if name != "pipeline names"}
    assert not any(reasons.values()), reasons


def test_a_module_that_another_trial_removes_stops_no_trial(tmp_path, monkeypatch):
    monkeypatch.setattr(native, "_KEPT", 1)
    for age, name in enumerate(["old", "new"]):
        (tmp_path / f"{name}.so").touch()
        os.utime(tmp_path / f"{name}.so", (age, age))
    (tmp_path / "gone.so").symlink_to(tmp_path / "nowhere")
    native._prune(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gone.so", "new.so"]


def test_two_builds_over_the_stand_in_at_once_compile_it_once(tmp_path, monkeypatch):
    compiled = []

    def compile_slowly(base, source, output):
        compiled.append(source)
        time.sleep(0.05)
        output.touch()

    base = SimpleNamespace(identity="any", directory=tmp_path / "base")
    monkeypatch.setattr(native, "cache", lambda: tmp_path)
    monkeypatch.setattr(native, "project", lambda: base)
    monkeypatch.setattr(build, "_compile", compile_slowly)
    monkeypatch.setattr(build, "_link", lambda base, objects, output: output.touch())
    with ThreadPoolExecutor(2) as pool:
        made = [pool.submit(build.build) for _ in range(2)]
    assert made[0].result() == made[1].result() and made[0].result().exists()
    assert sorted(compiled) == sorted(build._sources())
