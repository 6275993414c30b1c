"""Which native module is loaded, what is said when there is none, and where the version stands."""

import json
import re
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import mlx.core as mx
import paged_mlx
import pytest
from paged_mlx import _native
from paged_mlx.machine import build as build_native

ROOT = Path(__file__).parents[2]
RELEASES = json.loads((ROOT / "cmake/mlx_releases.json").read_text())
SUFFIX = _native.EXTENSION_SUFFIXES[0]


def python(code: str, *options: str, **variables: str) -> subprocess.CompletedProcess:
    """Run a program in another process, where the package is imported afresh."""
    import os

    return subprocess.run(
        [sys.executable, *options, "-c", code],
        capture_output=True, text=True, env=os.environ | variables, timeout=120,
    )  # fmt: skip


HIDDEN = """
import sys
class Hidden:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "paged_mlx._ext":
            raise ImportError("no such module")
sys.meta_path.insert(0, Hidden)
"""


@pytest.mark.native
def test_the_module_of_the_installed_mlx_is_loaded():
    assert _native.BUILT
    assert _native._ext.mlx_build_version == _native.release(mx.__version__)
    assert Path(_native._ext.__file__).parent.name == _native.folder_name(mx.__version__)
    assert paged_mlx.backend().startswith(f"native module for mlx {mx.__version__}: ")


def test_a_development_version_has_the_module_of_its_release():
    assert _native.folder_name("0.32.4.dev20260101+abc") == "mlx_0_32_4"


def test_a_module_for_another_release_or_another_python_is_not_chosen(tmp_path, monkeypatch):
    monkeypatch.setattr(paged_mlx, "__path__", [str(tmp_path)])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for release, suffix in (("0.32.3", SUFFIX), ("0.32.4", ".cpython-27-nowhere.so")):
        folder = tmp_path / "native" / _native.folder_name(release)
        folder.mkdir(parents=True)
        (folder / f"_ext{suffix}").touch()
    chosen = [f for f in _native.folders("0.32.4") if _native.holds_module(f)]
    assert chosen == []
    assert _native.releases() == ["0.32.3"]


def test_without_a_module_one_warning_names_the_command_and_mlx_does_the_work():
    code = HIDDEN + (
        "import warnings\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    import paged_mlx, paged_mlx.testing\n"
        "print(len(caught), caught[0].message)\n"
        "print(paged_mlx.backend())\n"
    )
    done = python(code)
    said, backend = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert said.startswith("1 paged_mlx has no native module for mlx ")
    assert "`python -m paged_mlx build` makes one" in said
    assert backend == f"fallback: MLX's own operations, mlx {mx.__version__}"


def test_without_a_module_the_doctor_says_so_and_there_is_nothing_to_tune():
    done = python(
        HIDDEN + "from paged_mlx.machine import doctor, tune\n"
        "print(doctor.environment()['backend'])\n"
        "raise SystemExit(tune.main([]))\n"
    )
    backend, tuned = done.stdout.splitlines()
    assert backend.startswith("fallback: ")
    assert done.returncode == 2 and "nothing was measured" in tuned


def test_beside_mlx_for_cuda_mlx_does_the_work():
    code = (
        "import warnings, mlx.core as mx\n"
        "mx.cuda.is_available = lambda: True\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    import paged_mlx\n"
        "print(paged_mlx.backend())\n"
        "print(caught[0].message)\n"
    )
    backend, said = python(code).stdout.splitlines()
    assert backend.startswith("fallback: ")
    assert "none for CUDA" in said and "build" not in said


def test_an_mlx_that_is_too_old_is_one_sentence():
    done = python("import mlx.core as mx; mx.__version__ = '0.31.1'; import paged_mlx")
    said = "ImportError: paged_mlx needs mlx 0.31.2 or newer; this is mlx 0.31.1: pip install"
    assert said in done.stderr


def test_a_build_says_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    with pytest.raises(build_native.CannotBuild, match="no C\\+\\+ compiler, no-such-compiler"):
        build_native.build(force=True)
    monkeypatch.setattr(build_native, "sources", lambda: tmp_path)
    monkeypatch.setattr(build_native.shutil, "which", lambda name, path=None: None)
    with pytest.raises(build_native.CannotBuild, match="needs cmake: pip install cmake"):
        build_native.build(force=True)


