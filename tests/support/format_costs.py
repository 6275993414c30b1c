"""What a decode step over quantised pages costs beside a dense one, as the table of docs/metal.md.

``python tests/support/format_costs.py`` prints it: counted on the host, float16, head_dim 128, one
KV head, pages of 64, 512 keys that all rows see.
"""

from __future__ import annotations

from metal_kernels import attend, registers
from metal_kernels.attention import K_BIASES, K_PAGES, K_SCALES, V_BIASES, V_PAGES, V_SCALES
from paged_mlx.reference.case import Case

PAIRS = ((None, None), ("q8", "q8"), ("q8", "q4"), ("q4", "q4"))
KEYS = 512
HEADER = (
    "| query heads | K | V | bytes of a key | loads of K and V | of scales | shuffles | matrix products | barriers | instructions of the loop |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)


def line(query_heads: int, pair: tuple) -> str:
    """A row of the table. Loads, shuffles and matrix products are a simdgroup's, for 64 keys."""
    case = Case(
        dtype="float16", num_q_heads=query_heads, head_dim=128, page_size=64, k_format=pair[0],
        v_format=pair[1], sequences=((1, KEYS),), seed=_seed_without_open_pages(pair),
    )  # fmt: skip
    attended = attend(case.build(), workers=1)
    (result,) = attended.attention
    counters, buffers = result.counters, result.buffers
    scales = [i for i in (K_SCALES, K_BIASES, V_SCALES, V_BIASES) if i in buffers]
    read = sum(buffers[i].load_bytes for i in (K_PAGES, V_PAGES))
    read += sum(buffers[i].unique_load_bytes for i in scales)
    variant = next(
        v
        for v in registers.variants(pair, (128,))
        if v.dtype == "float16" and v.rows == query_heads
    )
    cells = (
        query_heads, *(name or "float16" for name in pair), read // KEYS,
        _per_64(sum(buffers[i].merged_loads for i in (K_PAGES, V_PAGES))),
        _per_64(sum(buffers[i].merged_loads for i in scales)),
        _per_64(counters.shuffles + counters.quad_shuffles), _per_64(counters.matrix_multiplies),
        _per_64(counters.threadgroup_barriers), f"{registers.footprint(variant).loop_instructions:,}",
    )  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


def _seed_without_open_pages(pair: tuple) -> int:
    """Of a case whose pages are all sealed, by the toss of its coins."""
    for seed in range(1000):
        case = Case(
            head_dim=32, v_head_dim=64, page_size=64, sequences=((1, KEYS),), seed=seed,
            k_format=pair[0],
        )  # fmt: skip
        problem = case.build()
        if problem.block_tables.max() < len(problem.k_pages):
            return seed
    raise LookupError("no seed leaves every page sealed")


def _per_64(count: int) -> int:
    return round(count / (KEYS / 64))


def table() -> str:
    """A row for each pair of formats, for one query head of a KV head and for eight."""
    return "\n".join([HEADER, *(line(heads, pair) for heads in (1, 8) for pair in PAIRS)])


if __name__ == "__main__":
    print(table())
