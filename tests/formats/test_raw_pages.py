"""Raw operations on quantised pages, given as ``mx.quantize`` gives them."""

import re
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from paged_mlx import PagePool, PageTable, PrefixCache, fast, pages_within
from paged_mlx._native import _ext
from paged_mlx.fallback import operations
from paged_mlx.formats.page_format import PageFormats
from paged_mlx.formats.rotation import rotate
from paged_mlx.testing import Check, backends, run
from paged_mlx.testing.grid import quick

KIND = {"group_size": 64, "bits": 8}
TABLES, LENS = [[2, 0], [1, -1]], [20, 9]


@pytest.fixture
def pages():
    mx.random.seed(1)
    return mx.random.normal((4, 2, 16, 64)), mx.random.normal((4, 2, 16, 128))


def close(a, b, bound=1e-5):
    assert mx.abs(a - b).max().item() < bound


def test_attention_over_codes_is_attention_over_what_they_read_as(pages):
    coded = [mx.quantize(x, **KIND) for x in pages]
    read = [mx.dequantize(*x, **KIND) for x in coded]
    q = mx.random.normal((2, 4, 64))
    out = fast.paged_attention(q, *coded, TABLES, LENS, k_format="q8", v_format="q8")
    close(out, fast.paged_attention(q, *read, TABLES, LENS))
    mixed = fast.paged_attention(q, coded[0], pages[1], TABLES, LENS, k_format="q8")
    close(mixed, fast.paged_attention(q, read[0], pages[1], TABLES, LENS))


def test_v_of_four_bits_is_rotated_as_it_is_written_and_back_as_it_is_read(pages):
    k, v = mx.random.normal((3, 2, 64)), mx.random.normal((3, 2, 128))
    empty = mx.quantize(mx.zeros_like(pages[1]), group_size=64, bits=4)
    k_pages, v_pages = fast.write_pages(k, v, pages[0], empty, [0, 1, 17], v_format="q4")
    own = mx.quantize(rotate(v), group_size=64, bits=4)
    for array, expected in zip(v_pages, own):
        np.testing.assert_array_equal(array[1, :, 1], expected[2])
    read = fast.gather_pages(k_pages, v_pages, [[0]], [2], v_format="q4")[1]
    close(read[0].swapaxes(0, 1), rotate(mx.dequantize(*own, group_size=64, bits=4))[:2])
    q = mx.random.normal((1, 4, 64))
    out = fast.paged_attention(q, k_pages, v_pages, [[0]], [2], v_format="q4")
    close(
        out[:, :2],
        fast.paged_attention(
            q, k_pages[:1], mx.pad(read, [(0, 0), (0, 0), (0, 14), (0, 0)]), [[0]], [2]
        )[:, :2],
    )


def test_written_tokens_have_the_bits_of_mlx_quantize(pages):
    coded = [mx.quantize(x, **KIND) for x in pages]
    k, v = mx.random.normal((2, 2, 64)), mx.random.normal((2, 2, 128))
    with mx.stream(mx.cpu):
        written = fast.write_pages(k, v, *coded, [5, -1], k_format="q8", v_format="q8")
        for side, x, before in zip(written, (k, v), coded):
            for array, expected, old in zip(side, mx.quantize(x, **KIND), before):
                np.testing.assert_array_equal(array[0, :, 5], expected[0])
                np.testing.assert_array_equal(array[1:], old[1:])


def test_pages_of_codes_are_copied_with_their_scales(pages):
    coded = mx.quantize(pages[0], **KIND)
    copied, dense = fast.copy_pages([coded, pages[1]], [(3, 0)])
    for array, before in zip(copied, coded):
        np.testing.assert_array_equal(array[0], before[3])
        np.testing.assert_array_equal(array[1:], before[1:])
    np.testing.assert_array_equal(dense[0], pages[1][3])


def test_quantised_pages_that_are_not_as_their_format_says_are_refused(pages):
    coded = [mx.quantize(x, **KIND) for x in pages]
    q = mx.random.normal((2, 4, 64))

    def attend(k, v, **formats):
        return fast.paged_attention(q, k, v, TABLES, LENS, **formats)

    for k, v, formats, words in (
        (coded[0][0], pages[1], {}, r"k_pages must be float32.* or \(codes, scales, biases\)"),
        (coded[0], pages[1], {}, "k_pages must be one mx.array, unless k_format"),
        (pages[0], pages[1], {"k_format": "q8"}, r"k_pages must be \(codes, scales, biases\)"),
        (coded[0][:2], pages[1], {"k_format": "q8"}, r"k_pages must be .*; got 2 values"),
        (coded[0], pages[1], {"k_format": "q4"}, 'k_format must be "q8" or None here'),
        (coded[0], pages[1], {"k_format": "q6"}, 'k_format must be None, "q8" or "q4"'),
        (pages[0], pages[1], {"v_format": 4}, 'v_format must be None, "q8" or "q4"'),
    ):
        with pytest.raises(ValueError, match=rf"^\[paged_attention\] {words}"):
            attend(k, v, **formats)
    codes, scales, biases = coded[0]
    for wrong in (
        (codes, scales[:2], biases),
        (codes.astype(mx.int32), scales, biases),
        (codes, scales, biases.astype(mx.float16)),
        (codes[..., :-1], scales, biases),
    ):
        with pytest.raises(ValueError, match=r"^\[paged_attention\] "):
            attend(wrong, pages[1], k_format="q8")
    with pytest.raises(ValueError, match=r"^\[write_pages\] v_pages must be one mx.array"):
        fast.write_pages(q[:, :2], q[:, :2], pages[0], coded[1], [0, 1])
    with pytest.raises(ValueError, match=r"^\[gather_pages\] k_pages must be \(codes"):
        fast.gather_pages(*pages, TABLES, LENS, k_format="q8")


