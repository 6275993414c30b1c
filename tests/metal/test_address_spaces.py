"""The kernels' address spaces, by a compiler that has them: of the texts that the launch code hands over."""

import re
from pathlib import Path

import metal_host
import mlx.core as mx
import pytest
from metal_host import address_spaces
from paged_mlx import PagePool, PageTable
from paged_mlx._native import _ext
from paged_mlx.machine import doctor
from paged_mlx.reference.dtypes import NAMES
from paged_mlx.testing import Case, Check, backends, checks

KERNELS = Path(__file__).resolve().parents[2] / "kernels"

pytestmark = [
    pytest.mark.skipif(
        metal_host.unsupported() is not None or address_spaces.find_checker() is None,
        reason="address spaces need a clang with C++ for OpenCL: apt-get install clang-19",
    ),
    pytest.mark.filterwarnings("ignore:invalid value"),  # nothing wrote the outputs
]


def wanted():
    """Each kernel once; each body of attention for every type; all options at once."""
    yield from doctor.one_of_each()
    case = Case(num_kv_heads=2, sliding_window=9, softcap=3.0, alibi=1.0, sinks="random")
    masks = ("boolean", "additive_per_head", None)
    for dtype, mask in zip(NAMES, masks, strict=True):
        for gqa_factor, tokens in ((1, 1), (8, 1), (2, 40)):
            sequences = ((tokens, 100),)
            options = case.replace(dtype=dtype, mask=mask, ragged=mask is None, sequences=sequences)
            yield Check("options", options.replace(num_q_heads=2 * gqa_factor))


def move_quantised_pages(k_format):
    """Write, seal and gather pages of a format."""
    pool = PagePool(1, 8, 16, 2, 64, k_format=k_format, v_format="q4", stream=mx.cpu)
    table = PageTable(16)
    slots = table.append_tokens(40, pool.allocator).slots
    k = mx.zeros((40, 2, 64), mx.float16)
    pool[0].write(k, k, slots)
    mx.eval(pool[0].gather([table.page_ids], [40]), pool.state)


@pytest.fixture(scope="module")
def dispatches():
    """By library: what the launch code would run; nothing is run."""
    found = {}
    mx.synchronize()
    _ext.set_host_launch(lambda dispatch: found.setdefault(dispatch["library"], dispatch))
    try:
        for check in wanted():
            checks.run(check, backends.cpu())
        for k_format in ("q8", "q4"):
            move_quantised_pages(k_format)
        mx.synchronize()
    finally:
        _ext.set_host_launch(None)
    return found


def test_every_kernel_names_its_address_spaces(dispatches):
    kernels = {dispatch["kernel"] for dispatch in dispatches.values()}
    assert kernels | {"copy_buffer"} == {path.stem for path in KERNELS.glob("*.metal")}
    errors = {
        library: found
        for library, dispatch in dispatches.items()
        if (found := address_spaces.check(dispatch["text"], constants=dispatch["constants"]))
    }
    assert errors == {}


@pytest.mark.parametrize("kernel", ["attend_vector", "attend_tile", "merge"])
def test_a_dropped_address_space_is_an_error(dispatches, kernel):
    text = next(d["text"] for d in dispatches.values() if d["kernel"] == kernel)
    dropped = re.sub(r"\b(?:device|threadgroup|thread) (\w+\* \w+)", r"\1", text, count=1)
    assert dropped != text
    assert address_spaces.check(dropped)
