"""mlx for macOS, unpacked in the user's cache."""

import functools
import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

# The wheel with libmlx.dylib and the headers. A new mlx: its hash is on the package index.
PACKAGE, VERSION = "mlx-metal", "0.32.4"
WHEEL = "mlx_metal-0.32.4-py3-none-macosx_14_0_arm64.whl"
SHA256 = "8019b2db622599267d66cc168b2f0dbf5af929790a6c3b3913e00eabc42a7947"


class NotAvailable(RuntimeError):
    """The wheel is neither in the cache nor to be had."""


def cache_directory() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    directory = Path(root) / "paged_mlx" / "macos_build"
    directory.mkdir(parents=True, exist_ok=True)
    return directory


@functools.cache
def mlx_for_macos() -> Path:
    """The folder with ``include`` and ``lib``.

    Raises:
        NotAvailable: The wheel cannot be downloaded.
        ValueError: What was downloaded is not the wheel that this project knows.
    """
    unpacked = cache_directory() / SHA256[:16]
    if not unpacked.exists():
        wheel = _download()
        partial = unpacked.with_suffix(f".{os.getpid()}")
        with zipfile.ZipFile(wheel) as archive:
            wanted = [n for n in archive.namelist() if not n.endswith(".metallib")]
            archive.extractall(partial, wanted)
        if not unpacked.exists():
            partial.rename(unpacked)
        wheel.unlink()
    return unpacked / "mlx"


def _download() -> Path:
    folder = cache_directory() / "wheels"
    command = (
        f"pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: "
        f"--platform macosx_14_0_arm64 --python-version 3.12 {PACKAGE}=={VERSION}"
    )
    arguments = [sys.executable, "-m", *command.split(), "--dest", str(folder)]
    done = subprocess.run(arguments, capture_output=True, text=True)
    wheel = folder / WHEEL
    if done.returncode or not wheel.exists():
        raise NotAvailable(f"{PACKAGE}=={VERSION} for macOS: {done.stderr.strip()[-300:]}")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != SHA256:
        wheel.unlink()
        raise ValueError(f"[wheels] {WHEEL} must have sha256 {SHA256}; got {found}.")
    return wheel
