"""The kernels that move pages, and merge_states, on numpy arrays."""

from __future__ import annotations

import ctypes
from ctypes import c_int, c_int64

import numpy as np
from paged_mlx.reference.problem import Problem

from .attention import stored_arrays
from .launcher import DTYPES, K_FORMATS, V_FORMATS, Launch, Memory, launch


class _Request(ctypes.Structure):
    _fields_ = [
        *(
            (n, Memory)
            for n in "k v k_pages v_pages indices context_lens page_starts page_lens".split()
        ),
        *((n, Memory) for n in "k_scales k_biases v_scales v_biases open_k open_v".split()),
        *((n, c_int) for n in "count num_kv_heads page_size k_row v_row max_pages length".split()),
        *((n, c_int) for n in "dtype head_dim v_head_dim k_format v_format".split()),
        *((n, c_int) for n in "num_sealed rotated".split()),
    ]


def _request(k_pages, v_pages, **fields) -> _Request:
    request = _Request(
        k_pages=Memory.of(k_pages),
        v_pages=Memory.of(v_pages),
        num_kv_heads=k_pages.shape[1],
        page_size=k_pages.shape[2],
        k_row=k_pages.shape[3] * k_pages.itemsize,
    )
    if v_pages is not None:
        request.v_row = v_pages.shape[3] * v_pages.itemsize
    for name, value in fields.items():
        is_memory = value is None or isinstance(value, np.ndarray)
        setattr(request, name, Memory.of(value) if is_memory else value)
    return request


def write_pages(k, v, k_pages, v_pages, slots, **options) -> list[Launch]:
    """In place, as the kernel does it; ``v`` and ``v_pages`` may be None."""
    request = _request(k_pages, v_pages, k=k, v=v, indices=slots, count=len(slots))
    return launch("run_write_pages", ctypes.byref(request), **options)


def _formats(formats, dtype: str, head_dim: int, v_head_dim: int) -> dict[str, int]:
    return dict(
        k_format=K_FORMATS[formats[0]],
        v_format=V_FORMATS[formats[1]],
        dtype=DTYPES[dtype],
        head_dim=head_dim,
        v_head_dim=v_head_dim,
    )


def write_in_formats(k, v, arrays, slots, formats, dtype: str, **options) -> list[Launch]:
    """Write tokens in place; ``arrays`` by name, of open pages where K's format has some."""
    request = _request(
        arrays["k_pages"], arrays["v_pages"], k=k, v=v, indices=slots, count=len(slots),
        **{name: array for name, array in arrays.items() if name[2:] != "pages"},
        **_formats(formats, dtype, k.shape[2], v.shape[2]),
    )  # fmt: skip
    return launch("run_write_pages", ctypes.byref(request), **options)


def seal_pages(k, v, arrays, pairs, formats, dtype: str, rotated: bool, **options):
    """Quantise pages of ``k`` and ``v``, which are in page shape, in place."""
    request = _request(
        arrays["k_pages"], arrays["v_pages"], k=k, v=v, indices=pairs, count=len(pairs),
        rotated=rotated,
        **{name: array for name, array in arrays.items() if name[2:] != "pages"},
        **_formats(formats, dtype, k.shape[3], v.shape[3]),
    )  # fmt: skip
    return launch("run_seal_pages", ctypes.byref(request), **options)


def gather_in_formats(problem: Problem, length: int, **options):
    """``(k, v, launches)`` of a problem in formats, in storage."""
    arrays = stored_arrays(problem)
    tables = np.ascontiguousarray(problem.block_tables, np.int32)
    heads = problem.k_pages.shape[1]
    outs = [
        np.full((len(tables), heads, length, pages.shape[3]), 77, pages.dtype)
        for pages in (problem.k_pages, problem.v_pages)
    ]
    ragged = {
        name: None if array is None else np.ascontiguousarray(array, np.int32)
        for name, array in (("page_starts", problem.page_starts), ("page_lens", problem.page_lens))
    }
    request = _request(
        arrays["k_pages"], arrays["v_pages"], k=outs[0], v=outs[1], indices=tables,
        context_lens=np.ascontiguousarray(problem.context_lens, np.int32),
        count=len(tables), max_pages=tables.shape[1], length=length,
        num_sealed=len(problem.k_pages), **ragged,
        **{name: array for name, array in arrays.items() if name[2:] != "pages"},
        **_formats(problem.formats, problem.dtype, *(out.shape[3] for out in outs)),
    )  # fmt: skip
    return *outs, launch("run_gather_pages", ctypes.byref(request), **options)


def copy_pages(pools, pairs, **options) -> list[Launch]:
    """In place."""
    memory = (Memory * len(pools))(*map(Memory.of, pools))
    page_bytes = (c_int64 * len(pools))(*(pool.nbytes // len(pool) for pool in pools))
    arguments = (len(pools), memory, page_bytes, Memory.of(pairs), len(pairs))
    return launch("run_copy_pages", *arguments, **options)


def gather_pages(k_pages, v_pages, tables, lens, length, starts=None, page_lens=None, **options):
    """``(k, v, launches)``."""
    batch, max_pages = tables.shape
    outs = [
        np.full((batch, pages.shape[1], length, pages.shape[3]), 77, pages.dtype)
        for pages in (k_pages, v_pages)
    ]
    request = _request(
        k_pages,
        v_pages,
        k=outs[0],
        v=outs[1],
        indices=tables,
        context_lens=lens,
        page_starts=starts,
        page_lens=page_lens,
        count=batch,
        max_pages=max_pages,
        length=length,
    )
    return *outs, launch("run_gather_pages", ctypes.byref(request), **options)


def merge_states(outs, lses, dtype: str, **options):
    """``(out, lse, launches)``; arrays ``[rows, dim]`` and ``[rows]``."""
    out, lse = np.full_like(outs[0], 77), np.full_like(lses[0], np.nan)
    parts = len(outs)
    launches = launch(
        "run_merge_states",
        DTYPES[dtype],
        parts,
        (Memory * parts)(*map(Memory.of, outs)),
        (Memory * parts)(*map(Memory.of, lses)),
        Memory.of(out),
        Memory.of(lse),
        c_int64(outs[0].shape[0]),
        outs[0].shape[1],
        **options,
    )
    return out, lse, launches


def copy_buffer(source: np.ndarray, target: np.ndarray, **options) -> list[Launch]:
    """``target`` gets the bytes of ``source``."""
    arguments = (Memory.of(source), Memory.of(target), c_int64(source.nbytes))
    return launch("run_copy_buffer", *arguments, **options)
