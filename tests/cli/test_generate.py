"""``paged-mlx generate`` and ``chat``: mlx-lm's own commands, on pages; and ``demo``."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: pip install mlx-lm")

import mlx_lm  # noqa: E402
from mlx_lm_folder import write_model  # noqa: E402
from paged_mlx.cli import main as commands  # noqa: E402
from paged_mlx.cli import mains  # noqa: E402
from paged_mlx.cli.live_map import Above  # noqa: E402
from paged_mlx.mlx_lm.demo import smollm2  # noqa: E402

PROMPT = ["--prompt", "Why is the sky blue?", "--max-tokens", "12"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "tiny", seed=5, num_hidden_layers=2)


def main(*words):
    try:
        return commands.main(list(map(str, words)))
    except SystemExit as end:
        return end.code or 0


def stock(folder, capsys, monkeypatch, *words):
    """What mlx-lm's own command prints."""
    monkeypatch.setattr(sys, "argv", ["mlx_lm.generate", "--model", str(folder), *words])
    mains.module("generate").main()
    return capsys.readouterr().out


def answer(out: str) -> str:
    """The answer, without the speeds that are printed after it."""
    return out.split("==========")[1]


def test_the_answer_is_mlx_lms_and_every_call_read_pages(folder, capsys, monkeypatch):
    expected = stock(folder, capsys, monkeypatch, *PROMPT)
    for _ in "twice":
        assert main("generate", "--model", folder, *PROMPT) == 0
        out, err = capsys.readouterr()
        assert answer(out) == answer(expected)
        assert f"loading {folder}" in err
        # A prompt in chunks, then 12 passes; 2 layers each.
        assert "attention calls read pages; " in err and " MiB of pages" in err
        assert "gathered" not in err


def test_the_map_of_the_pages_is_printed_where_there_is_no_terminal(folder, capsys, monkeypatch):
    monkeypatch.setattr("paged_mlx.cli.live_map.EVERY", 0.001)
    words = [*PROMPT, "--num-pages", "40", "--page-size", "4", "--map"]
    assert main("generate", "--model", folder, *words) == 0
    err = capsys.readouterr().err
    assert re.search(r"^2 layers\n[A-Z.]{40}\n40 pages of 4 tokens: \d+ in use", err, re.M), err
    assert re.search(r"^A+", err, re.M)


def test_text_above_a_live_map_comes_in_whole_lines():
    console = pytest.importorskip("rich.console", reason="rich is not installed")
    out = io.StringIO()
    above = Above(console.Console(file=out, width=10))
    for piece in ("Once", " upon", " a time", ".\nThere", " was"):
        print(piece, end="", flush=True, file=above)
    assert out.getvalue() == "Once upon \na time.\n" and above.unfinished.plain == "There was"
    print("abcdefghijklmnop", file=above)
    assert out.getvalue().endswith("\nThere \nwasabcdefg\nhijklmnop\n")


def test_options_of_pages_reach_the_pages(folder, capsys):
    words = [*PROMPT, "--page-size", "8", "--num-pages", "40", "--prefix-cache"]
    assert main("generate", "--model", folder, *words) == 0
    err = capsys.readouterr().err
    assert "prompt tokens were cached" in err
    assert main("generate", "--model", folder, *PROMPT, "--num-pages", "1") == 1
    err = capsys.readouterr().err
    assert "num_pages of" in err and "Traceback" not in err


def test_k_and_v_in_few_bits_take_less_memory(tmp_path, capsys):
    model = write_model(tmp_path / "wide", seed=5, num_hidden_layers=2, head_dim=64)

    def mebibytes(*words) -> float:
        assert main("generate", "--model", model, *PROMPT, "--page-size", "16", *words) == 0
        err = capsys.readouterr().err
        assert "gathered" not in err
        return float(re.findall(r"([\d.]+) MiB of pages", err)[0])

    assert mebibytes("--kv-format", "q8") < 0.7 * mebibytes()
    assert main("generate", "--model", model, "--kv-format", "q5") == 2
    assert "--kv-format" in capsys.readouterr().err


