"""What does a user gain? Paged attention, naive gather + SDPA, contiguous SDPA, plain formulas.

Planning, graph building and evaluation are all inside the time.
"""

import mlx.core as mx
from paged_mlx import fallback
from paged_mlx.machine.bench.workload import Geometry, Workload, agree

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
            Candidate("without a native module", lambda: plain_formulas(work), work.nbytes),
        ],
        agree,
        rounds=rounds,
        warmups=1,
        about={"lengths": lengths, "query_lens": work.query_lens, "dtype": dtype, **about},
    )


def plain_formulas(work: Workload) -> mx.array:
    """What the fallback computes: naive gather with all options, in float32."""
    pages, g = work.pool[0].arrays, work.g
    plan = fallback.NativePlan(
        op="plan", block_tables=work.tables, context_lens=work.context_lens, cu_seqlens_q=work.cu,
        page_starts=None, page_lens=None, num_pages=len(work.pool[0]), num_q_heads=g.num_q_heads,
        num_kv_heads=g.num_kv_heads, page_size=g.page_size, causal=True, sliding_window=0,
        dtype=work.dtype, head_dim=g.head_dim, v_head_dim=g.head_dim, share_prefixes=True,
        fixed_partition=0, workers=0,
    )  # fmt: skip
    out, *_ = fallback.paged_attention(work.q, pages, plan.array())
    mx.eval(out)
    return out


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
