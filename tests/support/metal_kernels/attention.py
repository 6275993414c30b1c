"""Attention of a ``paged_mlx.testing`` problem on the Metal kernels."""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_float, c_int, c_int64
from dataclasses import dataclass

import metal_host
import mlx.core as mx
import numpy as np
from paged_mlx import fast
from paged_mlx._native import _ext
from paged_mlx.attention_plan import AttentionPlan, Geometry, PlanOptions
from paged_mlx.reference import dtypes
from paged_mlx.reference.problem import Problem

from .launcher import DTYPES, K_FORMATS, MASK_KINDS, V_FORMATS, Launch, Memory, launch

K_PAGES, V_PAGES = 3, 4  # buffer indices of kernels/arguments.h
K_SCALES, K_BIASES, V_SCALES, V_BIASES = range(12, 16)
_OF_FORMATS = "k_scales k_biases v_scales v_biases open_k open_v".split()


class _Request(ctypes.Structure):
    _fields_ = [
        *((n, Memory) for n in "q k_pages v_pages plan out lse alibi_slopes sinks mask".split()),
        ("mask_head_stride", c_int64),
        ("mask_token_stride", c_int64),
        *((n, Memory) for n in _OF_FORMATS),
        *((n, c_int) for n in "dtype mask_kind head_dim v_head_dim k_format v_format".split()),
        ("scale", c_float),
        ("softcap", c_float),
        ("node_work", c_double),
    ]


@dataclass
class Attended:
    """A result, as float32, and how it came about."""

    out: np.ndarray
    lse: np.ndarray
    plan: AttentionPlan
    launches: list[Launch]

    @property
    def kernels(self) -> list[str]:
        return [launched.kernel for launched in self.launches]

    @property
    def errors(self) -> list[str]:
        """Every finding, fatal or not, and every conversion that Metal rejects."""
        found = []
        for launched in self.launches:
            found += [str(error) for error in launched.result.errors]
            found += launched.result.compile_warnings
        return found

    @property
    def attention(self) -> list[metal_host.Result]:
        """Results of the dispatches that read pages."""
        return [x.result for x in self.launches if x.kernel.startswith("attend_")]

    def read(self, index: int) -> int:
        """Bytes loaded from the buffer bound at ``index``."""
        return sum(result.buffers[index].load_bytes for result in self.attention)


def metal_plan(problem: Problem, **options) -> AttentionPlan:
    """The plan of a problem; ``options`` of ``fast.plan``."""
    num_pages, num_kv_heads, page_size, _ = problem.k_pages.shape
    return fast.plan(
        problem.block_tables,
        problem.context_lens,
        num_q_heads=problem.q.shape[1],
        num_kv_heads=num_kv_heads,
        page_size=page_size,
        cu_seqlens_q=problem.cu_seqlens_q,
        causal=problem.causal,
        sliding_window=problem.sliding_window,
        page_starts=problem.page_starts,
        page_lens=problem.page_lens,
        num_pages=num_pages,
        **options,
    )


def stored_arrays(problem: Problem) -> dict[str, np.ndarray]:
    """The arrays of a problem's pages by name, as the launch code takes them."""
    if problem.formats == (None, None):
        pages = {"k_pages": problem.k_pages, "v_pages": problem.v_pages}
        return {name: np.ascontiguousarray(array) for name, array in pages.items()}
    names = []
    for side, name in zip("kv", problem.formats):
        parts = ("pages",) if name is None else ("pages", "scales", "biases")
        names += [f"{side}_{part}" for part in parts]
    names += ["open_k", "open_v"] if problem.formats[0] == "q4" else []
    return {
        name: np.ascontiguousarray(array) for name, array in zip(names, problem.stored, strict=True)
    }


def quantised_plan(problem: Problem, **options) -> AttentionPlan:
    """The plan of a problem in formats, as for a GPU: open pages apart, results merged."""
    num_q_heads, head_dim = problem.q.shape[1:]
    num_kv_heads, page_size = problem.k_pages.shape[1:3]
    v_head_dim, dtype = problem.v_pages.shape[3], getattr(mx, problem.dtype)
    ints = {
        name: None if values is None else np.array(values, np.int32)
        for name, values in (
            ("block_tables", problem.block_tables),
            ("context_lens", problem.context_lens),
            ("cu_seqlens_q", problem.cu_seqlens_q),
            ("page_starts", problem.page_starts),
            ("page_lens", problem.page_lens),
        )
    }
    arguments = dict(share_prefixes=True, fixed_partition=0, workers=0) | options
    native = _ext.NativePlan(
        op="plan",
        **ints,
        **arguments,
        num_pages=-1,
        num_sealed_pages=len(problem.k_pages),
        formats=problem.formats,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        page_size=page_size,
        causal=problem.causal,
        sliding_window=problem.sliding_window or 0,
        dtype=dtype,
        head_dim=head_dim,
        v_head_dim=v_head_dim,
        kernels=True,
    )
    geometry = Geometry(num_q_heads, num_kv_heads, page_size, head_dim, v_head_dim, dtype)
    return AttentionPlan(native, geometry, PlanOptions())


