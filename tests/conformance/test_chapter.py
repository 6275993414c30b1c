"""The picture at the end of the chapter, page by page, and attention over it."""

import mlx.core as mx
import numpy as np
import pytest
from paged_mlx import (
    PageAllocator,
    PageBlock,
    PagePool,
    PageTable,
    PageTableEntry,
    paged_attention,
    share_prefix,
)

HEADS, DIM, PAGE = 2, 8, 4
A = ["The", "quick", "brown", "fox", "jumps", "over"]
B = ["The", "quick", "brown", "cat", "runs", "fast"]
C = ["Hello", "world"]


def vectors(words, seed):
    """K or V of each word: a word is the same wherever it stands."""
    rows = [
        np.random.default_rng([seed, *word.encode()]).standard_normal((HEADS, DIM))
        for word in words
    ]
    return mx.array(np.stack(rows).astype(np.float32))


class Picture:
    """Requests A, B and C on four pages; A and B share "The quick brown"."""

    def __init__(self, partial="seal"):
        self.allocator = PageAllocator(8, PAGE)
        self.pool = PagePool(
            1, 8, PAGE, HEADS, DIM, mx.float32, allocator=self.allocator, fill=np.nan
        )
        self.a, self.b, self.c = (PageTable(PAGE) for _ in "abc")
        self.append(self.a, A[:3])
        share_prefix(self.a, self.b, 3, partial=partial)
        self.append(self.a, A[3:])
        self.append(self.b, B[3:])
        self.append(self.c, C)

    def append(self, table, words):
        plan = table.append_tokens(len(words), self.allocator)
        self.pool.write(0, vectors(words, 1), vectors(words, 2), plan.slots)

    tables = property(lambda self: [self.a, self.b, self.c])


def contiguous(words, query):
    """Attention of the last token over K and V that were never in pages."""
    k, v = (np.array(vectors(words, seed), np.float64) for seed in (1, 2))
    scores = np.einsum("hd,thd->ht", np.array(query, np.float64), k) * DIM**-0.5
    weights = np.exp(scores - scores.max(1, keepdims=True))
    return np.einsum("ht,thd->hd", weights / weights.sum(1, keepdims=True), v)


def queries():
    return mx.array(np.random.default_rng(0).standard_normal((3, HEADS, DIM)).astype(np.float32))


def test_the_picture_has_the_pages_of_the_chapter():
    picture = Picture()
    assert [t.page_ids for t in picture.tables] == [[0, 1], [0, 2], [3]]
    assert picture.a.entries == [PageTableEntry(0, 3, 0, True), PageTableEntry(3, 6, 1, False)]
    assert picture.b.entries == [PageTableEntry(0, 3, 0, True), PageTableEntry(3, 6, 2, False)]
    assert picture.c.entries == [PageTableEntry(0, 2, 3, False)]
    layer = picture.pool[0]
    assert [layer[page].tokens_stored for page in range(4)] == [3, 3, 3, 2]
    assert [layer[page].ref_count for page in range(4)] == [2, 1, 1, 1]
    assert picture.a.logical_to_physical(3) == (1, 0)


@pytest.mark.parametrize("partial", ["seal", "copy"])
def test_attention_over_the_picture_equals_contiguous_attention(partial):
    picture, q = Picture(partial), queries()
    out = np.array(paged_attention(q, picture.tables, picture.pool[0]))
    for row, words in enumerate([A, B, C]):
        np.testing.assert_allclose(out[row], contiguous(words, q[row]), atol=1e-6)


def test_a_dict_of_page_blocks_gives_the_same_as_a_pool_layer():
    picture, q = Picture(), queries()
    layer = picture.pool[0]
    blocks = {
        page: PageBlock(
            page,
            layer[page].tokens_stored,
            PAGE,
            layer[page].ref_count,
            layer[page].key_data,
            layer[page].value_data,
        )
        for page in (3, 1, 0, 2)
    }
    from_dict = paged_attention(q, picture.tables, blocks)
    assert mx.array_equal(from_dict, paged_attention(q, picture.tables, layer))


def test_copying_the_shared_page_leaves_the_first_request_alone():
    picture = Picture(partial="copy")
    shared, own = picture.a.page_ids[0], picture.b.page_ids[0]
    assert shared != own
    layer = picture.pool[0]
    assert mx.array_equal(layer[shared].key_data[:, :3], layer[own].key_data[:, :3])
    assert picture.allocator.ref_count(shared) == picture.allocator.ref_count(own) == 1


def test_a_block_of_positions_attends_causally_across_pages():
    picture = Picture()
    q = mx.array(np.random.default_rng(3).standard_normal((2, HEADS, 4, DIM)).astype(np.float32))
    out = np.array(paged_attention(q, [picture.a, picture.b], picture.pool[0]))
    for row, words in enumerate([A, B]):
        for step in range(4):
            expected = contiguous(words[: 3 + step], q[row, :, step])
            np.testing.assert_allclose(out[row, :, step], expected, atol=1e-6)


def test_packed_queries_give_the_same_as_a_block():
    picture = Picture()
    q = mx.array(np.random.default_rng(3).standard_normal((2, HEADS, 4, DIM)).astype(np.float32))
    packed = q.swapaxes(1, 2).reshape(8, HEADS, DIM)
    tables = [picture.a, picture.b]
    out, lse = paged_attention(packed, tables, picture.pool[0], query_lens=[4, 4], return_lse=True)
    block = paged_attention(q, tables, picture.pool[0])
    assert mx.array_equal(out.reshape(2, 4, HEADS, DIM).swapaxes(1, 2), block)
    assert lse.shape == (8, HEADS)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(query=mx.zeros((2, HEADS, DIM))), "query must have 3 tokens"),
        (dict(query=mx.zeros((3, HEADS, 1, 1, DIM))), "query must have shape"),
        (dict(query=mx.zeros((2, HEADS, 1, DIM))), "query must have batch = 3"),
        (dict(page_tables=[]), "page_tables must hold at least one table"),
        (dict(page_blocks={}), "page_blocks must hold every page"),
        (dict(query_lens=[1, 1]), "query_lens must have shape"),
        (dict(query_lens=[1, 1, 2]), "query must have 4 tokens"),
        (dict(query=mx.zeros((3, HEADS, DIM), mx.float16)), "k_pages must be float16"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    picture = Picture()
    call = dict(query=queries(), page_tables=picture.tables, page_blocks=picture.pool[0]) | change
    with pytest.raises(ValueError, match=message):
        paged_attention(**call)
