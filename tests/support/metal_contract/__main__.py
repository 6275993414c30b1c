"""pytest in a process whose native module is built against the stand-in."""

import argparse
import subprocess
import sys

from mutants.trial import MutantModule


def built() -> str:
    """Path of the module. What builds it loads the project's own, so another process does."""
    command = [sys.executable, "-m", "metal_contract.build"]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m metal_contract", description=__doc__)
    parser.add_argument("--ops", type=int, default=40, help="dispatches of a command buffer")
    parser.add_argument("--megabytes", type=int, default=40, help="2^20 elements, likewise")
    parser.add_argument("--threads", type=int, default=1024, help="of a pipeline")
    options, rest = parser.parse_known_args()
    sys.meta_path.insert(0, MutantModule(built()))
    import pytest
    from paged_mlx._native import _ext

    _ext.contract_limits(options.ops, options.megabytes, options.threads)
    return pytest.main(["-p", "no:cacheprovider", *rest])


if __name__ == "__main__":
    sys.exit(main())
