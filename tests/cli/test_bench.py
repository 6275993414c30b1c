"""``paged-mlx bench``: trials named as llama-bench names them, measured in turns, told in three forms."""

import csv
import io
import json
import re
from dataclasses import asdict

import mlx.core as mx
import pytest
from paged_mlx.cli import main as commands
from paged_mlx.machine.bench.curves import curves, svg
from paged_mlx.machine.bench.measure import Candidate, Case, measure
from paged_mlx.machine.bench.trials import Trial, sweep, trials

SMALL = ["--num-q-heads", "4", "--num-kv-heads", "2", "--head-dim", "64", "-r", "2"]


def main(*words):
    try:
        return commands.main(["bench", *map(str, words)])
    except SystemExit as end:
        return end.code or 0


def test_trials_have_the_names_that_people_know():
    assert Trial(prompt=512).name == "pp512"
    assert Trial(generated=128, depth=4096).name == "tg128 @ d4096"
    assert Trial(generated=32, depth=64, batch=8, shared=48).name == "tg32 @ d64 x8 shared 48"
    assert Trial(generated=1, depth=8, batch=2, ragged=True).name == "tg1 @ d8 x2 ragged"


def test_a_ragged_batch_runs_from_a_quarter_of_the_depth_up_to_it():
    assert Trial(generated=1, depth=100, batch=4, ragged=True).depths == [25, 50, 75, 100]
    assert Trial(generated=1, depth=100, batch=3).depths == [100] * 3


def test_batches_are_for_generation_and_prefixes_for_batches_that_are_as_deep():
    names = [t.name for t in trials([16], [4], [0, 64], [1, 8], shared=[32], ragged=True)]
    assert names == [
        "pp16", "pp16 @ d64", "tg4", "tg4 x8", "tg4 @ d64", "tg4 @ d64 x8",
        "tg4 @ d64 x8 shared 32", "tg4 @ d64 x8 ragged",
    ]  # fmt: skip


def test_kernels_are_measured_in_turns_and_told_alike_in_three_forms(capsys):
    words = ["-p", "8", "-d", "40", "-b", "1,3", "--shared", "32", "--ragged", *SMALL]
    assert main(*words, "-o", "json") == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    names = [
        "pp8 @ d40",
        "tg1 @ d40",
        "tg1 @ d40 x3",
        "tg1 @ d40 x3 shared 32",
        "tg1 @ d40 x3 ragged",
    ]
    assert [test["test"] for test in found["tests"]] == names
    for test in found["tests"]:
        ways = [c["name"] for c in test["candidates"]]
        assert ways[0] == "paged" and len(ways) == 3
        assert test["order"] == ways + ways[::-1]
        assert all(
            len(c["seconds"]) == 2 and c["tokens_per_second"] > 0 for c in test["candidates"]
        )
    whole, shared = (test["candidates"][0]["nbytes"] for test in found["tests"][2:4])
    assert whole - shared == 2 * 32 * 2 * 2 * 64 * 2  # twice 32 tokens of K and V, 2 heads of 64
    assert found["geometry"]["head_dim"] == 64 and found["versions"]["mlx"]
    attention = found["routes"]["kernels"]["PagedAttention"]
    assert sum(attention.values()) == 5 * (1 + 1 + 2)  # checked, warmed up, twice timed
    assert main(*words, "-o", "csv") == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["test"] for row in rows] == [name for name in names for _ in range(3)]
    assert main(*words) == 0
    table = capsys.readouterr().out
    assert all(f"| {name} |" in table for name in names)
    assert "Which kernels served:\nPagedAttention: 20 on " in table
    assert ("not those of a GPU" in table) == (mx.default_device() == mx.cpu)


def made_up(**fields):
    """A record of tests, each with the seconds of its candidates, made up."""
    tests = []
    for about in fields["tests"]:
        trial = Trial(**{k: v for k, v in about.items() if k != "seconds"})
        candidates = [
            {"name": name, "nbytes": 10**6, "seconds": [s], "median": s}
            for name, s in about["seconds"].items()
        ]
        tests.append({"test": trial.name, **asdict(trial), "candidates": candidates})
    return {"measured": "kernels", "tests": tests, "read_bandwidth": 1e9}


def test_curves_join_tests_that_differ_in_one_thing_and_say_where_they_cross():
    depths = {100: (2e-3, 1e-3), 300: (3e-3, 2e-3), 500: (3e-3, 4.5e-3)}
    tests = [
        {"generated": 1, "depth": depth, "seconds": {"paged": ours, "gather": theirs}}
        for depth, (ours, theirs) in depths.items()
    ]
    alone = {"generated": 1, "depth": 7, "batch": 3, "seconds": {"paged": 1.0, "gather": 1.0}}
    (found,) = curves(made_up(tests=[*tests, alone]))
    assert (found.axis, found.title) == ("depth", "decode")
    assert found.times["paged"] == [(100, 2e-3, 0.5), (300, 3e-3, 1 / 3), (500, 3e-3, 1 / 3)]
    assert found.crossings() == {
        "gather": pytest.approx((300 * 500) ** 0.5)
    }  # both are out by 1.5 times
    assert found.verdicts() == [
        "paged is faster than gather, from about 387 tokens in the cache on"
    ]


