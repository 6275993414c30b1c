"""``MlxEncoder`` keeps MLX's contract: tests over a stand-in for MLX's Metal device.

Each runs pytest in a process whose native module is built against the stand-in, see
``tests/support/metal_contract``.
"""

import os
import subprocess
import sys

import metal_host
import pytest
from mutants import native
from mutants.mutant import ROOT

pytestmark = pytest.mark.skipif(
    bool(metal_host.unsupported() or native.unsupported()),
    reason=str(metal_host.unsupported() or native.unsupported()),
)
SUITE = "tests/support/metal_contract/suite.py"
LAUNCHES = (
    "tests/metal/test_launch_on_host.py",
    "tests/metal/test_formats_on_host.py",
    "tests/metal/test_long_work.py",
    "tests/pool/test_pipelined_graph.py",
)


def run(*arguments):
    paths = [str(ROOT / "tests"), str(ROOT / "tests/support"), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-m", "metal_contract", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    assert "passed" in done.stdout and "skipped" not in done.stdout, done.stdout


# Every node in a command buffer of its own: fences. All in one: barriers.
@pytest.mark.parametrize("ops", ["0", "1000000"])
def test_launches_are_ordered_registered_and_held(ops):
    run("--ops", ops, "-v", *LAUNCHES)


@pytest.mark.parametrize("ops", ["0", "1000000"])
def test_lazy_graphs_keep_the_contract(ops):
    run("--ops", ops, "-v", SUITE, "-k", "stand_in or graph")


def test_a_prompt_of_16k_tokens_is_several_nodes_and_no_node_commits():
    run("-v", SUITE, "-k", "prompt")


@pytest.mark.long
def test_a_prompt_of_64k_tokens_and_the_model_of_the_demo():
    run("-v", "-m", "long", SUITE)


def test_the_suite_for_mutants_passes_without_a_fault():
    run("-v", SUITE, "-k", "stand_in or mutants")
