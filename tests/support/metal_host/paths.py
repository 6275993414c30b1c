"""Where the parts of the Metal host lie."""

from pathlib import Path

_ROOT = Path(__file__).resolve().parent
INCLUDE = _ROOT / "include"
PREDEFINED = INCLUDE / "predefined"
RUNTIME = _ROOT / "runtime"
