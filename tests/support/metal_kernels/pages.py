"""The kernels that move pages, and merge_states, on numpy arrays."""

from __future__ import annotations

import ctypes
from ctypes import c_int, c_int64

import numpy as np

from .launcher import DTYPES, Launch, Memory, launch


class _Request(ctypes.Structure):
    _fields_ = [
        *(
            (n, Memory)
            for n in "k v k_pages v_pages indices context_lens page_starts page_lens".split()
        ),
        *((n, c_int) for n in "count num_kv_heads page_size k_row v_row max_pages length".split()),
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
