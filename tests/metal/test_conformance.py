"""The conformance suite over the Metal launch code and the kernels' text."""

from dataclasses import replace

import pytest
from metal_on_host import metal_on_host
from paged_mlx.testing import backends, grid, report, run_suite, small

GROUPS = sorted({check.group for check in small.checks()})


def run_on_host(checks, instrument):
    with metal_on_host(instrument) as launches:
        result = run_suite(checks, [replace(backends.cpu(), name="metal text on the host")])
    assert result.right, report.failures(result)
    assert launches.findings == []
    return launches


@pytest.mark.parametrize("group", GROUPS)
def test_the_suite_for_slow_backends_passes(group):
    checks = [check for check in small.checks() if check.group == group]
    launches = run_on_host(checks, instrument=True)
    assert launches.kernels.total() >= len(checks)


@pytest.mark.long
@pytest.mark.parametrize("group", [g for g in grid.GROUPS if g not in ("large", "graph")])
def test_the_quick_suite_passes(group):
    run_on_host([check for check in grid.quick() if check.group == group], instrument=False)
