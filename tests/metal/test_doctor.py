"""The doctor finds what is wrong, and says so in its exit status."""

import json
from dataclasses import replace

import pytest
from metal_on_host import metal_on_host
from paged_mlx import __main__ as commands
from paged_mlx import doctor
from paged_mlx._native import _ext
from paged_mlx.testing import backends


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
    monkeypatch.setattr(doctor, "examinations", lambda only: [ill])
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
    rows = {"vector body": (1, 2), "tile body": (4, 8, 16), "wide body": (40, 160)}
    for check in doctor.bodies():
        case = check.case
        longest = max(query_len for query_len, _ in case.sequences)
        wanted = rows.get(check.group, (4,))
        assert longest * case.gqa_factor in wanted


@pytest.mark.parametrize("arguments, status", [([], 0), (["--help"], 0), (["heal"], 2)])
def test_without_a_command_the_commands_are_listed(arguments, status, capsys):
    assert commands.main(arguments) == status
    printed = capsys.readouterr().out
    assert "doctor" in printed and "make bench" in printed
