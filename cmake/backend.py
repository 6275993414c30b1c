"""The build backend: scikit-build-core's, with the mlx that the module will be imported beside.

pip builds in an environment of its own. The headers that count are those of the mlx in the
environment that pip installs into, so exactly that one is asked for, with its nanobind.
"""

from __future__ import annotations

import os
import sys
import sysconfig

import mlx_releases
from scikit_build_core import build as _scikit
from scikit_build_core.build import (  # noqa: F401  the rest of the interface
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
)


def get_requires_for_build_wheel(config_settings=None) -> list[str]:
    return [*_scikit.get_requires_for_build_wheel(config_settings), *_requirements()]


def get_requires_for_build_editable(config_settings=None) -> list[str]:
    return [*_scikit.get_requires_for_build_editable(config_settings), *_requirements()]


def _requirements() -> list[str]:
    version = _release()
    return [mlx_releases.requirement(version), f"nanobind=={mlx_releases.nanobind_for(version)}"]


def _release() -> str:
    """The first release asked for, else that of the environment, else the newest."""
    asked = os.environ.get("PAGED_MLX_FOR", "").split()
    if asked and asked != ["all"]:
        return asked[0]
    here = [sysconfig.get_path(name) for name in ("purelib", "platlib")]
    found = mlx_releases.installed(here)
    if found is None:
        found = mlx_releases.newest()
        print(f"no mlx in {sys.prefix}: building for mlx {found}", file=sys.stderr)
    return found
