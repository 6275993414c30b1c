"""``paged-mlx``: what is there, what it says of a mistake, and what it leaves behind."""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from paged_mlx.cli import main as commands
from paged_mlx.cli.options import size

NAMES = sorted(commands.COMMANDS)


def paged_mlx(*words, **options):
    """Run the command in a process of its own."""
    command = [sys.executable, "-m", "paged_mlx", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, **options)


def main(*words):
    """Run the command here; returns the exit code, also argparse's."""
    try:
        return commands.main(list(map(str, words)))
    except SystemExit as end:
        return end.code or 0


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_without_a_command_the_commands_are_listed(words, capsys):
    assert main(*words) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in NAMES)


def test_an_unknown_command_is_one_line_that_lists_them(capsys):
    assert main("heal") == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "no command heal" in err and "doctor" in err


@pytest.mark.parametrize("name", NAMES)
def test_every_command_helps_with_examples_to_copy(name, capsys):
    assert main(name, "--help") == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: paged-mlx {name}")
    assert f"examples:\n  paged-mlx {name}" in shown


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_option_is_exit_code_2_and_no_traceback(name, capsys):
    assert main(name, "--no-such-option") == 2
    assert "unrecognized arguments: --no-such-option" in capsys.readouterr().err


def test_versions_are_those_that_an_issue_must_say(capsys):
    assert main("--version") == 0
    assert capsys.readouterr().out.startswith("paged_mlx ")


def test_the_commands_are_listed_without_mlx_lm_and_without_loading_it():
    program = "import sys; sys.modules['mlx_lm'] = None; sys.argv[1:] = ['--help']\n"
    program += "from paged_mlx.cli.main import main\nassert main() == 0"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0 and "generate" in done.stdout, done.stderr


@pytest.mark.parametrize("name", ["demo", "generate", "chat"])
def test_a_command_that_needs_mlx_lm_says_how_to_get_it(name, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(name) == 2
    assert capsys.readouterr().err == (
        f"paged-mlx {name}: mlx-lm is not installed: pip install mlx-lm\n"
    )


@pytest.mark.parametrize(
    "text, nbytes",
    [("4096", 4096), ("2GiB", 2 << 30), ("1.5k", 1500), ("500MB", 500_000_000), ("3mi", 3 << 20)],
)
def test_sizes_are_read_as_people_write_them(text, nbytes):
    assert size(text) == nbytes


@pytest.mark.parametrize("text", ["", "much", "5TB", "-1", "0"])
def test_other_sizes_are_refused_by_name(text, capsys):
    assert main("generate", "--max-bytes", text) == 2
    assert "--max-bytes" in capsys.readouterr().err


def test_errors_of_the_library_are_one_line_and_the_traceback_is_there_on_request(capsys):
    words = ["analyze", "--lengths", "3000", "--max-seq-len", "2000"]
    assert main(*words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "max_seq_len must be at least 3000" in err
    with pytest.raises(ValueError, match="max_seq_len"):
        main(*words, "--traceback")


def test_a_reader_that_leaves_is_no_error_that_anybody_sees():
    command = f"{sys.executable} -m paged_mlx analyze | head -0"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr


def test_analyze_gives_the_same_figures_in_words_and_as_json(capsys):
    assert main("analyze", "--lengths", "100,500,50", "--page-size", "32") == 0
    words = capsys.readouterr().out
    assert main("analyze", "--lengths", "100,500,50", "--page-size", "32", "--json") == 0
    memory = json.loads(capsys.readouterr().out)["memory"]
    assert memory["static"]["slots"] == 3 * 2048
    assert memory["paged"]["slots"] == 128 + 512 + 64
    assert f"{memory['paged']['bytes']:,}" in words


def test_analyze_times_a_step_and_says_that_a_cpu_is_no_gpu(capsys):
    words = ["analyze", "--lengths", "40,20", "--time", "--repeats", "1"]
    assert main(*words) == 0
    out = capsys.readouterr().out
    assert "Your lengths:" in out
    import mlx.core as mx

    assert ("not those of a GPU" in out) == (mx.default_device() == mx.cpu)
    assert main(*words, "--json") == 0
    (decode,) = json.loads(capsys.readouterr().out)["decode"]
    assert decode["name"] == "Your lengths" and decode["paged_seconds"] > 0


@pytest.mark.parametrize(
    "option, value, says",
    [
        ("--lengths", "0", "must be at least 1; got 0"),
        ("--lengths", "1,a", "must be whole numbers; got 1,a"),
        ("--page-size", "0", "must be at least 1; got 0"),
        ("--page-size", "8,16", "must be one whole number; got 8,16"),
    ],
)
def test_numbers_that_are_none_are_refused_by_name(option, value, says, capsys):
    assert main("analyze", option, value) == 2
    assert f"argument {option}: {says}" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["testing", "doctor"])
def test_a_file_that_cannot_be_written_is_named_before_anything_is_tried(
    command, tmp_path, monkeypatch, capsys
):
    for worker in ("testing.__main__.run_suite", "machine.doctor.examine"):
        monkeypatch.setattr(f"paged_mlx.{worker}", lambda *_, **__: pytest.fail("it began"))
    file = tmp_path / "nowhere" / "report.json"
    assert main(command, "--json", file) == 1
    err = capsys.readouterr().err
    assert err == (f"paged-mlx {command}: {file}: No such file or directory\n")


def test_the_conformance_suite_prints_json_and_nothing_else(capsys):
    words = ["testing", "--run", "small", "--backend", "cpu", "--group", "pages", "--json"]
    assert main(*words) == 0
    out, err = capsys.readouterr()
    record = json.loads(out)
    assert record["right"] and {cell["group"] for cell in record["cells"]} == {"pages"}
    assert err == ""


def test_tune_prints_json_that_is_remembered_nowhere(tmp_path, capsys):
    words = ["tune", "--only", "cpu", "--dry", "--json", "--seconds", "0.01"]
    code = main(*words, "--directory", tmp_path)
    out, err = capsys.readouterr()
    if code == 2:
        assert "no thresholds" in err  # MLX's own operations
        return
    found = json.loads(out)
    assert found["device"] == "cpu" and set(found["thresholds"]) == set(found["before"])
    assert "no time" in err and list(tmp_path.iterdir()) == []


def test_modules_of_commands_have_one_main():
    for command in commands.COMMANDS.values():
        assert callable(importlib.import_module(f"paged_mlx.{command.module}").main)


def processes_that_name(text: str) -> list[str]:
    """Command lines of running processes with this in them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            found += [line] if text in line else []
    return found


@pytest.mark.long
@pytest.mark.parametrize(
    "words",
    [
        ["doctor", "--json", "r.json"],
        ["testing", "--json", "r.json"],
        ["tune", "--directory", "."],
        ["bench", "-r", "1000"],
        ["analyze", "--time", "--repeats", "1000"],
        ["demo", "--plain"],
        ["build", "--force"],
    ],
    ids=lambda words: words[0],
)
def test_ctrl_c_leaves_no_file_and_no_child(words, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "CMAKE_CXX_COMPILER_LAUNCHER"}
    if words[0] == "build":
        environment["XDG_CACHE_HOME"] = str(tmp_path / "cache")
    process = subprocess.Popen(
        [sys.executable, "-m", "paged_mlx", *words], cwd=tmp_path, start_new_session=True,
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment,
    )  # fmt: skip
    time.sleep(8)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.endswith("stopped\n"), err
    assert "Traceback" not in err
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert left == []
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    assert processes_that_name(str(tmp_path)) == []
