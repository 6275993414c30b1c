"""What does reading a shared prefix once save on the CPU, and is it ever slower?

One thread, by its CPU time, unless a row says wall. The ideal is B(P+S)/(P+BS) for B sequences
with P shared tokens and S of their own; the multiplications stay the same, so their peak is the
other limit.
"""

from functools import partial

from paged_mlx._native import _ext
from paged_mlx.machine.bench.workload import Geometry, Workload, agree

from benchmarks.bench_cpu_decode import DEFAULT_THREADS, DTYPES
from benchmarks.harness import Candidate, Case, run
from benchmarks.limits import multiplications, on_threads, page_reads

BATCHES = {
    "8 x (8192 shared + 256)": (8, 8192, 256),
    "16 x (4096 shared + 256)": (16, 4096, 256),
    "2 x (2048 shared + 256)": (2, 2048, 256),
    "8 x (16 shared + 2048)": (8, 16, 2048),
    "32 x (16 shared + 112)": (32, 16, 112),
    "8 x 2048, nothing shared": (8, 0, 2048),
}
LONG = list(BATCHES)[:2]


def case(name, batch, shared, own, dtype, threads=1, clock="cpu", rounds=12) -> Case:
    _ext.set_num_threads(threads)
    work = Workload.cold([shared + own] * batch, Geometry(dtype=dtype), shared=shared)
    layers = work.pool.num_layers

    def candidate(name, start, **options):
        attend = on_threads(threads, partial(work.paged, plan=work.plan(**options)))
        return Candidate(name, work.in_turn(attend, start), work.nbytes)

    candidates = [
        candidate("shared", 0),
        candidate("not shared", layers // 3, share_prefixes=False),
        page_reads(work, threads, start=2 * layers // 3, distinct=True),
        multiplications(work, threads),
    ]
    about = {
        "batch": batch,
        "shared": shared,
        "own": own,
        "ideal": batch * (shared + own) / (shared + batch * own),
        "decisions": [str(d) for d in work.plan().decisions],
    }
    return Case(f"{name}, {dtype}", candidates, agree, rounds, 2, clock, about)


def cases():
    for dtype in DTYPES:
        for name, batch in BATCHES.items():
            yield case(name, *batch, dtype)
    for dtype in DTYPES:
        for name in LONG:
            title = f"{name}, {DEFAULT_THREADS} cores, wall"
            yield case(title, *BATCHES[name], dtype, DEFAULT_THREADS, "wall")


def main():
    run(f"cpu_sharing_{_ext.isa()}", cases())
    on_threads(DEFAULT_THREADS, lambda: None)()


if __name__ == "__main__":
    main()
