"""``paged-mlx``, which is ``python -m paged_mlx`` too: finds the command, and says what went wrong."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import NamedTuple

from paged_mlx.cli.options import Mistake


class Command(NamedTuple):
    """Where a command is, and what it is for."""

    module: str
    purpose: str


COMMANDS = {
    "demo": Command("cli.demo", "a real model answers on pages, each token compared with mlx-lm's"),
    "generate": Command("cli.generate", "mlx_lm.generate with K and V in pages"),
    "chat": Command("cli.chat", "mlx_lm.chat with K and V in pages"),
    "serve": Command("cli.serve", "mlx_lm.server with K and V in pages, and a view of them"),
    "map": Command("cli.map", "the pages of a running server, in the terminal or as a picture"),
    "bench": Command("cli.bench", "kernels or a model on pages, beside contiguous caches"),
    "analyze": Command("cli.analyze", "how much memory paging and sharing save, for your lengths"),
    "doctor": Command("machine.doctor", "is paged attention right here? every kernel against the oracle"),
    "tune": Command("machine.tune", "measure the planner's thresholds here, and remember them"),
    "build": Command("machine.build", "compile the native module for the mlx that is installed"),
    "testing": Command("testing.__main__", "the conformance suite, for these backends and yours"),
}  # fmt: skip

USAGE = """\
usage: paged-mlx COMMAND [options]

Paged attention for MLX: K and V of a language model in fixed-size pages.

{commands}

paged-mlx COMMAND --help    the options of a command, with examples
paged-mlx --version         versions, to say in an issue
paged-mlx ... --traceback   where in the program an error came from

`python -m paged_mlx` is the same command. Begin with:

  paged-mlx demo
  paged-mlx generate --model mlx-community/Qwen3-0.6B-4bit --prompt "Why is the sky blue?"

exit codes: 0 all right; 1 something is wrong or has failed; 2 the command was not asked
for as it can be, or there was nothing to do; 130 stopped with ctrl-C
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``paged-mlx``; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    shows_traceback = "--traceback" in words
    if shows_traceback:
        words.remove("--traceback")
    try:
        return _run(words)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Mistake, ImportError, OSError, RuntimeError, ValueError) as error:
        if shows_traceback:
            raise
        print(f"paged-mlx {words[0]}: {_sentence(error)}", file=sys.stderr)
        return 2 if _is_a_users(error) else 1


def _run(words: list[str]) -> int:
    if words and words[0] in COMMANDS:
        module = importlib.import_module(f"paged_mlx.{COMMANDS[words[0]].module}")
        return module.main(words[1:])
    if words == ["--version"]:
        print(versions())
        return 0
    lines = (f"  {name:<9} {command.purpose}" for name, command in COMMANDS.items())
    text = USAGE.format(commands="\n".join(lines))
    if words in ([], ["-h"], ["--help"], ["help"]):
        print(text, end="")
        return 0
    known = ", ".join(COMMANDS)
    print(f"paged-mlx: there is no command {words[0]}; there are {known}", file=sys.stderr)
    return 2


def _is_a_users(error: Exception) -> bool:
    """Whether the message says what to do: "[function] name must ...; got ..." does."""
    return isinstance(error, Mistake) or isinstance(error, ValueError) and str(error)[:1] == "["


def _sentence(error: Exception) -> str:
    """An error as one line."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    said = " ".join(str(error).split()) or type(error).__name__
    return said if _is_a_users(error) else f"{said} (--traceback says where)"


def versions() -> str:
    """The versions of this package and of what it stands on."""
    found = []
    for name in ("paged_mlx", "mlx", "mlx-lm"):
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"{name} not installed")
    return ", ".join(found)
