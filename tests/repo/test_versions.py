"""Which native module is loaded, what is said when there is none, and where the version stands."""

import json
import os
import re
import shutil
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
    assert said.startswith("1 paged_mlx cannot load its native module for mlx ")
    assert "`python -m paged_mlx build` makes one" in said
    assert backend == f"fallback: MLX's own operations, mlx {mx.__version__}"


def test_without_a_module_the_doctor_says_so_and_there_is_nothing_to_tune():
    done = python(
        HIDDEN + "from paged_mlx.machine import doctor, tune\n"
        "print(doctor.environment()['backend'])\n"
        "raise SystemExit(tune.main([]))\n"
    )
    assert done.stdout.startswith("fallback: ")
    assert done.returncode == 2 and "nothing was measured" in done.stderr


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


@pytest.mark.parametrize("version", ["0.32.99", "0.33.0", "1.0.0.dev20270101+abc"])
def test_beside_a_newer_mlx_the_package_works_and_names_the_command(version):
    code = (
        f"import warnings, mlx.core as mx; mx.__version__ = {version!r}\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    import paged_mlx\n"
        "print(len(caught), caught[0].message)\n"
        "print(paged_mlx.backend())\n"
        "from paged_mlx.machine import doctor\n"
        "print(doctor.environment()['backend'])\n"
        "q, pages = mx.ones((1, 1, 8)), mx.ones((1, 1, 4, 8))\n"
        "print(paged_mlx.fast.paged_attention(q, pages, pages, [[0]], [4]).tolist())\n"
    )
    done = python(code)
    said, backend, in_doctor, out = done.stdout.splitlines()
    assert said.startswith(f"1 paged_mlx has no native module for mlx {_native.release(version)} ")
    assert "`python -m paged_mlx build` makes one" in said
    assert backend == in_doctor == f"fallback: MLX's own operations, mlx {version}"
    assert out == str([[[1.0] * 8]])


@pytest.mark.parametrize("lacks", ["No module named 'mlx'", "libmlx.so: cannot open shared object"])
def test_without_mlx_or_its_library_one_sentence_says_what_to_install(lacks):
    code = (
        "import sys\n"
        "class Broken:\n"
        "    @staticmethod\n"
        "    def find_spec(name, path=None, target=None):\n"
        f"        if name == 'mlx': raise ImportError({lacks!r})\n"
        "sys.meta_path.insert(0, Broken)\n"
        "import paged_mlx\n"
    )
    lines = python(code).stderr.splitlines()
    assert f"ImportError: {lacks}" in lines  # MLX's own words come before ours
    said = "ImportError: paged_mlx needs MLX and a library for it to run on: pip install "
    assert lines[-1].startswith(said)


def test_two_mlx_on_the_path_are_named(tmp_path):
    other = tmp_path / "mlx-0.31.2.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: mlx\nVersion: 0.31.2\n")
    code = "from paged_mlx.machine import doctor; print(doctor.environment()['mlx'])"
    done = python(code, PYTHONPATH=str(tmp_path))
    assert "more than one is on the path, leave one of them: " in done.stdout
    assert f"0.31.2 in {tmp_path}" in done.stdout and f"{mx.__version__} in " in done.stdout


def test_a_module_that_loads_the_library_of_another_mlx_is_not_used():
    code = (
        "import sys, types, warnings\n"
        "sys.modules['paged_mlx._ext'] = types.SimpleNamespace(mlx_version='0.31.2')\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    import paged_mlx\n"
        "print(paged_mlx.backend())\n"
        "print(caught[0].message)\n"
    )
    backend, said = python(code).stdout.splitlines()
    assert backend.startswith("fallback: ")
    assert "the library that was loaded of mlx 0.31.2" in said and "leave one of them" in said


@pytest.mark.native
def test_where_the_packages_module_cannot_be_loaded_the_one_that_was_built_is(tmp_path):
    real = Path(_native._ext.__file__)
    package, cache = tmp_path / "paged_mlx", tmp_path / "cache/paged_mlx/native"
    broken = package / "native" / real.parent.name / real.name
    broken.parent.mkdir(parents=True)
    broken.touch()
    for file in (ROOT / "python/paged_mlx").iterdir():
        (package / file.name).symlink_to(file)
    path = os.pathsep.join([str(tmp_path), str(Path(mx.__file__).parents[1])])
    variables = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": path}
    code = "import paged_mlx; print(paged_mlx.backend())"
    without = python(code, "-S", **variables)  # nothing that an editable installation adds
    assert without.stdout.startswith("fallback: ")
    assert (
        "cannot load its native module" in without.stderr and "build` makes one" in without.stderr
    )
    built = cache / paged_mlx.__version__ / real.parent.name
    built.mkdir(parents=True)
    (built / real.name).symlink_to(real)
    for core in real.parents[1].glob("libpaged_mlx_core.*"):
        (built.parent / core.name).symlink_to(core)
    done = python(code, "-S", **variables)
    assert done.stdout.strip().endswith(f": {built / real.name}") and not done.stderr


def test_an_mlx_that_is_too_old_is_one_sentence():
    done = python("import mlx.core as mx; mx.__version__ = '0.31.1'; import paged_mlx")
    said = "ImportError: paged_mlx needs mlx 0.31.2 or newer; this is mlx 0.31.1: pip install"
    assert said in done.stderr


