"""The Metal kernels that move pages, and merge_states, executed on the host."""

import metal_host
import numpy as np
import pytest
from metal_kernels import copy_buffer, copy_pages, gather_pages, merge_states, write_pages

pytestmark = pytest.mark.skipif(
    metal_host.unsupported() is not None, reason=str(metal_host.unsupported())
)

NUM_PAGES, HEADS, PAGE = 7, 2, 5


def random_pages(dim, seed=0, dtype=np.uint16):
    shape = (NUM_PAGES, HEADS, PAGE, dim)
    return np.random.default_rng(seed).integers(1, 60000, shape).astype(dtype)


def clean(launches):
    return [str(error) for launched in launches for error in launched.result.errors] == []


@pytest.mark.parametrize("dims", [(64, 72), (8, 20), (3, 5)], ids=str)
def test_write_puts_k_and_v_into_their_slots_in_one_dispatch(dims):
    k_pages, v_pages = random_pages(dims[0], 1), random_pages(dims[1], 2)
    slots = np.array([3, -1, 34, 17, 0], np.int32)
    k, v = (pages[0].reshape(-1, HEADS, pages.shape[3])[:5] + 1 for pages in (k_pages, v_pages))
    expected = k_pages.copy(), v_pages.copy()
    for token, slot in enumerate(slots):
        if slot >= 0:
            expected[0][slot // PAGE, :, slot % PAGE] = k[token]
            expected[1][slot // PAGE, :, slot % PAGE] = v[token]
    launches = write_pages(k, v, k_pages, v_pages, slots)
    assert clean(launches) and len(launches) == 1
    np.testing.assert_array_equal(k_pages, expected[0])
    np.testing.assert_array_equal(v_pages, expected[1])


def test_write_of_keys_alone_touches_nothing_else():
    k_pages = random_pages(16)
    expected, k = k_pages.copy(), np.ones((1, HEADS, 16), np.uint16)
    expected[1, :, 2] = 1
    assert clean(write_pages(k, None, k_pages, None, np.array([7], np.int32)))
    np.testing.assert_array_equal(k_pages, expected)


def test_write_moves_16_bytes_a_lane_and_reads_nothing_twice():
    k_pages, v_pages = random_pages(64), random_pages(64)
    k = np.ones((4, HEADS, 64), np.uint16)
    (launched,) = write_pages(k, k.copy(), k_pages, v_pages, np.arange(4, dtype=np.int32))
    for index in (2, 5):
        loads = launched.result.buffers[index]
        assert loads.load_bytes == k.nbytes and loads.load_ops == k.nbytes // 16


@pytest.mark.parametrize("num_pools", [1, 3, 28, 30])
def test_copy_moves_whole_pages_of_every_pool(num_pools):
    pools = [random_pages(8 + 8 * (i % 3), seed=i) for i in range(num_pools)]
    pairs = np.array([[0, 3], [1, 4], [0, 5], [6, 6]], np.int32)
    expected = [pool.copy() for pool in pools]
    for pool in expected:
        for source, target in pairs:
            pool[target] = pool[source]
    launches = copy_pages(pools, pairs)
    assert clean(launches) and len(launches) == (1 if num_pools <= 28 else 2)
    for pool, right in zip(pools, expected, strict=True):
        np.testing.assert_array_equal(pool, right)


def test_copy_of_no_pages_launches_nothing():
    assert copy_pages([random_pages(8)], np.zeros((0, 2), np.int32)) == []


def test_gather_makes_sequences_contiguous_and_zeroes_the_rest():
    k_pages, v_pages = random_pages(64, 1), random_pages(24, 2)
    tables = np.array([[3, 1, -1], [6, 0, 2], [-1, -1, -1]], np.int32)
    lens = np.array([7, 13, 0], np.int32)
    k, v, launches = gather_pages(k_pages, v_pages, tables, lens, 14)
    assert clean(launches)
    for s, length in enumerate(lens):
        for out, pages in ((k, k_pages), (v, v_pages)):
            rows = [pages[tables[s, j // PAGE], :, j % PAGE] for j in range(length)]
            for j, row in enumerate(rows):
                np.testing.assert_array_equal(out[s, :, j], row)
            assert not out[s, :, length:].any()


def test_gather_follows_ragged_pages():
    k_pages, v_pages = random_pages(8, 1), random_pages(8, 2)
    tables = np.array([[3, 1, 5, -1]], np.int32)
    starts, page_lens = np.array([[0, 2, 7, 99]], np.int32), np.array([[2, 5, 3, 99]], np.int32)
    k, _, launches = gather_pages(
        k_pages, v_pages, tables, np.array([9], np.int32), 10, starts, page_lens
    )
    assert clean(launches)
    rows = [(3, 0), (3, 1), *((1, i) for i in range(5)), (5, 0), (5, 1)]
    for j, (page, offset) in enumerate(rows):
        np.testing.assert_array_equal(k[0, :, j], k_pages[page, :, offset])
    assert not k[0, :, 9:].any()


@pytest.mark.parametrize("nbytes", [16 * 300, 30])
def test_copy_buffer_copies_every_byte(nbytes):
    source = np.random.default_rng(0).integers(0, 256, nbytes).astype(np.uint8)
    target = np.zeros_like(source)
    assert clean(copy_buffer(source, target))
    np.testing.assert_array_equal(source, target)


@pytest.mark.parametrize("parts", [1, 3, 13, 14, 30])
def test_merge_states_weighs_parts_by_their_lse(parts):
    rng = np.random.default_rng(parts)
    outs = [rng.normal(size=(9, 24)).astype(np.float32) for _ in range(parts)]
    lses = [3 * rng.normal(size=9).astype(np.float32) for _ in range(parts)]
    for out, lse in zip(outs, lses, strict=True):
        lse[5], out[5] = -np.inf, np.nan  # nothing was seen: the values may be anything
    lses[0][2] = -np.inf if parts > 1 else lses[0][2]
    out, lse, launches = merge_states(outs, lses, "float32")
    assert clean(launches) and len(launches) == -(-parts // 13)
    top = np.max(lses, axis=0)
    weights = np.exp(np.array(lses, np.float64) - np.where(np.isfinite(top), top, 0))
    total = weights.sum(axis=0)
    seen = total > 0
    values = (weights[..., None] * np.nan_to_num(np.array(outs, np.float64))).sum(axis=0)
    np.testing.assert_allclose(out[seen], values[seen] / total[seen, None], rtol=0, atol=2e-6)
    np.testing.assert_allclose(lse[seen], np.log(total[seen]) + top[seen], rtol=0, atol=2e-6)
    assert not out[5].any() and np.isneginf(lse[5])


def test_merge_states_rounds_once_to_the_dtype():
    ones = np.ones((2, 8), np.float16)
    out, lse, launches = merge_states([ones, 3 * ones], [np.zeros(2, np.float32)] * 2, "float16")
    assert clean(launches)
    np.testing.assert_array_equal(out, 2 * ones)
    np.testing.assert_allclose(lse, np.log(2), atol=1e-7)
