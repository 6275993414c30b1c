"""mypy passes on the package: what a user's own checker sees of it is right."""

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


@pytest.mark.long
def test_mypy_passes_on_the_package():
    done = mypy()
    assert done.returncode == 0, done.stdout


@pytest.mark.long
def test_a_users_program_needs_no_casts(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(USER)
    done = mypy(str(program))
    assert done.returncode == 0, done.stdout
