"""``paged-mlx demo``: a real model answers on pages."""

from __future__ import annotations

from paged_mlx.cli.options import count, needs_mlx_lm, parser

DESCRIPTION = """\
SmolLM2-135M-Instruct answers four questions as one batch, its K and V in pages, and beside
it on mlx-lm's own caches: every token is compared. The first run downloads the model (93 MB)
into the user's cache, later ones need no network."""
EXAMPLES = """
paged-mlx demo
paged-mlx demo --tokens 12 --plain
paged-mlx demo --tokens 12 --json
"""


def main(arguments: list[str]) -> int:
    options = parser("demo", DESCRIPTION, EXAMPLES)
    options.add_argument("--tokens", type=count, default=40, help="tokens of each answer (40)")
    options.add_argument("--plain", action="store_true", help="lines of text, no live display")
    options.add_argument("--json", action="store_true", help="the figures, and nothing else")
    chosen = options.parse_args(arguments)
    needs_mlx_lm()
    from paged_mlx.mlx_lm.demo.batch import run

    return run(chosen.tokens, chosen.plain, chosen.json)
