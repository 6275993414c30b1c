"""What the machine can do at the best: candidates that only read, multiply or copy."""

import mlx.core as mx
import numpy as np
from paged_mlx import fast
from paged_mlx._native import _ext
from paged_mlx.machine.bench.workload import Workload

from benchmarks import roofline
from benchmarks.harness import Candidate

PAGE_READS, MULTIPLICATIONS, MEMCPY = "page reads alone", "multiplications alone", "memcpy"


def on_threads(threads: int, run, isa: str = ""):
    """``run`` on so many threads of the backend, with one instruction set."""

    def prepared(*args):
        _ext.set_num_threads(threads)
        _ext.set_isa(isa)
        return run(*args)

    return prepared


def page_reads(
    work: Workload, threads: int = 1, start: int = 0, distinct: bool = False
) -> Candidate:
    """Read the pages of the step, as many times as the tables name them or once each."""
    page_ids = work.tables[work.tables != fast.NO_PAGE]
    page_ids = np.unique(page_ids) if distinct else page_ids

    def read(layer):
        k_pages, v_pages = work.pool[layer].arrays
        return roofline.read_pages(k_pages, v_pages, page_ids, threads)

    nbytes = len(page_ids) * work.g.page_size * work.g.bytes_per_token
    run = work.in_turn(read, start)
    return Candidate(PAGE_READS, run, nbytes, limit=True)


def flops(work: Workload) -> float:
    """Multiplications and additions of the step: two for each element of K and V a row sees."""
    seen = sum(
        tokens * context - tokens * (tokens - 1) // 2
        for tokens, context in zip(work.query_lens, work.lengths)
    )
    return 4.0 * seen * work.g.num_q_heads * work.g.head_dim


def multiplications(work: Workload, threads: int = 1, isa: str = "") -> Candidate:
    """As many multiplications as the step has, at the peak of the instruction set."""
    count, dots = flops(work), work.g.dtype == "bfloat16"
    return Candidate(
        MULTIPLICATIONS, lambda: roofline.spend_flops(count, dots, threads, isa), limit=True
    )


def memcpy(nbytes: int, pool_bytes: int = 256 << 20) -> Candidate:
    """Copy as many bytes from one cold run of memory to another."""
    rows = max(2, pool_bytes // nbytes)
    memory = np.zeros((rows, nbytes), np.uint8)
    memory[:] = 1
    turn = [0]

    def copy():
        turn[0] = (turn[0] + 2) % (rows - 1)
        np.copyto(memory[turn[0] + 1], memory[turn[0]])

    return Candidate(MEMCPY, copy, nbytes, limit=True)


def memcpy_in_pieces(nbytes: int, pieces: int, pool_bytes: int = 256 << 20) -> Candidate:
    """Copy as many bytes from cold places all over the memory to others, a call a piece."""
    size = nbytes // pieces
    memory = np.ones((pool_bytes // size, size), np.uint8)
    places = np.random.default_rng(0).permutation(len(memory))
    turn = [0]

    def copy():
        turn[0] = (turn[0] + 2 * pieces) % (len(places) - 2 * pieces)
        chosen = places[turn[0] : turn[0] + 2 * pieces].tolist()
        for source, target in zip(chosen[::2], chosen[1::2]):
            memory[target] = memory[source]

    return Candidate(f"{MEMCPY} in pieces", copy, nbytes, limit=True)


def smallest_operation() -> Candidate:
    """What graph, Python and evaluation take of any operation, after others had the caches."""
    one = mx.ones((1,))
    return Candidate("the smallest MLX operation", lambda: mx.eval(one + one), limit=True)


def planning(work: Workload) -> Candidate:
    """The plan of the step, and nothing else."""
    return Candidate("planning alone", work.plan, limit=True)