def test_a_draft_is_paged_too(folder, tmp_path, capsys, monkeypatch):
    draft = write_model(tmp_path / "draft", seed=7)
    words = [*PROMPT, "--draft-model", str(draft)]
    expected = stock(folder, capsys, monkeypatch, *words)
    assert main("generate", "--model", folder, *words) == 0
    out, err = capsys.readouterr()
    assert answer(out) == answer(expected)
    assert err.count("attention calls read pages") == 2


def test_nothing_of_mlx_lm_stays_replaced(folder, capsys):
    generate = mains.module("generate")
    before = generate.load
    main("generate", "--model", folder, *PROMPT)
    assert generate.load is before
    main("generate", "--model", folder / "no", *PROMPT)
    assert generate.load is before


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_a_model_that_is_not_there_is_one_sentence(command, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for folder, why in (("nowhere", "there is no such folder"), ("empty", "")):
        assert main(command, "--model", tmp_path / folder) == 2
        last = capsys.readouterr().err.splitlines()[-1]
        said = f"paged-mlx {command}: the model {tmp_path / folder} cannot be loaded: {why}"
        assert last.startswith(said)


def test_a_model_without_k_and_v_is_one_sentence(tmp_path, capsys):
    folder = write_model(tmp_path / "rwkv7", "rwkv7")
    assert main("generate", "--model", folder, *PROMPT) == 2
    assert "model must have a cache of K and V" in capsys.readouterr().err


def test_a_file_that_is_not_there_is_one_sentence(folder, tmp_path, capsys):
    words = ["--prompt-cache-file", tmp_path / "none.safetensors"]
    assert main("generate", "--model", folder, *PROMPT, *words) == 1
    err = capsys.readouterr().err
    assert "none.safetensors" in err and "Traceback" not in err


def test_help_has_both_kinds_of_options(capsys):
    assert main("generate", "--help") == 0
    shown = capsys.readouterr().out
    assert "--page-size" in shown and "--draft-model" in shown


def test_a_chat_goes_on_over_turns_and_ends_with_q_and_with_the_input(folder, capsys, monkeypatch):
    for ending in ("q\n", ""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(f"Hello\nWhy?\n{ending}"))
        assert main("chat", "--model", folder, "--max-tokens", "5", "--temp", "0") == 0
        out, err = capsys.readouterr()
        # Two turns: a pass or two for what was said, and 5 tokens; 2 layers each.
        (calls,) = re.findall(r"(\d+) attention calls read pages", err)
        assert int(calls) >= 2 * 2 * 6 and "E<U" in out


@pytest.mark.long
def test_ctrl_c_ends_a_long_answer_with_a_word(folder, tmp_path):
    """From another folder, without a network."""
    words = ["generate", "--model", str(folder), "--prompt", "Go", "--max-tokens", "1000000"]
    words += ["--extra-eos-token", "~"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "paged_mlx", *words], cwd=tmp_path, env=environment, text=True,
        start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    time.sleep(15)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    if process.returncode != 0:  # else the model has ended by itself
        assert process.returncode == 130 and err.endswith("stopped\n") and "Traceback" not in err
    assert json.dumps(list(map(str, tmp_path.iterdir()))) == "[]"


def test_the_demo_prints_its_figures_and_nothing_else(folder, monkeypatch, capsys):
    monkeypatch.setattr(smollm2, "load", lambda report: mlx_lm.load(str(folder)))
    assert commands.main(["demo", "--tokens", "2", "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["all_equal"] and [a["tokens"] for a in found["answers"]] == [2] * 4
    assert len({tuple(pages[:5]) for pages in found["pages"]}) == 1  # the system prompt's
    assert 0 < found["memory"]["pages_in_use"] <= found["memory"]["pages"]
    assert found["routes"]["pages"] > 0 and "Why is the sky blue?" in err
