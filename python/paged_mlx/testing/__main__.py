"""``paged-mlx testing``: run the conformance suite and print its table."""

from __future__ import annotations

import argparse
import platform
import sys
from pathlib import Path

from paged_mlx.machine.cache import check_writable, write_whole

from . import backends, grid, report, small
from .runner import run_suite

EXAMPLES = """\
examples:
  paged-mlx testing --run small
  paged-mlx testing --group "partitions, merge" --backend cpu
  paged-mlx testing --json result.json
"""


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    if options.json not in (None, "-"):
        check_writable(Path(options.json))
    chosen = _backends(options.backend)
    checks = _checks(options)
    progress = report.ProgressLine(len(checks) * len(chosen))
    result = run_suite(checks, chosen, progress=progress)
    progress.end()
    if options.json:
        about = {"run": options.run, "machine": platform.platform()}
        text = report.to_json(result, **about)
        if options.json == "-":
            print(text)
            return 0 if result.right else 1
        write_whole(Path(options.json), text + "\n")
    print(report.table(result))
    if not result.right:
        print("\n" + report.failures(result))
    return 0 if result.right else 1


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    groups = list(grid.GROUPS)
    parser = argparse.ArgumentParser(
        prog="paged-mlx testing", description=__doc__, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "--run", choices=("small", "quick", "long"), default="quick",
        help="how many cases: seconds, a minute, or many minutes (quick)",
    )  # fmt: skip
    parser.add_argument(
        "--large", action="store_true", help="also pools beyond 2^31 elements; 5 GiB"
    )
    parser.add_argument(
        "--group", action="append", choices=groups, help="only this group; may repeat"
    )
    parser.add_argument(
        "--backend", action="append", choices=("cpu", "metal"), help="only this one; may repeat"
    )
    parser.add_argument(
        "--json", metavar="FILE", nargs="?", const="-",
        help="write the result as JSON; without FILE to the screen, and nothing else",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    options.group = options.group or groups
    return options


def _backends(names: list[str] | None) -> list[backends.Backend]:
    makers = {"cpu": backends.cpu, "metal": backends.metal}
    made = [makers[name]() for name in (names or ("cpu", "metal"))]
    chosen = [backend for backend in made if backend is not None]
    if not chosen:
        print("[testing] backend must be available on this machine; got metal.", file=sys.stderr)
        raise SystemExit(2)
    return chosen


def _checks(options) -> list:
    runs = {"small": small.checks, "quick": grid.quick, "long": grid.long}
    checks = list(runs[options.run]())
    if options.large:
        checks += grid.large()
    return [check for check in checks if check.group in options.group]


if __name__ == "__main__":
    sys.exit(main())
