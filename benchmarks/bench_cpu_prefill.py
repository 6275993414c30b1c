"""How near is prefill on the CPU to the peak of its multiplications, and to torch?

One thread, by its CPU time.
"""

from paged_mlx._native import _ext
from paged_mlx.machine.bench.workload import Geometry, Workload, agree

from benchmarks.bench_cpu_decode import (
    AVX2,
    DTYPES,
    has_more_than_avx2,
    one_page_each,
    paged,
)
from benchmarks.harness import Case, run
from benchmarks.limits import multiplications
from benchmarks.torch_sdpa import torch_sdpa


def case(length, context, dtype, isa="", rounds=5) -> Case:
    work = Workload([context], Geometry(dtype=dtype), [length])
    candidates = [paged(work, isa=isa), multiplications(work, isa=isa)]
    if not isa:
        candidates += [one_page_each(work), *torch_sdpa(work)]
    where = ", AVX2" if isa else ""
    about = {"query_len": length, "context_len": context, "dtype": dtype, "isa": isa or _ext.isa()}
    return Case(
        f"{length} on {context}, {dtype}{where}", candidates, agree, rounds, 1, "cpu", about
    )


def cases():
    for length in (512, 2048):
        for dtype in DTYPES:
            yield case(length, 2048, dtype)
    if has_more_than_avx2():
        for dtype in DTYPES:
            yield case(512, 2048, dtype, AVX2)


def main():
    run(f"cpu_prefill_{_ext.isa()}", cases())


if __name__ == "__main__":
    main()
