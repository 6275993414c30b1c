"""``python -m paged_mlx``: the command ``paged-mlx``."""

import sys

from paged_mlx.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
