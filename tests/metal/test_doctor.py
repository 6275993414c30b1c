"""The doctor finds what is wrong, and says so in its exit status."""

import contextlib
import json
from dataclasses import replace

import mlx.core as mx
import pytest
from metal_on_host import metal_on_host
from paged_mlx._native import _ext
from paged_mlx.cli import main as commands
from paged_mlx.machine import doctor
from paged_mlx.machine.cold_start import MODELS, counted, first_token
from paged_mlx.machine.doctor_on_gpu import TO_LOOK_AT, Finding, trials
from paged_mlx.testing import backends
from paged_mlx.testing.checks import run as run_check


def wrong(problem):
    out, lse = backends.cpu().attend(problem)
    return out * 1.01, lse


def test_a_machine_that_is_right_gets_exit_status_0_and_a_report(tmp_path, monkeypatch, capsys):
    path, some = tmp_path / "report.json", list(doctor.small.checks())[::8]
    monkeypatch.setattr(doctor.small, "checks", lambda: some)
    monkeypatch.setattr(doctor, "HEAD_DIMS", (64, 80))
    assert commands.main(["doctor", "--only", "cpu", "--json", str(path)]) == 0
    printed, record = capsys.readouterr().out, json.loads(path.read_text())
    assert record["right"] and record["mlx"] in printed
    assert {cell["backend"] for cell in record["cells"]} == {
        f"cpu {isa}" for isa in _ext.isa_names()
    }
    assert all(cell["cases"] > 0 and cell["failed"] == 0 for cell in record["cells"])


def test_a_wrong_kernel_gets_exit_status_1_and_a_report_with_the_failing_case(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    case = doctor.one_of_each()[0]
    ill = doctor.Examination(replace(backends.cpu(), attend=wrong), [case])
    monkeypatch.setattr(doctor, "examinations", lambda *_: [ill])
    assert doctor.main([]) == 1
    record = json.loads((tmp_path / doctor.REPORT).read_text())
    assert not record["right"] and "Case(" in record["cells"][0]["failures"][0]["snippet"]
    assert doctor.REPORT in capsys.readouterr().out


def test_every_instruction_set_is_examined_with_its_own_kernels():
    before = _ext.isa()
    seen = []
    for patient in doctor.examinations("cpu"):
        with patient.inside:
            seen.append(_ext.isa())
    assert seen == _ext.isa_names() and _ext.isa() == before


def test_a_checkout_examines_the_metal_text_and_every_kernel_of_it():
    (patient,) = doctor.examinations("host")
    with metal_on_host() as launches:
        result = doctor.examine([replace(patient, inside=doctor.contextlib.nullcontext())])
    assert result.right and launches.findings == []
    wanted = {
        "attend_vector", "attend_tile", "merge", "merge_states",
        "write_pages", "copy_pages", "gather_pages",
    }  # fmt: skip
    assert wanted <= set(launches.kernels)


def test_the_body_checks_ask_for_every_body():
    rows = {"vector body": (1, 2), "tile body": (4, 8, 16), "prompts": (40, 160)}
    for check in doctor.bodies():
        case = check.case
        longest = max(query_len for query_len, _ in case.sequences)
        wanted = rows.get(check.group, (4,))
        assert longest * case.gqa_factor in wanted


def test_no_checks_is_not_all_right(capsys):
    if mx.metal.is_available():
        pytest.skip("there is a GPU here")
    assert commands.main(["doctor", "--only", "metal"]) == 2
    out, err = capsys.readouterr()
    assert "No checks" in err and "All right" not in out


def test_json_alone_is_all_that_is_printed(capsys, monkeypatch):
    sound = doctor.Examination(backends.cpu(), [doctor.one_of_each()[0]])
    monkeypatch.setattr(doctor, "examinations", lambda *_: [sound])
    assert doctor.main(["--only", "cpu", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["right"] and any("first token" in f["name"] for f in record["measured"])


def test_a_doctor_without_a_gpu_names_what_to_look_at_on_a_mac(capsys, monkeypatch):
    sound = doctor.Examination(backends.cpu(), [doctor.one_of_each()[0]])
    monkeypatch.setattr(doctor, "examinations", lambda *_: [sound])
    monkeypatch.setattr(doctor.mx.metal, "is_available", lambda: False)
    doctor.main(["--only", "cpu"])
    printed = capsys.readouterr().out
    assert len(TO_LOOK_AT) == 10 and all(what in printed for what, _ in TO_LOOK_AT)


@pytest.mark.parametrize("name", MODELS)
def test_a_first_token_compiles_at_most_8_libraries(name):
    found = first_token(MODELS[name])
    kernels = {library.removeprefix("paged_mlx_").split("_T_")[0] for library in found.libraries}
    assert {"attend_tile", "merge", "write_pages"} <= {k.split("_UNIT")[0] for k in kernels}
    assert len(found.libraries) <= 8


def test_the_doctor_of_a_gpu_compiles_at_most_60_libraries_and_all_of_it_more():
    backend = backends.cpu()

    def asked_by(checks):
        with counted() as found:
            for check in checks:
                with contextlib.suppress(Exception):  # nothing runs: results are garbage
                    run_check(check, backend)
        return found

    usual = asked_by(doctor.usual())
    assert 20 < len(usual.libraries) <= 60
    for kernel in ("attend_vector", "attend_tile", "merge", "write_pages", "gather_pages"):
        assert any(kernel in name for name in usual.libraries)
    assert len(asked_by(doctor.bodies()).libraries) > len(usual.libraries)


def test_trials_run_on_a_gpu_that_the_host_stands_for():
    with metal_on_host(instrument=False) as launches:
        found = list(
            trials(
                backends.cpu(),
                decodes=((1, 40),),
                prompts=(24,),
                long_prompt=70,
                rounds=2,
                head_dim=16,
            )
        )
    assert [f.right for f in found] == [True, True, None, None]
    assert launches.kernels["attend_tile"] > 0 and launches.kernels["write_pages"] > 0


def test_a_long_prompt_that_is_wrong_is_said_to_be(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sound = doctor.Examination(backends.cpu(), [doctor.one_of_each()[0]])
    monkeypatch.setattr(doctor, "examinations", lambda *_: [sound])
    monkeypatch.setattr(doctor, "gpu_trials", lambda: [Finding("a prompt", "error 1", False)])
    assert doctor.main(["--json"]) == 1
    assert doctor.main([]) == 1
    assert "WRONG" in capsys.readouterr().out
