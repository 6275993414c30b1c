"""A kernel's state stays in registers: the budget of every variant that the launch code can choose."""

import metal_host
import pytest
from metal_kernels import registers

pytestmark = pytest.mark.skipif(
    metal_host.unsupported() is not None, reason=str(metal_host.unsupported())
)


def check(variant: registers.Variant) -> None:
    assert registers.footprint(variant).in_memory == ()


# One of each body in each size of element; the rest is in the long test.
FEW = registers.few()


@pytest.mark.parametrize("variant", FEW, ids=str)
def test_state_stays_in_registers(variant):
    check(variant)


@pytest.mark.long
@pytest.mark.parametrize("variant", [v for v in registers.variants() if v not in FEW], ids=str)
def test_state_of_every_variant_stays_in_registers(variant):
    check(variant)
