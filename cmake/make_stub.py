"""Write the type stub of the native module. usage: make_stub.py MODULE OUTPUT"""

import importlib.util
import sys
from pathlib import Path

import mlx.core  # noqa: F401  registers the types that signatures name
from nanobind.stubgen import StubGen


def main(module_file: str, output: str) -> None:
    spec = importlib.util.spec_from_file_location("_ext", module_file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    stub = StubGen(module)
    stub.put(module)
    Path(output).write_text(stub.get())


main(*sys.argv[1:])
