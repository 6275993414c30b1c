"""``python -m paged_mlx.testing``: run the conformance suite and print its table."""

from __future__ import annotations

import argparse
import platform
import sys
from pathlib import Path

from . import backends, grid, report, small
from .runner import run_suite


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    chosen = _backends(options.backend)
    checks = _checks(options)
    result = run_suite(checks, chosen, progress=_progress(len(checks) * len(chosen)))
    print("\r" + " " * 72 + "\r", end="", file=sys.stderr)
    print(report.table(result))
    if not result.right:
        print("\n" + report.failures(result))
    if options.json:
        about = {"run": options.run, "machine": platform.platform()}
        Path(options.json).write_text(report.to_json(result, **about) + "\n")
    return 0 if result.right else 1


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    groups = list(grid.GROUPS)
    parser = argparse.ArgumentParser(prog="python -m paged_mlx.testing", description=__doc__)
    parser.add_argument("--run", choices=("small", "quick", "long"), default="quick")
    parser.add_argument(
        "--large", action="store_true", help="also pools beyond 2^31 elements; 5 GiB"
    )
    parser.add_argument(
        "--group", action="append", choices=groups, help="only this group; may repeat"
    )
    parser.add_argument("--backend", action="append", choices=("cpu", "metal"))
    parser.add_argument("--json", metavar="FILE", help="write the result as JSON")
    options = parser.parse_args(arguments)
    options.group = options.group or groups
    return options


def _backends(names: list[str] | None) -> list[backends.Backend]:
    makers = {"cpu": backends.cpu, "metal": backends.metal}
    made = [makers[name]() for name in (names or ("cpu", "metal"))]
    chosen = [backend for backend in made if backend is not None]
    if not chosen:
        sys.exit("[testing] backend must be available on this machine; got metal.")
    return chosen


def _checks(options) -> list:
    runs = {"small": small.checks, "quick": grid.quick, "long": grid.long}
    checks = list(runs[options.run]())
    if options.large:
        checks += grid.large()
    return [check for check in checks if check.group in options.group]


def _progress(total: int):
    done = 0

    def show(cell, check):
        nonlocal done
        done += 1
        if done % 10 == 1 and sys.stderr.isatty():
            text = f"\r{done}/{total}  {cell.group} on {cell.backend}"
            print(text.ljust(72), end="", file=sys.stderr, flush=True)

    return show


if __name__ == "__main__":
    sys.exit(main())
