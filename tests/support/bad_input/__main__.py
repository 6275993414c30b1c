"""``python -m bad_input N``: try N malformed calls, and as many random tables, on the CPU."""

import sys

import mlx.core as mx

from .fuzz import run

if __name__ == "__main__":
    mistakes = run(int(sys.argv[1]), stream=mx.cpu)
    print(*mistakes, sep="\n\n")
    sys.exit(bool(mistakes))
