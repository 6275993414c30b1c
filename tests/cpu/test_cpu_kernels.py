"""The CPU backend as a library without Python: tests/support/cpp/cpu_attention_test.cpp."""

import subprocess

import pytest
from mutants import native
from mutants.mutant import ROOT

SOURCE = ROOT / "tests/support/cpp" / "cpu_attention_test.cpp"


@pytest.mark.skipif(bool(native.unsupported()), reason=str(native.unsupported()))
def test_kernels_and_threads_agree_with_a_reference_in_double_precision(tmp_path):
    project = native.project()
    test = tmp_path / "cpu_attention_test.o"
    project.compile("csrc/cpu/attention.cpp", SOURCE, test, last=["-O1"])
    objects = [
        project.directory / project.object_of(f"csrc/cpu/{path.name}")
        for path in sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))
    ]
    program = tmp_path / "cpu_attention_test"
    subprocess.run(["c++", "-pthread", "-o", program, test, *objects], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("passed\n"), done.stdout
