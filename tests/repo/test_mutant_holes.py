"""What no other test reached until a mutant survived."""

import metal_host
import pytest
from mutants import kernels_suite, planner_suite

pytestmark = pytest.mark.skipif(
    metal_host.unsupported() is not None, reason=str(metal_host.unsupported())
)


@pytest.mark.parametrize("case", ["vector, far pages", "tile, far pages", "write, far pages"])
def test_kernels_reach_pages_behind_two_to_the_31_elements(case):
    assert kernels_suite.CASES[case](None) is None


def test_a_plan_made_elsewhere_may_have_more_rows_than_a_threadgroup():
    assert kernels_suite.CASES["wide, many tiles"](None) is None


def test_one_dispatch_writes_keys_and_values_of_different_width():
    assert kernels_suite.CASES["pool"](None) is None


def test_pages_still_in_use_are_copied_whole_before_they_are_written():
    assert kernels_suite.CASES["kept pages"](None) is None


def test_a_row_hidden_by_its_mask_in_a_step_seen_by_all_is_zero():
    assert kernels_suite.CASES["tile, all masked"](None) is None


@pytest.mark.parametrize(
    "case", ["a page filled differently", "three share unequally", "other windows"]
)
def test_what_only_looks_like_a_common_prefix_is_read_alone(case):
    planner_suite.CASES[case]()


def test_a_shared_item_of_more_rows_than_a_tile_is_several():
    planner_suite.CASES["100 sequences share"]()
