"""``python -m paged_mlx``: the commands of this package."""

import importlib
import sys

COMMANDS = {
    "doctor": "is paged attention right on this machine? every kernel against the oracle, in seconds",
    "tune": "measure the planner's thresholds on this machine, in under a minute, and remember them",
    "build": "make the native module for the mlx that is installed, from the package's sources",
    "testing": "the conformance suite, for this package's backends and yours",
}

USAGE = """\
python -m paged_mlx COMMAND [options]

{commands}

`python -m paged_mlx COMMAND --help` lists the options of one. Benchmarks are part of a
checkout, not of the package: `make bench` there.
"""


def main(arguments: list[str]) -> int:
    if arguments and arguments[0] in COMMANDS:
        name = {"testing": "testing.__main__"}.get(arguments[0], f"machine.{arguments[0]}")
        return importlib.import_module(f"paged_mlx.{name}").main(arguments[1:])
    lines = (f"  {name:<9} {what}" for name, what in COMMANDS.items())
    print(USAGE.format(commands="\n".join(lines)), end="")
    return 0 if arguments in ([], ["-h"], ["--help"]) else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
