"""Packages that come before those of the environment, in a folder of their own under build/.

So another mlx-lm is imported beside the pinned mlx and the native module built for it.
"""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
BUILD = ROOT / "build" / "overlays"


def environment(name: str, *packages: str) -> dict[str, str]:
    """Environment variables under which these packages are imported; they are fetched once.

    What they need must be named too, or be in the environment: another mlx must not come along.
    """
    folder = BUILD / name
    done = folder / ".packages"
    if not done.is_file() or done.read_text() != repr(packages):
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "--no-deps", "--upgrade", "--target", folder, *packages], check=True)
        done.write_text(repr(packages))
    path = [str(folder), str(ROOT / "tests/support"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))}


def pytest(variables: dict[str, str], *arguments: str) -> int:
    """Run pytest in the project's folder; its exit status."""
    command = [sys.executable, "-m", "pytest", *arguments]
    return subprocess.run(command, env=variables, cwd=ROOT).returncode
