"""Formatting and types, as CI checks them: ruff for Python, clang-format for C++ and Metal."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def tool(name: str) -> str:
    """A program of this environment; the test is skipped where there is none."""
    found = Path(sys.executable).parent / name
    if not found.exists():
        pytest.skip(f"no {name}: pip install {name}")
    return str(found)


def sources() -> list[str]:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    command = ["git", "ls-files", "csrc/*.h", "csrc/*.cpp", "csrc/*.inc", "kernels/*"]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()


@pytest.mark.parametrize("words", [["check"], ["format", "--check"]], ids=["lint", "format"])
def test_python_is_as_ruff_wants_it(words):
    done = subprocess.run(
        [tool("ruff"), *words, "--quiet", "."], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_cpp_and_metal_are_as_clang_format_wants_them():
    done = subprocess.run(
        [tool("clang-format"), "--dry-run", "--Werror", *sources()],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[:3000]
