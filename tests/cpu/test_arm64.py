"""The CPU backend for arm64 is right: on a Mac it is what a wrong GPU kernel is replaced by."""

import arm64
import pytest


@pytest.mark.long
@pytest.mark.skipif(arm64.unsupported() is not None, reason=str(arm64.unsupported()))
def test_kernels_for_arm64_agree_with_a_reference_in_double_precision():
    done = arm64.run(arm64.build())
    assert (done.returncode, done.stdout) == (0, "neon passed\n"), done.stdout + done.stderr
