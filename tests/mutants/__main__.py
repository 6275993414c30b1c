"""Command line: try the mutants and print who saw each."""

import argparse
import os
import sys

import metal_host

from . import LAYERS, MUTANTS, native
from .runner import attempt_all, table


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mutants", description=__doc__)
    parser.add_argument("--layer", choices=LAYERS, action="append", help="only this layer")
    parser.add_argument("--match", default="", help="only mutants whose name contains this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time")
    parser.add_argument("--list", action="store_true", help="print the list and stop")
    options = parser.parse_args(arguments)
    chosen = [
        mutant
        for mutant in MUTANTS
        if options.match in mutant.name and mutant.layer in (options.layer or LAYERS)
    ]
    if options.list:
        print("\n".join(f"{m.layer:<8} {m.file:<44} {m.name}" for m in chosen))
        print(f"{len(chosen)} mutants")
        return 0
    if missing := native.unsupported() or metal_host.unsupported():
        parser.error(missing)
    verdicts = attempt_all(chosen, options.jobs, lambda verdict: print(verdict, flush=True))
    print(table(verdicts))
    return 0 if all(verdict.caught for verdict in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
