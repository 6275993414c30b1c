"""The benchmarks of a checkout: `python -m benchmarks --help`."""

import argparse
import importlib
import sys
from pathlib import Path

from benchmarks import harness

NAMES = sorted(
    path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py")
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Run benchmarks and write their records, all of them or those that are named.",
        epilog=f"names: {', '.join(NAMES)}\n\n`paged-mlx bench` measures what you ask it to, and writes no record.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="a benchmark; without any: all")
    parser.add_argument(
        "--output", type=Path, default=harness.RESULTS, metavar="FOLDER",
        help="where records go; without it the tracked ones in benchmarks/results are replaced",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in NAMES]
    if unknown:
        parser.error(f"there is no benchmark {', '.join(unknown)}; there are {', '.join(NAMES)}")
    harness.write_to(options.output)
    for name in options.names or NAMES:
        print(f"== {name}", flush=True)
        importlib.import_module(f"benchmarks.bench_{name}").main()
    return 0


if __name__ == "__main__":
    sys.exit(main())
