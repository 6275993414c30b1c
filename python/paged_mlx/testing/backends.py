"""Backends under test: a name and functions over numpy arrays.

``attend`` is enough. The rest is optional; checks that need what a backend lacks are skipped
and the report says so. This package's own backends are ``cpu()`` and ``metal()``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from paged_mlx.reference import dtypes
from paged_mlx.reference.case import Case
from paged_mlx.reference.problem import Problem

Result = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Backend:
    """A paged attention.

    Attributes:
        name: Column of the report.
        attend_fixed, merge, write, copy, gather: None where the backend has none.
        attend: ``problem -> (out, lse)``: out ``[tokens, num_q_heads, v_head_dim]`` as float32,
            lse ``[tokens, num_q_heads]``; lse may be None.
        attend_fixed: The same, with bits that do not depend on the rest of the batch.
        merge: ``(outs, lses, dtype) -> (out, lse)``; outs stored, see ``dtypes``.
        write: ``(k, v, k_pages, v_pages, slot_mapping, dtype) -> (k_pages, v_pages)``.
        copy: ``(pools, pairs, dtype) -> pools``.
        gather: ``problem -> (k, v)``, ``[batch, num_kv_heads, longest, dim]`` stored.
        offers: Whether the backend supports a case; by default one whose pages are not quantised.
        snippet: Expression that makes the backend, for printed programs.
        stream: MLX stream or device of the backend, None if it is not MLX.
    """

    name: str
    attend: Callable[[Problem], Result]
    attend_fixed: Any = None
    merge: Any = None
    write: Any = None
    copy: Any = None
    gather: Any = None
    offers: Callable[[Case], bool] = lambda case: case.formats == (None, None)
    snippet: str = ""
    stream: object | None = None


def cpu() -> Backend:
    """This package's operations on the CPU."""
    import mlx.core as mx

    return on_stream("cpu", mx.cpu)


def metal() -> Backend | None:
    """This package's operations on the GPU; None where there is none."""
    import mlx.core as mx

    return on_stream("metal", mx.gpu) if mx.metal.is_available() else None


def to_mlx(stored: np.ndarray, dtype: str):
    """A stored array as an ``mx.array``, bit for bit."""
    import mlx.core as mx

    array = mx.array(stored)
    return array.view(mx.bfloat16) if dtype == "bfloat16" else array


def from_mlx(array) -> np.ndarray:
    """An ``mx.array`` as a stored numpy array, bit for bit."""
    import mlx.core as mx

    mx.eval(array)  # an error of the evaluation comes out here; numpy would try another way
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)


def op_arguments(problem: Problem) -> tuple[list, dict]:
    """Positional and keyword arguments of ``fast.paged_attention``."""
    import mlx.core as mx

    arrays = [to_mlx(a, problem.dtype) for a in (problem.q, problem.k_pages, problem.v_pages)]
    options = dict(problem.options)
    for name in ("alibi_slopes", "sinks", "mask"):
        if name in options:
            options[name] = mx.array(options[name])
    return [*arrays, problem.block_tables, problem.context_lens], options


def on_stream(name: str, stream) -> Backend:
    """This package's operations on a stream or device, and nowhere else if they are wrong there."""
    return Backend(
        name,
        attend=_unchecked(_attend, stream=stream),
        attend_fixed=_unchecked(_attend, stream=stream, fixed_partition=64),
        merge=_unchecked(_merge, stream=stream),
        write=_unchecked(_write, stream=stream),
        copy=_unchecked(_copy, stream=stream),
        gather=_unchecked(_gather, stream=stream),
        offers=_is_offered,
        snippet=f"backends.{name}()",
        stream=stream,
    )


def _unchecked(function: Callable, **fixed) -> Callable:
    def run(*arguments):
        from paged_mlx.machine import first_use

        with first_use.unchecked():
            return function(*arguments, **fixed)

    return run


def _is_offered(case: Case) -> bool:
    from paged_mlx.formats.page_format import PageFormats
    from paged_mlx.options import has_kernel

    try:
        sizes = case.head_dim, case.value_dim, case.page_size
        PageFormats(*case.formats).check("Case", *sizes)
    except ValueError:
        return False
    return has_kernel(case.head_dim) and has_kernel(case.value_dim)


