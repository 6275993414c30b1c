"""The releases of MLX that the native module is built for, and the headers of each.

``mlx_releases.json`` is the one list: each release of mlx with the nanobind that its own Python
module was built with. Only the same nanobind shares its types.

    python cmake/mlx_releases.py installed            # the mlx of this environment
    python cmake/mlx_releases.py roots 0.32.1 FOLDER  # "MLX_ROOT;NANOBIND_ROOT" of a release

``roots`` names what is installed where that is the release asked for; else it unpacks wheels
into FOLDER.
"""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

RELEASES: dict[str, str] = json.loads(Path(__file__).with_suffix(".json").read_text())


def release(version: str) -> str:
    """The release that a version of mlx belongs to: without a development or local part."""
    return version.split(".dev")[0].split("+")[0]


def nanobind_for(version: str) -> str:
    """The nanobind of a release; for one that is not listed, that of the newest below it."""
    if version in RELEASES:
        return RELEASES[version]
    older = [known for known in RELEASES if _numbers(known) < _numbers(version)]
    return RELEASES[max(older or RELEASES, key=_numbers)]


def newest() -> str:
    """The newest release that is listed."""
    return max(RELEASES, key=_numbers)


def requirement(version: str) -> str:
    """What pip installs for a release, with a library to run on: Apple's GPU, or the CPU."""
    return f"mlx=={version}" if sys.platform == "darwin" else f"mlx[cpu]=={version}"


def installed(path: list[str] | None = None) -> str | None:
    """The release of mlx in this environment, or in the folders of ``path``; None without one."""
    return _version("mlx", path)


def roots(version: str, folder: Path) -> tuple[Path, Path]:
    """Folders with the headers of mlx and its library, and of nanobind."""
    return _mlx_root(version, folder), _nanobind_root(nanobind_for(version), folder)


def _mlx_root(version: str, folder: Path) -> Path:
    if installed() == version:
        root = Path(str(metadata.distribution("mlx").locate_file("mlx")))
        if (root / "include").is_dir():
            return root
    backend = "mlx-metal" if sys.platform == "darwin" else "mlx-cpu"
    return _unpacked(folder / f"mlx-{version}", "mlx", f"mlx=={version}", f"{backend}=={version}")


def _nanobind_root(version: str, folder: Path) -> Path:
    if _version("nanobind") == version:
        return Path(str(metadata.distribution("nanobind").locate_file("nanobind")))
    return _unpacked(folder / f"nanobind-{version}", "nanobind", f"nanobind=={version}")


def _unpacked(folder: Path, package: str, *wheels: str) -> Path:
    """The package's folder out of wheels, downloaded once."""
    done = folder / ".unpacked"
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        try:
            subprocess.run(
                [*pip, "--no-deps", "--only-binary", ":all:", "--dest", str(folder), *wheels],
                check=True,
                stdout=sys.stderr,
            )
        except subprocess.CalledProcessError as error:
            raise SystemExit(
                f"paged_mlx needs {' and '.join(wheels)} to build for, and pip could not download "
                "them: install them, or build where there is a network."
            ) from error
        for wheel in folder.glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(folder)
        done.touch()
    return folder / package


def _version(package: str, path: list[str] | None = None) -> str | None:
    found = metadata.distributions(name=package, **({"path": path} if path else {}))
    return next((release(distribution.version) for distribution in found), None)


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".") if part.isdigit()]


def main(arguments: list[str]) -> None:
    if arguments == ["installed"]:
        print(installed() or "")
    else:
        command, version, folder = arguments
        assert command == "roots", command
        print(";".join(root.as_posix() for root in roots(version, Path(folder))))


if __name__ == "__main__":
    main(sys.argv[1:])
