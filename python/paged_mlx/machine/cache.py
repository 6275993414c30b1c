"""The user's cache: files that hold for one machine and version, folders in which more is made."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_LOCK = ".lock"
_UNLOCKED = 60.0  # seconds at the most between making a folder and locking it


def cache_directory(name: str) -> Path:
    """Where files of one kind lie: ``paged_mlx/name`` in the user's cache."""
    try:
        home = Path.home()
    except RuntimeError:  # a container's user who has none: nothing can be kept
        home = Path(os.devnull)
    if sys.platform == "darwin":
        root = home / "Library" / "Caches"
    else:
        root = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    return root / "paged_mlx" / name


@contextmanager
def scratch_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """A folder in which something is made before it is renamed into ``parent``; gone in the end.

    Folders that killed processes have left there go first: whoever lives holds the lock of its own.

    Raises:
        OSError: ``parent`` cannot be written.
    """
    parent.mkdir(parents=True, exist_ok=True)
    sweep(parent, prefix)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    try:
        with open(folder / _LOCK, "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sweep(parent: Path, prefix: str) -> None:
    """Remove the scratch folders that killed processes have left in ``parent``."""
    for folder in parent.glob(prefix + "*"):
        try:
            with open(folder / _LOCK) as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:  # it has just been made, or its maker was killed there
            if time.time() - folder.stat().st_mtime < _UNLOCKED:
                continue
        except OSError:  # somebody works there
            continue
        shutil.rmtree(folder, ignore_errors=True)


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


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file that is there whole or not at all, in the place of an older one.

    Raises:
        OSError: Its folder is not there, or cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(partial, path)
    except OSError as error:  # it names the file that was asked for
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        partial.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Refuse, before anything is worked out for it, a file that could not be written.

    Raises:
        OSError: It could not.
    """
    folder, code = path.parent, 0
    if path.is_dir():
        code = errno.EISDIR
    elif not folder.is_dir():
        code = errno.ENOENT
    elif not os.access(folder, os.W_OK):
        code = errno.EACCES
    if code:
        raise OSError(code, os.strerror(code), str(path))
