"""A kernel's state stays in registers: the budget of every variant that the launch code can choose."""

import metal_host
import pytest
import register_table
from metal_kernels import registers
from metal_kernels.launcher import KERNELS, ROOT

pytestmark = pytest.mark.skipif(
    metal_host.unsupported() is not None, reason=str(metal_host.unsupported())
)

# The most rows of each body at a few head dims and dtypes; the rest is in the long tests.
FEW = registers.few()
FEW_QUANTISED = [
    variant
    for variant in registers.quantised()
    if variant.head_dim == 128 and variant.rows in (1, 8)
]
DOCS = (ROOT / "docs/metal.md").read_text()


def check(variant: registers.Variant) -> None:
    found = registers.footprint(variant)
    assert found.in_memory == ()
    assert found.live_words <= registers.most_live_words(variant)
    assert found.loop_instructions <= registers.MOST_LOOP_INSTRUCTIONS
    assert found.long_divisions == 0
    assert found.threadgroup_bytes <= registers.most_threadgroup_bytes(variant)


@pytest.mark.parametrize("variant", FEW + FEW_QUANTISED, ids=str)
def test_variant_keeps_its_budget(variant):
    check(variant)


@pytest.mark.parametrize("variant", FEW, ids=str)
def test_every_option_at_once_stays_in_registers(variant):
    found = registers.footprint(variant, options=True)
    assert found.in_memory == ()
    assert found.live_words <= registers.MOST_LIVE_WORDS_WITH_OPTIONS
    assert found.loop_instructions <= registers.MOST_LOOP_INSTRUCTIONS


@pytest.mark.parametrize("variant", FEW + FEW_QUANTISED, ids=str)
def test_docs_have_the_row_of_a_variant(variant):
    assert register_table.line(variant) in DOCS


@pytest.mark.long
@pytest.mark.parametrize(
    "variant", [v for v in registers.variants() if v not in FEW] + registers.quantised(), ids=str
)
def test_every_variant_keeps_its_budget(variant):
    check(variant)


@pytest.mark.long
def test_docs_have_the_table_that_the_command_prints():
    assert register_table.table() in DOCS
    assert register_table.formats_table() in DOCS


@pytest.mark.parametrize("kernel", ["write_pages", "copy_pages", "gather_pages", "merge"])
def test_no_thread_divides_in_64_bits(kernel):
    macros = {"UNIT": "uint4", "T": "half", "DV": 128, "SIMDGROUPS": 8}
    text = "".join(f"#define PAGED_MLX_{macro} {value}\n" for macro, value in macros.items())
    text += (KERNELS / f"{kernel}.metal").read_text()
    constants = {id: id == 5 for id in range(8)}  # ragged
    found = metal_host.registers.footprint(text, kernel, [KERNELS], constants)
    assert found.long_divisions == 0 and found.in_memory == ()


def test_an_array_that_a_lane_indexes_is_found():
    """What the footprint looks for: state that no compiler can keep in registers."""
    text = """
#include <metal_stdlib>
using namespace metal;
[[kernel]] void pick(device float* x [[buffer(0)]], ushort lane [[thread_index_in_simdgroup]]) {
  float kept[8];
  for (int i = 0; i < 8; i++) { kept[i] = x[32 * i + lane]; }
  x[lane] = kept[INDEX] + kept[7];
}
"""
    by_lane = metal_host.registers.footprint(text.replace("INDEX", "lane % 8"), "pick", [], {})
    constant = metal_host.registers.footprint(text.replace("INDEX", "3"), "pick", [], {})
    assert by_lane.in_memory and constant.in_memory == ()
    assert constant.live_words < 8
