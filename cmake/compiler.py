"""Whether there is a C++ compiler; whoever builds asks before anything is downloaded."""

from __future__ import annotations

import os
import shlex
import shutil
import sys


def missing() -> str | None:
    """A sentence that says what to install, or None where there is a compiler."""
    compiler = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    if shutil.which(compiler[0]):
        return None
    advice = "xcode-select --install" if sys.platform == "darwin" else "apt-get install g++"
    return f"paged_mlx needs a C++20 compiler, and there is no {compiler[0]}: {advice}, or set CXX."
