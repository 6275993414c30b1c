"""What benchmarks measure the kernels against: it must do the work that it stands for."""

import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from paged_mlx._native import _ext

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks import roofline


def words(pages: mx.array, page_ids) -> int:
    return int(np.array(pages)[page_ids].view(np.uint32).sum(dtype=np.uint64))


@pytest.mark.parametrize("threads", [1, 2])
def test_every_named_page_of_k_and_of_v_is_read_as_often_as_it_is_named(threads):
    rng = np.random.default_rng(0)
    k_pages = mx.array(rng.standard_normal((40, 2, 4, 8)).astype(np.float32))
    v_pages = mx.array(rng.standard_normal((40, 2, 4, 16)).astype(np.float32))
    mx.eval(k_pages, v_pages)
    page_ids = rng.integers(0, 40, 100).astype(np.int32)
    expected = (words(k_pages, page_ids) + words(v_pages, page_ids)) % 2**32
    assert roofline.read_pages(k_pages, v_pages, page_ids, threads) == np.float32(expected)


@pytest.mark.parametrize("page_id", [-1, 40])
def test_a_page_outside_the_pool_is_refused(page_id):
    pages = mx.zeros((40, 2, 4, 8))
    mx.eval(pages)
    with pytest.raises(ValueError, match=r"page_ids must lie in \[0, 40\)"):
        roofline.read_pages(pages, pages, np.array([0, page_id], np.int32), 1)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dot_products", [False, True])
@pytest.mark.parametrize("isa", _ext.isa_names())
def test_every_chain_of_multiplications_arrives_where_it_must(threads, isa, dot_products):
    total = roofline.spend_flops(1e7, dot_products, threads, isa)
    assert np.isfinite(total)
    assert total >= 12  # each of twelve sums starts at 1 and only grows
