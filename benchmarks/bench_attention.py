"""What does a user gain? Paged attention, naive gather + SDPA, contiguous SDPA.

Planning, graph building and evaluation are all inside the time.
"""

from paged_mlx.bench.workload import Geometry, Workload, agree

from benchmarks.harness import Candidate, Case, run

CHAPTER = {
    "short": [50, 100, 150] * 10,
    "mixed": [100, 500, 1000, 2000] * 8,
    "long": [1500, 2000, 2500] * 6,
}


def case(name, lengths, dtype="float16", query_lens=None, rounds=6, **about) -> Case:
    work = Workload(lengths, Geometry(dtype=dtype), query_lens)
    k, v = work.contiguous_kv()
    return Case(
        f"{name}, {dtype}",
        [
            Candidate("paged", work.paged, work.nbytes),
            Candidate("contiguous mx.fast SDPA", lambda: work.contiguous(k, v), work.nbytes),
            Candidate("naive gather + mx.fast SDPA", work.naive_gather, work.nbytes),
        ],
        agree,
        rounds=rounds,
        warmups=1,
        about={"lengths": lengths, "query_lens": work.query_lens, "dtype": dtype, **about},
    )


def cases():
    for dtype in ("float32", "float16", "bfloat16"):
        yield case("decode, 1 x 1024", [1024], dtype)
        yield case("decode, 8 x 2048", [2048] * 8, dtype, rounds=4)
    for name, lengths in CHAPTER.items():
        yield case(f"decode, the chapter's {name} batch", lengths, rounds=4)
    yield case("prefill, 512 on 1024", [1024], "float32", [512], rounds=2)
    yield case("prefill, 512 on 1024", [1024], "float16", [512], rounds=2)


def main():
    run("attention", cases())


if __name__ == "__main__":
    main()