def test_a_cache_that_cannot_be_written_is_one_sentence(monkeypatch, tmp_path):
    (tmp_path / "paged_mlx").write_text("a file where the folder belongs")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(build_native.CannotBuild, match="must be a folder that can be written"):
        build_native.build(force=True)


@pytest.mark.native
def test_what_is_built_already_is_not_built_again(capsys):
    assert build_native.main([]) == 0
    assert "There is a native module for mlx" in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.native
def test_a_build_makes_a_module_that_is_found(tmp_path):
    made = python("from paged_mlx.machine.build import build; print(build(force=True))",
                  XDG_CACHE_HOME=str(tmp_path))  # fmt: skip
    assert made.returncode == 0, made.stderr[-3000:]
    folder = next((tmp_path / "paged_mlx" / "native").rglob("mlx_*"))
    code = f"import paged_mlx; paged_mlx.__path__[:] = [p for p in paged_mlx.__path__ if 'site-packages' not in p]; from paged_mlx import _native; assert {str(folder)!r} in _native._ext.__file__"
    done = python(code, XDG_CACHE_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr


def test_what_is_built_for_follows_the_mlx_that_is_installed(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "cmake"))
    import mlx_releases

    assert mlx_releases.in_range("0.31.2") and mlx_releases.in_range("0.32.99")
    assert not mlx_releases.in_range("0.31.1") and not mlx_releases.in_range("0.33.0")
    assert mlx_releases.nanobind_for("0.32.99") == RELEASES[mlx_releases.newest()]
    with pytest.raises(SystemExit, match="0.32.99 is missing from cmake/mlx_releases.json"):
        mlx_releases.check_listed("0.32.99")
    mlx_releases.check_listed(mlx_releases.newest())


def test_a_wheel_that_lacks_a_module_is_refused(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "cmake"))
    import mlx_releases

    wheel = tmp_path / "some.whl"
    folders = [f"paged_mlx/native/{_native.folder_name(release)}/_ext.so" for release in RELEASES]
    for names in (folders, folders[1:]):
        with zipfile.ZipFile(wheel, "w") as archive:
            for name in names:
                archive.writestr(name, "")
        if names is folders:
            mlx_releases.check_wheel(wheel)
            monkeypatch.setattr(mlx_releases, "LARGEST_WHEEL", 0)
            with pytest.raises(SystemExit, match="must be at most 0 MB"):
                mlx_releases.check_wheel(wheel)
    with pytest.raises(SystemExit, match="some.whl has no native module for mlx 0.31.2"):
        mlx_releases.check_wheel(wheel)


def test_a_wheel_without_a_native_module_is_for_every_platform_and_has_the_sources(tmp_path):
    import os

    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-index", "--no-build-isolation"]
    settings = f"--config-settings=build-dir={tmp_path / 'build'}"
    variables = os.environ | {"PAGED_MLX_FOR": "none"}
    done = subprocess.run(
        [*pip, settings, "--wheel-dir", tmp_path, ROOT],
        env=variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"paged_mlx-{paged_mlx.__version__}-py3-none-any.whl"
    names = zipfile.ZipFile(wheel).namelist()
    assert {"paged_mlx/sources/CMakeLists.txt", "paged_mlx/sources/csrc/shape_check.h"} <= set(
        names
    )
    assert not any(name.startswith("paged_mlx/native") for name in names)


def test_the_version_stands_in_one_place():
    assert metadata.version("paged_mlx") == paged_mlx.__version__
    assert not re.search(r'^version = "', (ROOT / "pyproject.toml").read_text(), re.M)


def test_the_range_of_mlx_is_that_of_the_modules():
    text = (ROOT / "pyproject.toml").read_text()
    oldest, end = re.search(r'"mlx>=([\d.]+),<([\d.]+)"', text).groups()
    numbers = [tuple(map(int, release.split("."))) for release in RELEASES]
    assert tuple(map(int, oldest.split("."))) == min(numbers)
    assert oldest == _native.OLDEST
    assert max(numbers) < tuple(map(int, end.split(".")))
