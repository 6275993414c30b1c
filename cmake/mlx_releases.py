"""The releases of MLX that the native module is built for, and the headers of each.

``mlx_releases.json`` is the one list: each release of mlx with the nanobind that its own Python
module was built with. Only the same nanobind shares its types.

    python cmake/mlx_releases.py installed            # the mlx of this environment
    python cmake/mlx_releases.py roots 0.32.1 FOLDER  # "MLX_ROOT;NANOBIND_ROOT" of a release
    python cmake/mlx_releases.py listed               # fails if the mlx of this environment is not
    python cmake/mlx_releases.py wheels FILE ...      # fails if a wheel lacks a module, or is big

``roots`` names what is installed where that is the release asked for; else it unpacks wheels
into FOLDER. The wheel of mlx's library has the headers and serves every Python.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

RELEASES: dict[str, str] = json.loads(Path(__file__).with_suffix(".json").read_text())
LARGEST_WHEEL = 25  # MB


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


def in_range(version: str) -> bool:
    """Whether the package runs beside this mlx: not older than those listed, nor of a later series."""
    numbers = _numbers(version)
    return numbers >= min(map(_numbers, RELEASES)) and numbers[:2] <= _numbers(newest())[:2]


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
    library = "mlx-metal" if sys.platform == "darwin" else "mlx-cpu"
    return _unpacked(folder / f"mlx-{version}", "mlx", f"{library}=={version}")


def _nanobind_root(version: str, folder: Path) -> Path:
    if _version("nanobind") == version:
        return Path(str(metadata.distribution("nanobind").locate_file("nanobind")))
    return _unpacked(folder / f"nanobind-{version}", "nanobind", f"nanobind=={version}")


def _unpacked(folder: Path, package: str, wheel: str) -> Path:
    """The package's folder out of a wheel, downloaded once.

    The oldest system that mlx has wheels for is asked for: what is built for it runs on newer ones,
    and a build needs none of it to run.
    """
    done = folder / ".unpacked"
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        try:
            subprocess.run(
                [*pip, "--no-deps", "--only-binary", ":all:", "--platform", _platform(),
                 "--dest", str(folder), wheel],
                check=True,
                capture_output=True,
                text=True,
            )  # fmt: skip
        except subprocess.CalledProcessError as error:
            said = error.stderr.strip().splitlines()[-1:] or [f"exit status {error.returncode}"]
            raise SystemExit(
                f"paged_mlx needs {wheel} to build, and pip could not download it ({said[0]}): "
                "install it, or build where there is a network."
            ) from error
        for file in folder.glob("*.whl"):
            with zipfile.ZipFile(file) as archive:
                archive.extractall(folder)
        done.touch()
    return folder / package


def _platform() -> str:
    if sys.platform == "darwin":
        return "macosx_14_0_arm64"
    return f"manylinux_2_35_{platform.machine()}"


def _version(package: str, path: list[str] | None = None) -> str | None:
    found = metadata.distributions(name=package, **({"path": path} if path else {}))
    return next((release(distribution.version) for distribution in found), None)


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".") if part.isdigit()]


def check_listed(version: str | None) -> None:
    """Say so, and fail, if a release is not in the list."""
    if version not in RELEASES:
        raise SystemExit(
            f"mlx {version} is missing from cmake/mlx_releases.json: add it with the nanobind that its "
            "Python module is built with (the nanobind of its build requirements), and run `make "
            f'test-mlx-versions VERSIONS="{version}"`.'
        )


def check_wheel(file: Path) -> None:
    """Say so, and fail, if a wheel lacks the module of a release or is larger than promised."""
    names = zipfile.ZipFile(file).namelist()
    for version in RELEASES:
        folder = f"paged_mlx/native/mlx_{version.replace('.', '_')}/"
        if not any(name.startswith(folder) for name in names):
            raise SystemExit(f"{file.name} has no native module for mlx {version}.")
    size = file.stat().st_size / 1e6
    print(f"{file.name}: {size:.1f} MB")
    if size > LARGEST_WHEEL:
        raise SystemExit(f"{file.name} must be at most {LARGEST_WHEEL} MB; got {size:.1f}.")


def main(arguments: list[str]) -> None:
    command, *rest = arguments
    if command == "installed":
        print(installed() or "")
    elif command == "listed":
        check_listed(installed())
    elif command == "wheels":
        for file in rest:
            check_wheel(Path(file))
    else:
        version, folder = rest
        assert command == "roots", command
        print(";".join(root.as_posix() for root in roots(version, Path(folder))))


if __name__ == "__main__":
    main(sys.argv[1:])
