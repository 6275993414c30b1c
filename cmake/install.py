"""Set-up of the virtual environment, with progress: what the Makefile runs.

python cmake/install.py check              # a Python and a compiler that can build the module
python cmake/install.py environment FOLDER # a virtual environment
python cmake/install.py packages EXTRA     # what pyproject.toml asks for at run time and for EXTRA
python cmake/install.py module             # the native module, editable
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

import compiler
import mlx_releases

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
BUILD_TOOLS = ["scikit-build-core>=0.11", "cmake>=3.27", "ninja"]
#: A step of ninja's: "[3/42] Building CXX object ...".
STEP = re.compile(r"\[(\d+)/(\d+)\]")


def check() -> None:
    """Say what is missing before anything is downloaded."""
    if sys.version_info < (3, 10):
        found = ".".join(map(str, sys.version_info[:3]))
        sys.exit(
            f"paged_mlx needs Python 3.10 or newer; {sys.executable} is {found}. "
            "Name another one: make PYTHON=python3.12"
        )
    if lacks := compiler.missing():
        sys.exit(lacks)


def environment(folder: str) -> None:
    """Make a virtual environment where there is none; anew where its making was killed."""
    mark = unfinished(folder)
    killed = mark.exists() and mark.read_text() == "environment"
    if killed or not (Path(folder) / "pyvenv.cfg").exists():
        try:
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.write_text("environment")
        except OSError as error:
            sys.exit(f"{mark.parent.absolute()} must be a folder that can be written: {error}")
        run([sys.executable, "-m", "venv", *(["--clear"] if killed else []), folder], "environment")


def unfinished(environment: str) -> Path:
    """A file beside an environment, as long as something is being installed into it: what."""
    return Path(f"{environment}.unfinished")


def packages(extra: str) -> None:
    """Install the dependencies of the project and of one of its extras.

    Where a run that did so was killed, a package may be there in part: all are put in place again.

    mlx is the newest release that the project is made for, or that of the variable ``MLX``, with
    the nanobind that belongs to it.
    """
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        import pip._vendor.tomli as tomllib
    with open("pyproject.toml", "rb") as file:
        project = tomllib.load(file)["project"]
    version = os.environ.get("MLX") or mlx_releases.newest()
    tools = [mlx_releases.requirement(version), f"nanobind=={mlx_releases.nanobind_for(version)}"]
    wanted = project["dependencies"] + project["optional-dependencies"][extra]
    mark = unfinished(sys.prefix)
    again = mark.exists() and mark.read_text() == extra
    options = ["--progress-bar", "off", *(["--ignore-installed"] if again else [])]
    mark.write_text(extra)
    run([*PIP, "install", *options, *BUILD_TOOLS, *tools, *wanted], "packages")
    mark.unlink()


def module() -> None:
    """Build the native module and install the project in place."""
    options = ["--no-deps", "--no-build-isolation", "--config-settings=editable.rebuild=false"]
    run([*PIP, "install", "-v", *options, "--editable", "."], "native module")


def run(command: list[str], what: str) -> None:
    """Run a command; a line of progress now and then, all of its output if it fails."""
    started, shown = time.monotonic(), 0.0
    lines: deque[str] = deque(maxlen=400)
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        start_new_session=True,
    )  # fmt: skip
    try:
        for line in process.stdout:
            lines.append(line)
            now = time.monotonic()
            step = STEP.search(line)
            if line.startswith("Installing collected packages"):
                say(f"      {what}: unpacking, {now - started:.0f} s")
            elif step or line.startswith(("Collecting", "Downloading", "  Downloading")):
                if now - shown >= (0.2 if sys.stdout.isatty() else 15):
                    shown = now
                    say(f"      {what}: {step[0] if step else line.strip()}, {now - started:.0f} s")
    except KeyboardInterrupt:
        os.killpg(process.pid, signal.SIGINT)  # pip cleans up, its compilers end
        process.wait()
        say("")
        sys.exit(f"{what}: interrupted; the same command goes on.")
    if process.wait():
        say("")
        sys.exit("".join(lines) + f"\n{what}: failed; its output is above.")
    say(f"      {what}: done in {time.monotonic() - started:.0f} s")
    print(flush=True)


def say(text: str) -> None:
    """Show progress: on a terminal over the line before, else on a line of its own."""
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns
        print(f"\r\x1b[K{text[: width - 1]}", end="", flush=True)
    elif text:
        print(text, flush=True)


def main(arguments: list[str]) -> None:
    name, *rest = arguments
    commands = {"check": check, "environment": environment, "packages": packages, "module": module}
    commands[name](*rest)


if __name__ == "__main__":
    main(sys.argv[1:])
