"""How many functions of the package stand between a page operation and its effect."""

import mlx.core as mx
import pytest
from counted_calls import calls
from page_helpers import table_of
from paged_mlx import PageAllocator, PagePool


@pytest.mark.native
def test_copy_on_write_of_a_page_takes_twenty_calls_in_five_files():
    allocator = PageAllocator(64, 16)
    pool = PagePool(4, 64, 16, 2, 64, mx.float16, allocator=allocator)
    table = table_of(allocator, 20)
    fork, before = table.fork(), pool.state[3][1]
    entered = calls(lambda: fork.append_tokens(1, allocator))
    assert fork.page_ids == [0, 2] and pool.state[3][1] is not before  # it was copied
    assert ("pool.py", "copied") in entered
    assert len(entered) <= 20 and len({file for file, _ in entered}) <= 5, entered


def test_an_append_in_place_takes_four_calls_in_two_files():
    allocator = PageAllocator(64, 16)
    table = table_of(allocator, 20)
    entered = calls(lambda: table.append_tokens(1, allocator))
    assert len(entered) <= 4 and len({file for file, _ in entered}) <= 2, entered
