"""A pool of more than 2^31 elements: offsets must be computed in 64 bits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from paged_mlx.reference.case import Case
from paged_mlx.reference.problem import Problem

_ELEMENTS = 2**31


def build(case: Case) -> Problem:
    """The case with its pages moved behind the 2^31st element of ``k_pages``.

    The pages in between are never touched, so they cost memory only where a backend copies
    the pool.
    """
    problem = case.build()
    used, page_shape = len(problem.k_pages), problem.k_pages.shape[1:]
    first = -(-_ELEMENTS // int(np.prod(page_shape)))
    tables = problem.block_tables
    moved = np.where((tables >= 0) & (tables < used), tables + first, tables)
    return replace(
        problem,
        k_pages=_moved(problem.k_pages, first),
        v_pages=_moved(problem.v_pages, first),
        block_tables=moved.astype(np.int32),
    )


def _moved(pages: np.ndarray, first: int) -> np.ndarray:
    pool = np.zeros((first + len(pages), *pages.shape[1:]), pages.dtype)
    pool[first:] = pages
    return pool
