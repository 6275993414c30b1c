"""A batch of page tables as arrays, built once or kept from step to step."""

import numpy as np
import pytest
from page_helpers import table_of
from paged_mlx.pages.block_table import BlockTable, pack
from paged_mlx.pages.policies import PageAllocator
from paged_mlx.pages.table import PageTable, append_batch, copy_on_write, share_prefix


@pytest.fixture
def allocator():
    return PageAllocator(256, 4)


def assert_same(packed, expected):
    """``packed`` may be wider: its extra columns are padding."""
    width = expected.block_tables.shape[1]
    np.testing.assert_array_equal(packed.block_tables[:, :width], expected.block_tables)
    assert (packed.block_tables[:, width:] == -1).all()
    np.testing.assert_array_equal(packed.context_lens, expected.context_lens)
    assert (packed.page_starts is None) == (expected.page_starts is None)
    if expected.page_starts is not None:
        np.testing.assert_array_equal(packed.page_starts[:, :width], expected.page_starts)
        np.testing.assert_array_equal(packed.page_lens[:, :width], expected.page_lens)
        assert not packed.page_lens[:, width:].any()


def test_pack_pads_short_tables(allocator):
    packed = pack([table_of(allocator, n) for n in (9, 3, 0)])
    assert packed.block_tables.tolist() == [[0, 1, 2], [3, -1, -1], [-1, -1, -1]]
    assert packed.context_lens.tolist() == [9, 3, 0]
    assert packed.block_tables.dtype == packed.context_lens.dtype == np.int32
    assert packed.cu_seqlens_q is packed.page_starts is packed.page_lens is None


def test_pack_gives_starts_and_lens_when_a_table_is_ragged(allocator):
    ragged, uniform = table_of(allocator, 3), table_of(allocator, 10)
    ragged.seal()
    ragged.append_tokens(3, allocator)
    packed = pack([ragged, uniform])
    assert packed.block_tables.tolist() == [[0, 4, -1], [1, 2, 3]]
    assert packed.page_starts.tolist() == [[0, 3, 6], [0, 4, 8]]
    assert packed.page_lens.tolist() == [[3, 3, 0], [4, 4, 2]]
    assert packed.page_starts.dtype == packed.page_lens.dtype == np.int32


def test_pack_keeps_the_place_of_pages_behind_a_window(allocator):
    table = table_of(allocator, 11)
    table.free_before(8)
    assert pack([table]).block_tables.tolist() == [[-1, -1, 2]]
    table.seal()
    table.append_tokens(1, allocator)
    packed = pack([table])
    assert packed.page_starts.tolist() == [[0, 4, 8, 11]] and packed.page_lens.tolist() == [
        [4, 4, 3, 1]
    ]
    assert packed.block_tables[0, :3].tolist() == [-1, -1, 2]


def test_pack_turns_query_lens_into_cu_seqlens(allocator):
    tables = [table_of(allocator, n) for n in (9, 3)]
    packed = pack(tables, [4, 1])
    assert packed.cu_seqlens_q.tolist() == [0, 4, 5] and packed.cu_seqlens_q.dtype == np.int32
    with pytest.raises(
        ValueError, match="query_lens must be at most the context, .*; got 4 of 3 in row 1"
    ):
        pack(tables, [4, 4])
    with pytest.raises(ValueError, match="query_lens must have one length per table, 2; got 1"):
        pack(tables, [4])
    with pytest.raises(ValueError, match="query_lens must be a whole number"):
        pack(tables, [4, -1])


def test_pack_refuses_an_empty_batch_and_mixed_page_sizes(allocator):
    with pytest.raises(ValueError, match="tables must have at least one table"):
        pack([])
    with pytest.raises(ValueError, match="tables must have one page_size, 4 as the first; got 8"):
        pack([PageTable(4), PageTable(8)])


def test_a_decode_step_rewrites_only_rows_that_got_a_page(allocator):
    tables = [table_of(allocator, n) for n in (5, 6, 7, 8)]
    block_table = BlockTable()
    block_table.update(tables)
    assert block_table.rows_written == 4
    written = []
    for _ in range(4):
        append_batch(tables, [1, 1, 1, 1], allocator)
        assert_same(block_table.update(tables), pack(tables))
        written.append(block_table.rows_written)
    assert written == [1, 1, 1, 1]


def test_an_updated_block_table_equals_a_fresh_one_after_any_change(allocator):
    tables = [table_of(allocator, n) for n in (20, 6, 9)]
    block_table = BlockTable()

    def changes():
        tables[0].truncate(3)
        yield
        tables[1] = tables[0].fork()
        yield
        tables[1].append_tokens(30, allocator)
        yield
        tables[1].free_before(17)
        yield
        tables.pop(0)
        yield
        tables.append(table_of(allocator, 70))
        yield
        tables.reverse()
        yield
        tables[0].release()
        yield
        tables[1].seal()
        tables[1].append_tokens(1, allocator)
        yield
        tables.extend([PageTable(4), tables[1]])
        yield

    block_table.update(tables)
    for _ in changes():
        assert_same(block_table.update(tables), pack(tables))


def test_a_row_follows_the_table_that_takes_it_over(allocator):
    forks = [table_of(allocator, n).fork() for n in (5, 6)]
    block_table = BlockTable()
    for fork in forks:
        assert_same(block_table.update([fork]), pack([fork]))


def test_a_table_that_shrank_and_left_the_batch_leaves_nothing_behind(allocator):
    long, short = table_of(allocator, 40), table_of(allocator, 2)
    block_table = BlockTable()
    block_table.update([short, long])
    block_table.update([short])
    packed = block_table.update([short, short])
    assert_same(packed, pack([short, short]))


def test_a_batch_is_packed_once_as_long_as_no_table_changes(allocator):
    tables = [table_of(allocator, 6), PageTable(4), table_of(allocator, 9)]
    block_table = BlockTable()
    first = block_table.update(tables)
    assert block_table.update(tables) is first
    assert block_table.update(list(tables)) is first
    for change in (
        lambda: share_prefix(tables[0], tables[1], 6),
        lambda: tables[2].append_tokens(1, allocator),
        lambda: tables[2].truncate(3),
        lambda: tables[2].free_before(0),
        lambda: copy_on_write(tables[1], 0, allocator),
        lambda: tables.reverse(),
        lambda: tables.pop(),
        lambda: tables[0].release(),
    ):
        block_table.update(tables)
        change()
        assert_same(block_table.update(tables), pack(tables))
        assert block_table.update(tables, [0] * len(tables)).cu_seqlens_q is not None
        assert block_table.update(tables).cu_seqlens_q is None


def test_a_block_table_says_its_state():
    allocator = PageAllocator(8, 4)
    block_table = BlockTable()
    assert repr(block_table) == "BlockTable(0 rows of 0 pages, 0 just written)"
    block_table.update([table_of(allocator, 9), table_of(allocator, 2)])
    assert repr(block_table) == "BlockTable(2 rows of 3 pages, 2 just written)"


def test_a_row_is_rewritten_when_its_tail_page_was_copied():
    allocator = PageAllocator(8, 4)
    block_table, table = BlockTable(), table_of(allocator, 6)
    fork = table.fork()
    block_table.update([table, fork])
    fork.append_tokens(1, allocator)
    assert block_table.update([table, fork]).block_tables.tolist() == [[0, 1], [0, 2]]
    assert block_table.rows_written == 1
    copy_on_write(fork, 0, allocator)
    assert block_table.update([table, fork]).block_tables.tolist() == [[0, 1], [3, 2]]
