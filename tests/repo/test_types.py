"""mypy passes on the package: what a user's own checker sees of it is right."""

import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

USER = """
import mlx.core as mx
from paged_mlx import PagePool, PageTable, fast, paged_attention

pool = PagePool(1, 8, 16, 2, 64)
table = PageTable(16)
plan = pool.plan([table], num_q_heads=4)
q = mx.zeros((1, 4, 64))
out: mx.array = pool[0].attend(q, plan) + 1
both: tuple[mx.array, mx.array] = paged_attention(q, [table], pool[0], return_lse=True)
raw: mx.array = fast.paged_attention(q, q, q, plan=plan) + 1
"""


def mypy(*arguments):
    pytest.importorskip("mypy", reason="mypy is not installed: pip install mypy")
    command = [sys.executable, "-m", "mypy", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_mypy_passes_on_the_package():
    done = mypy()
    assert done.returncode == 0, done.stdout


def test_a_users_program_needs_no_casts(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(USER)
    done = mypy(str(program))
    assert done.returncode == 0, done.stdout


def untyped(module) -> set[str]:
    """Parameters without a type, of a module's public functions and of its classes' methods."""
    found = set()
    for name in module.__all__:
        named = getattr(module, name)
        functions = {name: named}
        if inspect.isclass(named):
            methods = inspect.getmembers(named, inspect.isfunction)
            functions = {f"{name}.{m}": f for m, f in methods if m == "__init__" or m[0] != "_"}
        for called, function in functions.items():
            if str(getattr(function, "__module__", "")).startswith("paged_mlx"):
                parameters = inspect.signature(function).parameters.values()
                found |= {
                    f"{called}({p.name})"
                    for p in parameters
                    if p.annotation is p.empty and p.name not in ("self", "cls")
                }
    return found


@pytest.mark.parametrize("name", ["paged_mlx", "paged_mlx.fast", "paged_mlx.mlx_lm"])
def test_every_public_parameter_is_typed(name):
    pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: pip install mlx-lm")
    assert untyped(importlib.import_module(name)) == set()
