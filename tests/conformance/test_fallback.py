"""MLX's own operations stand in for the native module: all of it, and with right results."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from paged_mlx import fallback

ROOT = Path(__file__).parents[2]


def test_everything_that_the_package_takes_from_the_native_module_has_a_stand_in():
    sources = (ROOT / "python/paged_mlx").rglob("*.py")
    taken = {
        name for path in sources for name in re.findall(r"\b_ext\.([a-z]\w+)", path.read_text())
    }
    assert "paged_attention" in taken
    assert {name for name in taken if not hasattr(fallback, name)} == set()


@pytest.mark.native
@pytest.mark.parametrize(
    "program",
    [
        "from paged_mlx.testing.__main__ import main\n"
        "assert main(['--run', 'small', '--backend', 'cpu']) == 0",
        "import pytest; pytest.importorskip('mlx_lm')\n"
        "import mlx_lm_zoo as zoo\n"
        "model, prompt = zoo.tiny('gemma3_text'), zoo.prompt(45, seed=3)\n"
        "expected = zoo.single(model, prompt, max_tokens=16)\n"
        "with paged_mlx.enable(model, page_size=8) as paged:\n"
        "    assert zoo.single(model, prompt, max_tokens=16) == expected\n"
        "    assert paged.groups",
    ],
    ids=["small suite", "a model of mlx-lm"],
)
def test_without_a_native_module_results_are_right(program):
    hidden = "import without_native, paged_mlx; assert paged_mlx.backend().startswith('fallback')\n"
    path = os.pathsep.join([str(ROOT / "tests/support"), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, "-c", hidden + program],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
