"""Threadgroups that decode of one sequence launches, by model, chip and context.

``python tests/support/threadgroups.py`` prints the table of docs/metal.md. Needs no GPU.
"""

import mlx.core as mx
import numpy as np
from paged_mlx._native import _ext

#: (num_q_heads, num_kv_heads, head_dim)
MODELS = {
    "Llama-3.1-8B, Qwen3-8B": (32, 8, 128),
    "Qwen3-30B-A3B": (32, 4, 128),
    "Qwen2.5-7B": (28, 4, 128),
    "Qwen2.5-1.5B": (12, 2, 128),
    "gpt-oss": (64, 8, 64),
    "Gemma-3-4b": (8, 4, 256),
    "SmolLM2-135M": (9, 3, 64),
}
#: GPU cores
CHIPS = {"M1": 8, "M4": 10, "M4 Pro": 20, "M4 Max": 40, "M3 Ultra": 80}
CONTEXTS = (256, 1000, 2048, 8192, 32768)
PAGE_SIZE = 16


def items_of(heads: tuple[int, int, int], cores: int, context_len: int, batch: int = 1) -> int:
    """Work items of a decode step on a GPU of ``cores`` cores."""
    num_q_heads, num_kv_heads, head_dim = heads
    pages = -(-context_len // PAGE_SIZE)
    plan = _ext.NativePlan(
        op="plan",
        block_tables=np.arange(batch * pages, dtype=np.int32).reshape(batch, pages),
        context_lens=np.full(batch, context_len, np.int32),
        cu_seqlens_q=None,
        page_starts=None,
        page_lens=None,
        num_pages=-1,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        page_size=PAGE_SIZE,
        causal=True,
        sliding_window=0,
        dtype=mx.float16,
        head_dim=head_dim,
        v_head_dim=head_dim,
        share_prefixes=True,
        fixed_partition=0,
        workers=0,
        cores=cores,
        kernels=True,
    )
    return sum(plan.header()["num_items"])


def table() -> str:
    """Threadgroups and, in brackets, keys of each."""
    lines = [
        "| | context | "
        + " | ".join(f"{chip}, {cores} cores" for chip, cores in CHIPS.items())
        + " |",
        "|---|---|" + "---|" * len(CHIPS),
    ]
    for model, heads in MODELS.items():
        for context_len in CONTEXTS:
            cells = []
            for cores in CHIPS.values():
                items = items_of(heads, cores, context_len)
                cells.append(f"{items * heads[1]} ({context_len // items})")
            name = f"{model} {heads[0]}q/{heads[1]}kv" if context_len == CONTEXTS[0] else ""
            lines.append(f"| {name} | {context_len:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
