"""What the Makefile installs, and what it does after a run that was killed."""

import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def install(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "cmake"))
    monkeypatch.chdir(ROOT)
    import install

    return install


def killed(*arguments, **options):
    raise KeyboardInterrupt


def test_an_environment_that_a_killed_run_left_is_made_anew(install, monkeypatch, tmp_path):
    folder, commands = tmp_path / "with a space" / ".venv", []
    monkeypatch.setattr(install, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        install.environment(str(folder))
    monkeypatch.setattr(install, "run", lambda command, what: commands.append(command))
    for _ in range(2):  # the second time it was killed after the old one was cleared
        install.environment(str(folder))
        assert commands.pop() == [sys.executable, "-m", "venv", "--clear", str(folder)]


def test_an_environment_that_there_is_keeps_what_is_in_it(install, monkeypatch, tmp_path):
    (tmp_path / "pyvenv.cfg").touch()
    install.unfinished(str(tmp_path)).write_text("cli")  # as when its packages were interrupted
    monkeypatch.setattr(install, "run", killed)
    install.environment(str(tmp_path))
    assert install.unfinished(str(tmp_path)).read_text() == "cli"


def test_a_folder_that_cannot_be_written_is_one_sentence(install, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="file must be a folder that can be written: "):
        install.environment(str(tmp_path / "file" / ".venv"))


def test_packages_that_a_killed_run_left_in_part_are_put_in_place_again(
    install, monkeypatch, tmp_path
):
    monkeypatch.setattr(install.sys, "prefix", str(tmp_path / ".venv"))
    commands = []
    for run in (killed, lambda command, what: commands.append(command)):
        monkeypatch.setattr(install, "run", run)
        try:
            install.packages("cli")
        except KeyboardInterrupt:
            pass
    install.packages("cli")
    again, third = commands
    assert "--ignore-installed" in again and "--ignore-installed" not in third
    assert "ninja" in again and any(word.startswith("mlx-lm") for word in again)
    assert not any(word.startswith("ziglang") for word in again)  # a compiler for tests
    assert list(tmp_path.iterdir()) == []


def alive(pid):
    """Whether a process runs; one that has ended may wait for whoever adopted it."""
    run = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return run.stdout.strip()[:1] not in ("", "Z")


def test_ctrl_c_ends_what_is_installing_and_is_one_sentence(install, monkeypatch, tmp_path):
    program = (
        "import subprocess, sys\n"
        "sleeps = 'import os, time; print(os.getpid(), flush=True); time.sleep(60)'\n"
        "subprocess.run([sys.executable, '-c', sleeps])\n"
    )
    started, compiler = [], []

    def popen(*arguments, **options):
        started.append(subprocess.Popen(*arguments, **options))
        return started[0]

    def interrupted(text):
        compiler.append(int(text))
        raise KeyboardInterrupt

    monkeypatch.setattr(install, "STEP", types.SimpleNamespace(search=interrupted))
    monkeypatch.setattr(install, "subprocess", types.SimpleNamespace(**vars(subprocess)))
    monkeypatch.setattr(install.subprocess, "Popen", popen)
    with pytest.raises(SystemExit, match="packages: interrupted; the same command goes on"):
        install.run([sys.executable, "-c", program], "packages")
    assert started[0].poll() is not None
    deadline = time.monotonic() + 30
    while alive(compiler[0]) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive(compiler[0])


def test_a_python_that_is_too_old_and_a_missing_compiler_are_one_sentence(install, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(SystemExit, match="needs a C\\+\\+20 compiler, and there is no no-such"):
        install.check()
    monkeypatch.setattr(install.sys, "version_info", (3, 9, 1))
    with pytest.raises(SystemExit, match=r"needs Python 3.10 or newer; .* is 3.9.1. Name another"):
        install.check()