@pytest.mark.parametrize(
    "sizes, formats, words",
    [
        ((2, 80), {"k_format": "q8"}, "head_dim must be a multiple of 32"),
        ((2, 64), {"k_format": "q4"}, "page_size must be at least 8"),
        ((2, 64), {"v_format": "int8"}, 'v_format must be None, "q8" or "q4"'),
    ],
)
def test_a_pool_that_cannot_have_its_formats_is_refused(sizes, formats, words):
    with pytest.raises(ValueError, match=rf"^\[PagePool\] {words}"):
        PagePool(1, 4, sizes[0], 2, sizes[1], **formats)


def test_pages_within_a_budget_are_those_of_the_format():
    sizes = dict(num_layers=3, page_size=64, num_kv_heads=2, head_dim=128)
    budget = 3 * 2 * 64 * 512 * 10
    assert pages_within(budget, **sizes) == 10
    assert pages_within(budget, **sizes, k_format="q8", v_format="q8") == 512 * 10 // 272
    assert pages_within(budget, **sizes, k_format="q4", v_format="q4") == 512 * 10 // 144
    pool = PagePool(3, 8, 64, 2, 128, k_format="q4", v_format="q4")
    assert pool.page_nbytes == 3 * 2 * 64 * 144 and pool.pages_within(budget) == 35
    assert pool.nbytes == 8 * pool.page_nbytes + 3 * 2 * 64 * 512  # and one open page
    with pytest.raises(ValueError, match=r"^\[pages_within\] head_dim must be"):
        pages_within(budget, **(sizes | {"head_dim": 72}), k_format="q8")


def test_the_formats_are_an_extra_key_of_the_prefix_cache():
    pool = PagePool(1, 8, 16, 2, 64, k_format="q8", v_format="q4")
    cache, table, again = PrefixCache(pool.allocator), PageTable(16), PageTable(16)
    table.append_tokens(40, pool.allocator)
    tokens = list(range(40))
    assert cache.insert(tokens, table, pool.formats.extra_keys) == 2
    assert cache.reuse(tokens, again) == 0
    assert cache.reuse(tokens, again, PageFormats("q8", "q8").extra_keys) == 0
    assert cache.reuse(tokens, again, PageFormats("q8", "q4").extra_keys) == 32
    assert PageFormats().extra_keys == ()


def test_the_example_of_the_docs_runs():
    guide = Path(__file__).parents[2] / "docs" / "formats.md"
    program: dict = {}
    for block in re.findall(r"^```python\n(.*?)^```$", guide.read_text(), re.M | re.S):
        exec(compile(block, guide.name, "exec"), program)
    assert program["out"].shape == (100, 4, 64)


def test_a_case_of_quantised_pages_is_seen_red():
    """A fault in what a page reads as is found by the suite's own cases."""
    case = next(c.case for c in quick() if c.group == "formats" and c.case.formats == ("q4", "q4"))
    right = backends.cpu()

    def off_by_one(problem):
        from dataclasses import replace

        stored = list(problem.stored)
        stored[2] = np.roll(stored[2], 1, axis=-1)  # the minimum of the channel beside
        return right.attend(replace(problem, stored=tuple(stored)))

    wrong = backends.Backend("wrong", off_by_one, offers=lambda case: True)
    assert run(Check("formats", case), right).right
    assert not run(Check("formats", case), wrong).right


def test_mlxs_own_operations_store_and_read_what_native_ones_do():
    tokens = [mx.random.normal((5, 2, 64)) for _ in "kv"]
    sources = [mx.random.normal((2, 2, 8, 64)) for _ in "kv"]
    slots, pairs = mx.array([3, 5, -1, 0, 7]), mx.array([[0, 5, 8], [1, 4, 8]])
    for formats in (PageFormats("q8", "q4"), PageFormats("q4", "q4")):
        pages = PagePool(1, 6, 8, 2, 64, mx.float32, k_format=formats.k, v_format="q4").state[0]
        stored = []
        for native in (_ext, operations):
            with mx.stream(mx.cpu):
                found = native.write_pages(tokens, pages, slots, formats=formats)
                if formats.have_open_pages:
                    (found,) = native.seal_pages(
                        sources, [found], pairs, rotated=False, formats=formats
                    )
                table = mx.array([[6, 5] if formats.have_open_pages else [0, 5]])  # 6: open
                read = native.gather_pages(found, table, mx.array([16]), 16, formats=formats)[:2]
            stored.append([np.array(array) for array in (*found, *read)])
        for one, other in zip(*stored, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)
            assert one.any()
