"""Files in the user's cache that hold for one machine and version, as JSON."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any


def cache_directory(name: str) -> Path:
    """Where files of one kind lie: ``paged_mlx/name`` in the user's cache."""
    if sys.platform == "darwin":
        root = Path.home() / "Library" / "Caches"
    else:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "paged_mlx" / name


def machine_file(directory: Path, identity: str) -> Path:
    """The file of a machine and version. ``identity``: whatever makes its content stale."""
    return directory / f"{hashlib.sha256(identity.encode()).hexdigest()[:24]}.json"


def read_dict(path: Path) -> dict[str, Any]:
    """What a file holds; nothing if it cannot be read."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_dict(path: Path, content: dict[str, Any]) -> None:
    """Replace a file in one step: a reader sees the old content or the new.

    Raises:
        OSError: The cache cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(content, indent=1) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all, in the place of an older one.

    Raises:
        OSError: Its folder is not there, or cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        partial.write_text(text)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