def test_a_build_says_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    with pytest.raises(
        build_native.CannotBuild, match="needs a C\\+\\+20 compiler.* no-such-compiler"
    ):
        build_native.build(force=True)
    monkeypatch.setattr(
        build_native.shutil, "which", lambda name, path=None: None if name == "cmake" else "found"
    )
    with pytest.raises(build_native.CannotBuild, match="needs cmake: pip install cmake"):
        build_native.build(force=True)
    assert list(tmp_path.iterdir()) == []


def test_a_build_says_that_cmake_is_too_old(monkeypatch, tmp_path):
    old = tmp_path / "cmake"
    old.write_text("#!/bin/sh\necho cmake version 3.25.1\n")
    old.chmod(0o755)
    monkeypatch.setattr(
        build_native.shutil, "which", lambda name, path=None: str(old) if name == "cmake" else "c++"
    )
    with pytest.raises(
        build_native.CannotBuild, match=r"needs cmake 3\.27 or newer, and .* 3\.25\.1"
    ):
        build_native.build(force=True)


def test_a_build_without_a_network_says_what_to_install_and_leaves_nothing(tmp_path):
    code = (
        "import mlx.core as mx; mx.__version__ = '0.32.99'\n"
        "from paged_mlx.machine import build; raise SystemExit(build.main([]))\n"
    )
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "XDG_CACHE_HOME": str(tmp_path)}
    done = python(code, "-W", "ignore", **offline)
    assert done.returncode == 1
    (said,) = done.stderr.splitlines()
    assert said.startswith("paged_mlx needs mlx-")
    assert "==0.32.99 to build, and pip could not download it (ERROR: No matching" in said
    assert list(tmp_path.rglob("*.*/*")) == []


def test_pip_finds_no_compiler_before_it_downloads_what_a_build_needs():
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'cmake')!r}); import backend\n"
        "print(backend.get_requires_for_build_wheel())\n"
    )
    done = python(code, CXX="no-such-compiler")
    assert done.stderr.startswith(
        "paged_mlx needs a C++20 compiler, and there is no no-such-compiler"
    )
    assert done.stderr.strip().endswith("install without a native module: PAGED_MLX_FOR=none.")
    assert python(code, CXX="no-such-compiler", PAGED_MLX_FOR="none").returncode == 0


def test_a_cache_that_cannot_be_written_is_one_sentence(monkeypatch, tmp_path):
    (tmp_path / "paged_mlx").write_text("a file where the folder belongs")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(build_native.CannotBuild, match="must be a folder that can be written"):
        build_native.build(force=True)


def test_a_user_without_a_home_imports_the_package_and_a_build_is_one_sentence():
    code = (
        "from pathlib import Path\n"
        "def home(): raise RuntimeError('Could not determine home directory.')\n"
        "Path.home = home\n"
        "from paged_mlx.machine import build; raise SystemExit(build.main(['--force']))\n"
    )
    done = python(code, "-W", "ignore", XDG_CACHE_HOME="")
    assert done.returncode == 1
    (said,) = done.stderr.splitlines()
    assert " must be a folder that can be written (XDG_CACHE_HOME names another)" in said


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


@pytest.mark.parametrize("hook", ["build_wheel", "build_editable"])
def test_a_folder_that_was_built_in_is_built_for_what_is_asked_now(hook, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "cmake"))
    import backend

    asked = []
    monkeypatch.setattr(
        backend._scikit, hook, lambda folder, settings, metadata: asked.append(settings)
    )
    for releases in ("all", "0.31.2 0.32.4", ""):
        monkeypatch.setenv("PAGED_MLX_FOR", releases)
        getattr(backend, hook)("wheels", {"editable.rebuild": "false"})
        assert asked.pop() == {"editable.rebuild": "false", "cmake.define.PAGED_MLX_FOR": releases}
    assert "$ENV{PAGED_MLX_FOR}" not in (ROOT / "CMakeLists.txt").read_text()


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


@pytest.mark.long
@pytest.mark.native
def test_a_source_distribution_builds_without_a_network(tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'cmake')!r}); import backend\n"
        f"backend.build_sdist({str(tmp_path)!r})\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
    (sdist,) = tmp_path.glob("*.tar.gz")
    alone = ["unshare", "--map-root-user", "--net"]  # where the system has it, else by its proxy
    if not shutil.which("unshare") or subprocess.run([*alone, "true"]).returncode:
        alone = []
    nowhere = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
    pip = [*alone, sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*pip, "--wheel-dir", tmp_path, sdist],
        env=os.environ | nowhere, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    module = (
        f"paged_mlx/native/{_native.folder_name(mx.__version__)}/{Path(_native._ext.__file__).name}"
    )
    assert module in zipfile.ZipFile(wheel).namelist()


def test_the_version_stands_in_one_place():
    assert metadata.version("paged_mlx") == paged_mlx.__version__
    assert not re.search(r'^version = "', (ROOT / "pyproject.toml").read_text(), re.M)
    newest = re.search(r"^## (?:Unreleased: )?(\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)[1]
    assert newest == paged_mlx.__version__


def test_the_range_of_mlx_is_that_of_the_modules():
    text = (ROOT / "pyproject.toml").read_text()
    oldest, end = re.search(r'"mlx>=([\d.]+),<([\d.]+)"', text).groups()
    numbers = [tuple(map(int, release.split("."))) for release in RELEASES]
    assert tuple(map(int, oldest.split("."))) == min(numbers)
    assert oldest == _native.OLDEST
    assert max(numbers) < tuple(map(int, end.split(".")))