def _attend(problem: Problem, *, stream, fixed_partition: int | None = None) -> Result:
    from paged_mlx import fast

    if problem.formats != (None, None):
        return _attend_quantised(problem, stream, fixed_partition)
    arguments, options = op_arguments(problem)
    if fixed_partition:
        q, k_pages, v_pages, tables, lens = arguments
        planned = {
            name: options.pop(name, None)
            for name in ("cu_seqlens_q", "page_starts", "page_lens", "sliding_window")
        }
        options["plan"] = fast.plan(
            tables,
            lens,
            num_q_heads=q.shape[1],
            num_kv_heads=k_pages.shape[1],
            page_size=k_pages.shape[2],
            dtype=q.dtype,
            head_dim=q.shape[2],
            v_head_dim=v_pages.shape[3],
            causal=options.pop("causal"),
            fixed_partition=fixed_partition,
            stream=stream,
            **planned,
        )
        options["causal"] = problem.causal
        arguments = [q, k_pages, v_pages]
    out, lse = fast.paged_attention(*arguments, **options, return_lse=True, stream=stream)
    return dtypes.decode(from_mlx(out), problem.dtype), np.array(lse)


def layer_arrays(problem: Problem) -> list:
    """The arrays of a problem's quantised layer, as ``mx.array``s."""
    import mlx.core as mx

    return [
        mx.array(a) if a.dtype == np.uint32 else to_mlx(a, problem.dtype) for a in problem.stored
    ]


def _attend_quantised(problem: Problem, stream, fixed_partition: int | None) -> Result:
    import mlx.core as mx

    from paged_mlx import operations
    from paged_mlx.attention_plan import PlanOptions, make_plan, runs_kernels
    from paged_mlx.formats.page_format import PageFormats
    from paged_mlx.options import AttentionOptions, Geometry
    from paged_mlx.pages.block_table import PackedTables

    (q, *_), options = op_arguments(problem)
    arrays, formats = layer_arrays(problem), PageFormats(*problem.formats)
    num_pages, num_kv_heads, page_size = arrays[0].shape[:3]
    num_open = arrays[-1].shape[0] if formats.have_open_pages else 0
    dims = problem.keys[0].shape[2], problem.values[0].shape[2]
    plan = make_plan(
        "plan",
        PackedTables(
            problem.block_tables, problem.context_lens, problem.cu_seqlens_q,
            problem.page_starts, problem.page_lens,
        ),
        Geometry(q.shape[1], num_kv_heads, page_size, *dims, q.dtype, formats),
        PlanOptions(
            num_pages + num_open, problem.causal, problem.sliding_window,
            fixed_partition is None, fixed_partition, None, runs_kernels(stream),
            num_pages if formats.have_open_pages else -1,
        ),
    )  # fmt: skip
    scoring = {name: options[name] for name in AttentionOptions._fields if name in options}
    out, lse, *_ = operations.paged_attention(
        q, arrays, plan.array, *AttentionOptions(**scoring), plan=plan, stream=stream,
        **formats.told,
    )  # fmt: skip
    mx.eval(out, lse)
    return dtypes.decode(from_mlx(out), problem.dtype), np.array(lse)


def _merge(outs, lses, dtype: str, *, stream) -> Result:
    import mlx.core as mx

    from paged_mlx import fast

    arrays = [to_mlx(out, dtype) for out in outs], [mx.array(lse) for lse in lses]
    out, lse = fast.merge_states(*arrays, stream=stream)
    return dtypes.decode(from_mlx(out), dtype), np.array(lse)


def _write(k, v, k_pages, v_pages, slot_mapping, dtype: str, *, stream):
    from paged_mlx import fast

    k, v, k_pages, v_pages = (to_mlx(a, dtype) for a in (k, v, k_pages, v_pages))
    pages = fast.write_pages(k, v, k_pages, v_pages, slot_mapping, stream=stream)
    return tuple(from_mlx(p) for p in pages)


def _copy(pools, pairs, dtype: str, *, stream):
    from paged_mlx import fast

    copies = fast.copy_pages([to_mlx(p, dtype) for p in pools], pairs, stream=stream)
    return [from_mlx(p) for p in copies]


def _gather(problem: Problem, *, stream):
    from paged_mlx import fast

    arguments, options = op_arguments(problem)
    ragged = {n: options[n] for n in ("page_starts", "page_lens") if n in options}
    return tuple(from_mlx(a) for a in fast.gather_pages(*arguments[1:], **ragged, stream=stream))
