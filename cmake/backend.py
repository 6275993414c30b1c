"""The build backend: scikit-build-core's, with the mlx that the module will be imported beside.

pip builds in an environment of its own. The headers that count are those of the mlx in the
environment that pip installs into, so exactly that one is asked for, with its nanobind.
``PAGED_MLX_FOR`` names releases instead, whose wheels CMake unpacks; "none" makes a wheel for every
platform, without a native module.
"""

from __future__ import annotations

import os
import sys
import sysconfig

import compiler
import mlx_releases
from scikit_build_core import build as _scikit
from scikit_build_core.build import (  # noqa: F401  the rest of the interface
    build_sdist,
    get_requires_for_build_sdist,
)


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None) -> str:
    return _scikit.build_wheel(wheel_directory, _settings(config_settings), metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None) -> str:
    return _scikit.build_editable(wheel_directory, _settings(config_settings), metadata_directory)


def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None) -> str:
    return _scikit.prepare_metadata_for_build_wheel(metadata_directory, _settings(config_settings))


def prepare_metadata_for_build_editable(metadata_directory, config_settings=None) -> str:
    settings = _settings(config_settings)
    return _scikit.prepare_metadata_for_build_editable(metadata_directory, settings)


def _settings(given) -> dict:
    asked = os.environ.get("PAGED_MLX_FOR", "")  # told each time: a build's folder remembers
    pure = {"wheel.platlib": "false", "wheel.py-api": "py3"} if asked == "none" else {}
    return {**(given or {}), "cmake.define.PAGED_MLX_FOR": asked, **pure}


def get_requires_for_build_wheel(config_settings=None) -> list[str]:
    return [*_scikit.get_requires_for_build_wheel(config_settings), *_requirements()]


def get_requires_for_build_editable(config_settings=None) -> list[str]:
    return [*_scikit.get_requires_for_build_editable(config_settings), *_requirements()]


def _requirements() -> list[str]:
    asked = os.environ.get("PAGED_MLX_FOR")
    if asked == "none":
        return []
    if lacks := compiler.missing():
        raise SystemExit(f"{lacks} Or install without a native module: PAGED_MLX_FOR=none.")
    if asked:
        return ["pip"]
    found = mlx_releases.installed([sysconfig.get_path(name) for name in ("purelib", "platlib")])
    version = found if found and mlx_releases.in_range(found) else mlx_releases.newest()
    if found != version:
        print(f"{sys.prefix} has mlx {found}: building for mlx {version}", file=sys.stderr)
    return [mlx_releases.requirement(version), f"nanobind=={mlx_releases.nanobind_for(version)}"]
