"""``python -m benchmarks``: names that it knows, records where they are wanted, tables as they are."""

import json
import sys
from pathlib import Path

import pytest
from paged_mlx.machine.bench.measure import Candidate, Case

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks import __main__ as benchmarks
from benchmarks import documents, harness, pictures


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


def test_the_documents_tables_and_pictures_are_those_of_the_records():
    assert documents.main([]) == 0


def test_tables_are_written_when_that_is_asked_for(tmp_path, monkeypatch, capsys):
    document = tmp_path / "page.md"
    document.write_text("<!-- table: attention -->\nstale\n<!-- end of table -->\n")
    monkeypatch.setattr(documents, "DOCUMENTS", (document,))
    monkeypatch.setattr(documents, "pictures", dict)
    assert documents.main([]) == 1
    assert "stale" in document.read_text() and "page.md" in capsys.readouterr().err
    assert documents.main(["--write"]) == 0
    assert "stale" not in document.read_text() and "| decode, 1 x 1024" in document.read_text()
    assert documents.main([]) == 0


def test_a_picture_is_drawn_anew_when_it_shows_something_else(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(documents, "DOCUMENTS", ())
    picture, drawn = tmp_path / "map.svg", pictures.page_maps()["forks"]
    monkeypatch.setattr(
        documents,
        "pictures",
        lambda: {picture: lambda: drawn.save(tmp_path / "new.svg").read_text()},
    )
    assert documents.main([]) == 1 and not picture.exists()
    assert documents.main(["--write"]) == 0
    assert pictures.shows(picture.read_text()) == drawn.text()
    picture.write_text(picture.read_text().replace("<path", "<path "))  # drawn in another way
    assert documents.main([]) == 0
    picture.write_text(picture.read_text().replace("33B3BB", "33B3BA"))
    assert documents.main([]) == 1
    assert "map.svg" in capsys.readouterr().err