def attend(
    problem: Problem,
    plan: AttentionPlan | None = None,
    *,
    max_threads: int = 1024,
    node_work: float = 0,
    host: dict | None = None,
    **options,
) -> Attended:
    """Run a problem through the launch code; slots outside every item may not be read.

    ``node_work``: multiply-adds after which a node of the graph ends, and the next goes on; 0 leaves it to the launch code.
    ``host`` are options of ``metal_host``, ``options`` those of ``fast.plan``, without ``plan``.
    """
    host = dict(host or {})
    if plan is None:
        make = metal_plan if problem.formats == (None, None) else quantised_plan
        plan = make(problem, **options)
    arrays = stored_arrays(problem) | {"q": np.ascontiguousarray(problem.q)}
    tokens, num_q_heads, head_dim = problem.q.shape
    v_head_dim = problem.v_pages.shape[3]
    arrays["plan"] = np.array(plan.array)
    arrays["out"] = _unwritten((tokens, num_q_heads, v_head_dim), problem.q.dtype)
    arrays["lse"] = _unwritten((tokens, num_q_heads), np.dtype(np.float32))
    for name in ("alibi_slopes", "sinks"):
        if getattr(problem, name) is not None:
            arrays[name] = np.ascontiguousarray(getattr(problem, name), np.float32)
    mask_kind, strides = "none", (0, 0)
    if problem.mask is not None:
        arrays["mask"], mask_kind, strides = _mask(problem.mask)
    request = _Request(
        **{name: Memory.of(array) for name, array in arrays.items()},
        mask_head_stride=strides[0],
        mask_token_stride=strides[1],
        dtype=DTYPES[problem.dtype],
        mask_kind=MASK_KINDS[mask_kind],
        head_dim=head_dim,
        v_head_dim=v_head_dim,
        k_format=K_FORMATS[problem.formats[0]],
        v_format=V_FORMATS[problem.formats[1]],
        scale=head_dim**-0.5 if problem.scale is None else problem.scale,
        softcap=problem.softcap or 0.0,
        node_work=node_work,
    )
    if host.get("instrument", True):
        host["forbid"] = [
            (arrays[name], begin, end)
            for name in ("k_pages", "v_pages", "open_k", "open_v")
            if name in arrays
            for begin, end in dead_slots(plan, arrays[name], name.startswith("open"))
        ]
    launches = launch("run_attend", ctypes.byref(request), max_threads=max_threads, **host)
    return Attended(dtypes.decode(arrays["out"], problem.dtype), arrays["lse"], plan, launches)


def dead_slots(
    plan: AttentionPlan, pages: np.ndarray, is_open: bool = False
) -> list[tuple[int, int]]:
    """Byte ranges of the slots that no item of the plan holds; of sealed or of open pages."""
    num_pages, num_kv_heads, page_size = pages.shape[:3]
    live = np.zeros((num_pages, page_size), bool)
    starts = _page_starts(plan)
    for (of_open, page, begin, end), start in zip(plan.page_spans(), starts, strict=True):
        if of_open != is_open:
            continue
        live[page, max(0, begin - start) : max(0, end - start)] = True
    rows = np.broadcast_to(live[:, None], (num_pages, num_kv_heads, page_size)).ravel()
    edges = np.flatnonzero(np.diff(np.concatenate(([True], rows, [True])).astype(np.int8)))
    row_bytes = pages.shape[3] * pages.itemsize
    return [(int(a) * row_bytes, int(b) * row_bytes) for a, b in edges.reshape(-1, 2)]


def _page_starts(plan: AttentionPlan):
    """Position of the first slot of each page of each item."""
    header, words, at = plan._header, plan._words, 0
    for i, item in enumerate(plan.items):
        for j in range(len(item["pages"])):
            if header["page_starts"]:
                yield int(words[header["page_starts"] + at])
            else:
                yield int(words[header["items"] + 8 * i + 4]) + j * plan.page_size
            at += 1


def _unwritten(shape, dtype) -> np.ndarray:
    """NaN, so that what no kernel writes is seen."""
    return np.full(shape, 0x7FFF if dtype == np.uint16 else np.nan, dtype)


def _mask(mask: np.ndarray):
    mask = mask[None] if mask.ndim == 2 else mask
    heads, tokens, keys = mask.shape
    boolean = mask.dtype == bool
    data = np.ascontiguousarray(mask, np.uint8 if boolean else np.float32)
    strides = (0 if heads == 1 else tokens * keys, keys)
    return data, "boolean" if boolean else "additive", strides