def test_a_report_is_one_file_with_pictures_a_table_and_the_record(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    file = tmp_path / "report.html"
    words = ["-p", "0", "-d", "8,40", "-b", "1,3", "--shared", "8,32", "--page-size", "8,16"]
    assert main(*words, *SMALL, "--html", file, "--json") == 0
    out, err = capsys.readouterr()
    text = file.read_text()
    record = json.loads(text.split('id="record">')[1].split("</script>")[0])
    assert record == json.loads(out) and record["read_bandwidth"] > 0
    assert f"report: {file}" in err
    assert text.count("<svg") == len(list(curves(record))) > 4
    assert {c.axis for c in curves(record)} == {"depth", "batch", "shared", "page_size"}
    assert all(f"<td>{test['test']}</td>" in text for test in record["tests"])
    fetched = re.findall(r'(?:src|href)="(?!#)[^"]*"|url\((?!#)|@import', text)
    assert [found for found in fetched if "xlink" not in found] == []
    assert list(tmp_path.iterdir()) == [file]
    assert svg(next(curves(record))) == svg(next(curves(record)))


def test_without_tests_of_its_own_a_report_has_every_curve():
    names = [trial.name for trial in sweep(128, 1, (8, 64))]
    assert {"pp128 @ d256", "tg1 @ d16384", "tg1 @ d1024 x16"} <= set(names)
    assert {"tg1 @ d2048 x8 shared 1536", "tg1 @ d4096 pages of 64"} <= set(names)


def test_ways_that_disagree_are_not_timed(monkeypatch, capsys):
    monkeypatch.setattr(
        "paged_mlx.machine.bench.workload.Workload.paged", lambda work: 1.01 + work.q
    )
    assert main("-p", "0", "-d", "8", "-b", "1", *SMALL) == 1
    err = capsys.readouterr().err
    assert "tg1 @ d8 was not timed: " in err and "differ by" in err and "Traceback" not in err


def test_quantised_pages_are_further_candidates_that_read_less(capsys):
    words = ["-p", "0", "-d", "128", "-b", "1,2", "--shared", "64", "--ragged", *SMALL]
    assert main(*words, "--kv-format", "q8,q8/q4,q4", "--json") == 0
    for test in json.loads(capsys.readouterr().out)["tests"]:
        dense, _, _, *quantised = test["candidates"]
        assert [c["name"] for c in quantised] == ["paged, q8/q8", "paged, q8/q4", "paged, q4/q4"]
        for candidate in quantised[:2]:
            assert 0 < candidate["nbytes"] < 0.8 * dense["nbytes"]


def test_progress_is_told_round_by_round():
    said = []
    case = Case("name", [Candidate("one", lambda: 1)], lambda outputs: None, rounds=2)
    measure(case, said.append)
    assert said == ["name: checking", "name: 1 of 2", "name: 2 of 2"]


@pytest.mark.parametrize(
    "words, said",
    [
        (["-p", "0", "-n", "0"], "nothing to run"),
        (["-p", "-5"], "-p"),
        (["-b", "0"], "-b"),
        (["-r", "x"], "-r"),
        (["-o", "xml"], "-o"),
        (["--num-q-heads", "5", "--num-kv-heads", "2"], "--num-q-heads must be a multiple"),
        (["--head-dim", "20"], "head_dim"),
        (["--kv-format", "q5"], "--kv-format"),
        (["--kv-format", "q8", "--head-dim", "24"], "head_dim must be a multiple of 32"),
        (["--html", "no/such/folder/report.html"], "report.html: No such file"),
        (["--html", "."], "--html .: Is a directory"),
        (["--model", "any", "--page-size", "8,16"], "--page-size must be one number"),
    ],
)
def test_what_cannot_be_run_is_exit_code_2_and_a_sentence(words, said, capsys):
    assert main(*words) == 2
    out, err = capsys.readouterr()
    assert out == "" and said in err and "Traceback" not in err


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: pip install mlx-lm")
    from mlx_lm_folder import write_model

    return write_model(tmp_path_factory.mktemp("models") / "tiny", "gemma3_text", seed=5)


def test_a_model_is_measured_beside_mlx_lms_caches(folder, capsys):
    words = ["-m", folder, "-p", "8", "-n", "3", "-d", "0,40", "-b", "1,2", "-r", "1"]
    assert main(*words, "--shared", "32", "--ragged", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [test["test"] for test in found["tests"]] == [
        "pp8", "pp8 @ d40", "tg3", "tg3 x2", "tg3 @ d40", "tg3 @ d40 x2",
        "tg3 @ d40 x2 shared 32", "tg3 @ d40 x2 ragged",
    ]  # fmt: skip
    assert found["measured"] == "model" and found["model"] == "tiny"
    for test in found["tests"]:
        assert [c["name"] for c in test["candidates"]] == ["paged", "mlx-lm"]
    assert found["routes"]["attention"].keys() == {"pages"}


def test_quantised_pages_of_a_model_are_candidates_too(tmp_path, capsys):
    pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: pip install mlx-lm")
    from mlx_lm_folder import write_model

    folder = write_model(tmp_path / "tiny", seed=5, num_hidden_layers=2, head_dim=64)
    words = ["-m", folder, "-p", "8", "-n", "3", "-d", "40", "-b", "2", "-r", "1"]
    assert main(*words, "--kv-format", "q8,q4", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    for test in found["tests"]:
        names = [c["name"] for c in test["candidates"]]
        assert names == ["paged", "mlx-lm", "paged, q8/q8", "paged, q4/q4"]
    assert found["routes"]["attention"].keys() == {"pages"}


def test_logits_that_differ_stop_it(folder, capsys, monkeypatch):
    from paged_mlx.machine.bench import models

    monkeypatch.setattr(models, "CLOSE", -1.0)
    assert main("-m", folder, "-p", "4", "-n", "0", "-d", "0") == 1
    assert "logits of mlx-lm and paged differ" in capsys.readouterr().err


def test_a_model_that_is_not_there_is_a_sentence(tmp_path, capsys):
    pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: pip install mlx-lm")
    assert main("-m", tmp_path / "nowhere") == 2
    assert "cannot be loaded" in capsys.readouterr().err
