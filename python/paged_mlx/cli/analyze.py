"""``paged-mlx analyze``: the course chapter's two reports."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

from paged_mlx.cli.options import count, counts, parser

DESCRIPTION = """\
What a batch's K and V take: reserved at full length (static), in pages, and in pages with the
common beginning shared; counted with the page manager itself. With --time, a decode step on
contiguous and on paged K and V as well."""
EXAMPLES = """
paged-mlx analyze
paged-mlx analyze --lengths 100,500,1500 --page-size 32 --max-seq-len 4096
paged-mlx analyze --token-bytes 131072 --json     # 32 layers, 8 KV heads of 128, float16
paged-mlx analyze --time                          # timed too: some seconds
"""


def main(arguments: list[str]) -> int:
    options = parser("analyze", DESCRIPTION, EXAMPLES)
    options.add_argument(
        "--lengths",
        type=counts,
        metavar="N,N,...",
        help="tokens of each sequence (the chapter's 16)",
    )
    options.add_argument("--page-size", type=count, default=16, help="tokens in a page (16)")
    options.add_argument(
        "--max-seq-len", type=count, help="tokens that static allocation reserves (2048, or the longest)"
    )  # fmt: skip
    options.add_argument(
        "--token-bytes", type=count, default=8,
        help="bytes of one token's K and V: 2 x layers x KV heads x head_dim x bytes of a number (8)",
    )  # fmt: skip
    options.add_argument("--time", action="store_true", help="time a decode step both ways as well")
    options.add_argument("--repeats", type=count, default=3, help="steps to time (3)")
    options.add_argument("--json", action="store_true", help="the figures as JSON")
    chosen = options.parse_args(arguments)
    from paged_mlx.course.memory_report import LENGTHS, analyze_memory_efficiency

    report = analyze_memory_efficiency(
        chosen.lengths or LENGTHS,
        max_seq_len=chosen.max_seq_len,
        page_size=chosen.page_size,
        token_bytes=chosen.token_bytes,
        show=not chosen.json,
    )
    found = {"memory": asdict(report)}
    if chosen.time:
        print("timing a decode step both ways", file=sys.stderr)
        found["decode"] = _timed(chosen)
    if chosen.json:
        print(json.dumps(found, indent=1))
    return 0


def _timed(chosen):
    from paged_mlx.course.memory_systems import SCENARIOS, benchmark_memory_systems

    scenarios = SCENARIOS
    if chosen.lengths:
        scenarios = [{"name": "Your lengths", "lengths": chosen.lengths}]
    results = benchmark_memory_systems(
        scenarios, chosen.repeats, page_size=chosen.page_size, show=not chosen.json
    )
    return [asdict(result) | {"speedup": result.speedup} for result in results]
