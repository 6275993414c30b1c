"""The workflows are what docs/testing.md says they are."""

import json
from pathlib import Path

import pytest

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import pip._vendor.tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = ROOT / ".github" / "workflows"

yaml = pytest.importorskip("yaml", reason="workflows are read with pyyaml")


def jobs(name):
    return yaml.safe_load((WORKFLOWS / name).read_text())["jobs"]


def commands(job):
    return [step["run"] for step in job["steps"] if "run" in step]


def make_targets():
    return {
        line.partition(":")[0]
        for line in (ROOT / "Makefile").read_text().replace("$(VENV)", ".venv").splitlines()
        if ":" in line
    }


@pytest.mark.parametrize("path", sorted(WORKFLOWS.glob("*.yml")), ids=lambda path: path.name)
def test_a_workflow_parses_and_calls_only_targets_that_the_makefile_has(path):
    workflow = yaml.safe_load(path.read_text())
    assert workflow["name"] and workflow[True]  # YAML reads "on" as True
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] and commands(job)
        for command in commands(job):
            for line in command.splitlines():
                if line.startswith("make "):
                    assert line.split()[1] in make_targets()


def test_a_mac_runs_everything_even_if_a_test_failed():
    gpu = jobs("macos.yml")["gpu"]
    assert gpu["strategy"]["matrix"]["runner"] == ["macos-15", "macos-26"]
    steps = {step["name"]: step for step in gpu["steps"] if "name" in step}
    assert "doctor" in steps["Doctor"]["run"]
    for name in ("Test", "The conformance suite on the GPU", "Benchmarks"):
        assert steps[name]["if"] == "success() || failure()"
    assert steps["Records"]["if"] == "always()"


def test_linux_runs_plans_for_a_gpu_the_backend_for_arm64_and_the_docs():
    linux = jobs("linux.yml")
    assert "make test-gpu-plans" in commands(linux["gpu-plans"])
    assert "make test-arm64" in commands(linux["test"])
    assert "make docs" in commands(linux["docs"])


def test_a_scheduled_job_builds_against_the_newest_mlx():
    text = (WORKFLOWS / "newest-mlx.yml").read_text()
    assert yaml.safe_load(text)[True]["schedule"]
    (job,) = jobs("newest-mlx.yml").values()
    assert any("--upgrade" in command for command in commands(job))
    assert any("mlx_releases.py listed" in command for command in commands(job))


def test_wheels_are_built_for_every_python_and_platform_that_is_promised():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    settings = project["tool"]["cibuildwheel"]
    oldest = project["project"]["requires-python"].removeprefix(">=3.")
    pythons = [f"cp3{minor}-*" for minor in range(int(oldest), 15)]
    assert settings["build"].split() == pythons
    for where in (settings, settings["macos"]):
        assert where["environment"]["PAGED_MLX_FOR"] == "all"
    assert settings["macos"]["archs"] == ["arm64"] and settings["linux"]["archs"] == ["native"]
    native = jobs("wheels.yml")["native"]
    linux = ["ubuntu-24.04", "ubuntu-24.04-arm"]  # x86-64 and arm64, each built where it runs
    assert native["strategy"]["matrix"]["runner"] == [*linux, "macos-15"]
    assert any("mlx_releases.py wheels" in command for command in commands(native))


def test_workflows_name_the_oldest_and_the_newest_mlx():
    releases = list(json.loads((ROOT / "cmake/mlx_releases.json").read_text()))
    oldest, newest = releases[0], releases[-1]
    versions = commands(jobs("linux.yml")["mlx-versions"])
    assert versions == [f'make test-mlx-versions VERSIONS="{oldest} {newest}"']
    tried = jobs("wheels.yml")["try"]
    assert tried["strategy"]["matrix"]["mlx"] == [oldest, newest]
    python = tried["steps"][0]["with"]["python-version"]
    assert python == f"${{{{ matrix.mlx == '{newest}' && '3.14' || '3.10' }}}}"
