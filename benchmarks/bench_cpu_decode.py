"""How near is decode on the CPU to the limit of the memory, and to other kernels?

One thread by its CPU time, unless a row says wall; K and V out of the caches. The plan is
made once for a step of many layers, so it is outside the time but where a row says otherwise.
"""

from functools import partial

import mlx.core as mx
import numpy as np
from paged_mlx import fast
from paged_mlx._native import _ext
from paged_mlx.machine.bench.workload import Geometry, Workload, agree

from benchmarks.harness import Candidate, Case, run
from benchmarks.limits import on_threads, page_reads, planning, smallest_operation
from benchmarks.torch_sdpa import torch_sdpa

DTYPES = ("float32", "bfloat16", "float16")
SHORT = [50, 100, 150] * 10
MHA = {"num_kv_heads": 32, "head_dim": 64}
AVX2 = "v3"
DEFAULT_THREADS = _ext.num_threads()


def paged(work, name="paged", threads=1, isa="", start=0, planned=True) -> Candidate:
    _ext.set_num_threads(threads)
    plan = work.plan() if planned else None
    attend = on_threads(threads, partial(work.paged, plan=plan), isa)
    return Candidate(name, work.in_turn(attend, start), work.nbytes)


def paged_step(work, name, threads=1) -> Candidate:
    """One call in all layers, evaluated together, as a model does it."""
    _ext.set_num_threads(threads)
    plan = work.plan()

    def step():
        outs = [work.pool[layer].attend(work.q, plan) for layer in work.layers]
        mx.eval(outs)
        return outs[0]

    return Candidate(name, on_threads(threads, step), work.nbytes * work.pool.num_layers)


def has_more_than_avx2() -> bool:
    return AVX2 in _ext.isa_names()[:-1]


def one_page_each(work) -> Candidate:
    """The same kernel on contiguous K and V: every sequence is one page."""
    layers = [work.contiguous_pages(i) for i in range(work.pool.num_layers)]
    tables = np.arange(len(work.lengths), dtype=np.int32)[:, None]
    plan = fast.plan(
        tables,
        work.lengths,
        num_q_heads=work.g.num_q_heads,
        num_kv_heads=work.g.num_kv_heads,
        page_size=max(work.lengths),
        cu_seqlens_q=work.cu,
        dtype=work.dtype,
    )

    def attend(layer):
        out = fast.paged_attention(work.q, *layers[layer], plan=plan)
        mx.eval(out)
        return out

    run = on_threads(1, attend)
    return Candidate("same kernel, contiguous", work.in_turn(run), work.nbytes)


def case(name, work, candidates, rounds, clock="cpu") -> Case:
    about = {"lengths": work.lengths, "dtype": work.g.dtype, "geometry": str(work.g)}
    return Case(f"{name}, {work.g.dtype}", candidates, agree, rounds, 2, clock, about)


def against_limits(dtype):
    work = Workload.cold([2048] * 8, Geometry(dtype=dtype))
    layers = work.pool.num_layers
    avx2 = [paged(work, "paged, AVX2", isa=AVX2, start=layers // 2)] if has_more_than_avx2() else []
    candidates = [paged(work), page_reads(work, start=layers // 4), *avx2, one_page_each(work)]
    yield case("8 x 2048", work, candidates + torch_sdpa(work), 12)
    work = Workload.cold([8192], Geometry(dtype=dtype))
    candidates = [paged(work), page_reads(work, start=work.pool.num_layers // 2), *torch_sdpa(work)]
    yield case("1 x 8192", work, candidates, 12)
    work = Workload.cold([2048] * 8, Geometry(dtype=dtype, page_size=64))
    candidates = [
        paged(work),
        page_reads(work, start=work.pool.num_layers // 2),
        one_page_each(work),
    ]
    yield case("8 x 2048, pages of 64", work, candidates, 12)


def small_steps(dtype):
    for name, lengths in (("1 x 1024", [1024]), ("the chapter's short batch", SHORT)):
        work = Workload.cold(lengths, Geometry(dtype=dtype))
        layers = work.pool.num_layers
        candidates = [
            paged(work, "paged, planning too", planned=False),
            paged(work, "paged", start=layers // 3),
            page_reads(work, start=2 * layers // 3),
            planning(work),
            smallest_operation(),
        ]
        yield case(name, work, candidates, 30)


def all_heads(dtype):
    work = Workload.cold([2048] * 8, Geometry(dtype=dtype, **MHA))
    yield case(
        "8 x 2048, 32 KV heads of 64", work, [paged(work), page_reads(work), *torch_sdpa(work)], 8
    )


def all_cores(dtype):
    threads = DEFAULT_THREADS
    for name, lengths in (("8 x 2048", [2048] * 8), ("1 x 8192", [8192]), ("1 x 1024", [1024])):
        work = Workload.cold(lengths, Geometry(dtype=dtype))
        layers = work.pool.num_layers
        candidates = [
            paged(work, "all cores", threads),
            paged(work, "one thread", start=layers // 3),
            page_reads(work, threads, start=2 * layers // 3),
        ]
        yield case(f"{name}, {threads} cores, wall", work, candidates, 20, "wall")
    candidates = [paged_step(work, "all cores", threads), paged_step(work, "one thread")]
    row = f"1 x 1024, a step of {layers} layers, {threads} cores, wall"
    yield case(row, work, candidates, 20, "wall")


def cases():
    for rows in (against_limits, small_steps, all_heads, all_cores):
        for dtype in DTYPES:
            yield from rows(dtype)


def main():
    run(f"cpu_decode_{_ext.isa()}", cases())
    on_threads(DEFAULT_THREADS, lambda: None)()


if __name__ == "__main__":
    main()
