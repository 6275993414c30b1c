"""``python -m benchmarks``: names that it knows, records where they are wanted, tables as they are."""

import json
import sys
from pathlib import Path

import pytest
from paged_mlx.machine.bench.measure import Candidate, Case

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks import __main__ as benchmarks
from benchmarks import harness, table


def run(*arguments):
    try:
        return benchmarks.main(list(arguments))
    except SystemExit as end:
        return end.code


def test_help_names_the_benchmarks_and_runs_none(capsys):
    assert run("--help") == 0
    shown = capsys.readouterr().out
    assert "cpu_decode" in shown and "==" not in shown


@pytest.mark.parametrize("name", ["foo", "cpu-decode"])
def test_an_unknown_name_is_exit_code_2_with_those_that_there_are(name, capsys):
    assert run("attention", name) == 2
    out, err = capsys.readouterr()
    assert out == "" and f"no benchmark {name};" in err and "cpu_decode" in err


def test_records_go_where_they_are_wanted(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "_folder", harness.RESULTS)
    case = Case("one", [Candidate("a", lambda: 1)], lambda outputs: None, rounds=1)
    monkeypatch.setattr("benchmarks.bench_attention.cases", lambda: [case])
    before = (harness.RESULTS / "attention.json").read_bytes()
    assert run("attention", "--output", str(tmp_path / "new")) == 0
    assert json.loads((tmp_path / "new" / "attention.json").read_text())["question"] == "attention"
    assert (harness.RESULTS / "attention.json").read_bytes() == before


def test_the_documents_tables_are_those_of_the_records():
    assert table.main([]) == 0


def test_tables_are_written_when_that_is_asked_for(tmp_path, monkeypatch, capsys):
    document = tmp_path / "page.md"
    document.write_text("<!-- table: attention -->\nstale\n<!-- end of table -->\n")
    monkeypatch.setattr(table, "DOCUMENTS", (document,))
    assert table.main([]) == 1
    assert "stale" in document.read_text() and "page.md" in capsys.readouterr().err
    assert table.main(["--write"]) == 0
    assert "stale" not in document.read_text() and "| decode, 1 x 1024" in document.read_text()
    assert table.main([]) == 0
