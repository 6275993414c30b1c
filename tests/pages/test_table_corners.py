"""Page tables and their packed form, one page or one token more or less."""

import numpy as np
import pytest
from paged_mlx import OutOfPages, PageAllocator, PagePool, PageTable, append_batch, copy_on_write
from paged_mlx.pages.block_table import BlockTable, pack

PAGE = 4


def table_of(count, allocator):
    table = PageTable(PAGE)
    table.append_tokens(count, allocator)
    return table


def test_pages_are_given_back_when_all_their_tokens_lie_before_a_position():
    for position, freed in [(0, 0), (3, 0), (4, 1), (7, 1), (8, 2), (9, 2)]:
        allocator = PageAllocator(4, PAGE)
        table = table_of(9, allocator)
        pages = table.page_ids
        assert table.free_before(position) == freed
        assert table.num_freed == freed and allocator.num_free == 1 + freed
        assert all(allocator.ref_count(page) == 0 for page in pages[:freed])
        assert table.slots(4 * freed).tolist() == [
            pages[p // PAGE] * PAGE + p % PAGE for p in range(4 * freed, 9)
        ]
        allocator.check([table])


def test_a_copy_on_write_moves_one_holder_and_the_last_holder_stays():
    allocator = PageAllocator(4, PAGE)
    source = table_of(6, allocator)
    fork = source.fork()
    shared = source.page_ids
    assert copy_on_write(fork, 5, allocator)
    assert fork.page_ids[0] == shared[0] and fork.page_ids[1] not in shared
    assert [allocator.ref_count(p) for p in shared] == [2, 1]
    assert not copy_on_write(fork, 5, allocator) and not copy_on_write(source, 4, allocator)
    assert source.page_ids == shared and allocator.num_used == 3
    allocator.check([source, fork])


def test_a_table_is_cut_to_no_more_tokens_than_it_has():
    allocator = PageAllocator(4, PAGE)
    table = table_of(6, allocator)
    with pytest.raises(ValueError, match="length must be at most 6"):
        table.truncate(7)
    for length, pages in [(6, 2), (5, 2), (4, 1), (1, 1), (0, 0)]:
        table.truncate(length)
        assert (table.num_tokens, table.num_pages, allocator.num_used) == (length, pages, pages)


def test_slots_follow_the_pages_after_cuts_and_appends():
    allocator = PageAllocator(6, PAGE)
    table = table_of(6, allocator)
    table.truncate(5)
    appended = table.append_tokens(5, allocator)
    pages = table.page_ids
    right = [pages[p // PAGE] * PAGE + p % PAGE for p in range(10)]
    assert table.slots().tolist() == right and appended.slots.tolist() == right[5:]


def test_an_append_to_two_forks_copies_the_shared_tail_once():
    allocator = PageAllocator(4, PAGE)
    one = table_of(6, allocator)
    two = one.fork()
    tail = one.page_ids[1]
    copies = one.append_tokens(1, allocator).copies + two.append_tokens(1, allocator).copies
    assert copies == [(tail, one.page_ids[1])] and two.page_ids[1] == tail
    allocator.check([one, two])


def test_an_append_that_no_pool_can_copy_for_gives_all_pages_back():
    class Broken(PagePool):
        def copied(self, pairs):
            raise RuntimeError("no copy")

    allocator = PageAllocator(8, PAGE)
    pool = Broken(1, 8, PAGE, 1, 8, allocator=allocator)
    one = table_of(6, allocator)
    two = one.fork()
    before = one.entries, two.entries, allocator.num_free
    with pytest.raises(RuntimeError, match="no copy"):
        two.append_tokens(9, allocator)
    with pytest.raises(RuntimeError, match="no copy"):
        copy_on_write(two, 5, allocator)
    assert before == (one.entries, two.entries, allocator.num_free)
    pool.check([one, two])


def test_a_batch_that_names_a_table_twice_is_refused_and_unchanged():
    allocator = PageAllocator(8, PAGE)
    one, two = table_of(2, allocator), table_of(3, allocator)
    for counts in ([1, 1, 1], [4, 4, 4]):
        with pytest.raises(ValueError, match="different"):
            append_batch([one, two, one], counts, allocator)
    assert (one.num_tokens, two.num_tokens, allocator.num_used) == (2, 3, 2)
    with pytest.raises(OutOfPages):
        append_batch([one, two], [3, 24], allocator)
    assert (one.num_tokens, two.num_tokens, allocator.num_used) == (2, 3, 2)


def test_rows_of_a_block_table_are_those_of_the_tables_and_padding():
    allocator = PageAllocator(12, PAGE)
    one, two = table_of(14, allocator), table_of(3, allocator)
    batch = BlockTable()

    def assert_packed(tables):
        packed = batch.update(tables)
        for row, table in zip(packed.block_tables.tolist(), tables):
            assert row[: table.num_pages] == table.page_ids
            assert set(row[table.num_pages :]) <= {-1}
        assert packed.context_lens.tolist() == [t.num_tokens for t in tables]

    assert_packed([one, two])
    one.truncate(5)
    assert_packed([one, two])
    two.append_tokens(1, allocator)
    assert_packed([one, two])
    one.truncate(0)
    assert_packed([two, one])
    one.append_tokens(2, allocator)
    assert_packed([two, one])
    fork = two.fork()
    fork.append_tokens(1, allocator)
    assert_packed([two, fork])


def test_a_block_table_packs_the_query_lengths_of_each_step():
    allocator = PageAllocator(12, PAGE)
    tables = [table_of(9, allocator), table_of(3, allocator)]
    batch = BlockTable()
    for query_lens, right in [
        ([1, 1], [0, 1, 2]),
        ([3, 3], [0, 3, 6]),
        (None, None),
        ([9, 2], [0, 9, 11]),
    ]:
        cu = batch.update(tables, query_lens).cu_seqlens_q
        assert right is None and cu is None or cu.tolist() == right
    for query_lens in ([10, 1], [1, 4]):
        with pytest.raises(ValueError, match="at most the context"):
            batch.update(tables, query_lens)
    with pytest.raises(ValueError, match="one length per table"):
        batch.update(tables, [1])


def test_starts_and_lengths_of_a_sealed_table_cover_its_tokens_once():
    allocator = PageAllocator(12, PAGE)
    sealed, plain = table_of(3, allocator), table_of(6, allocator)
    sealed.seal()
    for count in (1, 3, 1):
        sealed.append_tokens(count, allocator)
        packed = pack([sealed, plain])
        for row, table in enumerate((sealed, plain)):
            starts, lens = packed.page_starts[row], packed.page_lens[row]
            used = lens > 0
            assert lens.sum() == table.num_tokens
            covered = np.concatenate(
                [np.arange(s, s + n) for s, n in zip(starts[used], lens[used])]
            )
            assert covered.tolist() == list(range(table.num_tokens))
